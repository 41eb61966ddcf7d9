"""Evaluate a pair of exported models with `transformers`: perplexity, greedy agreement, recall of planted facts.

    python -m pair.evaluate --target TARGET --draft DRAFT --texts DEV --out pair.jsonl

Perplexity and agreement: tokens 8192 to 16383 of each book, predicted teacher-forced from all before them.
Facts: statements planted over the beginning of a book, then each asked for at its end, greedily.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from outrider.eval.facts import DIGITS, Fact, draw_facts
from pair.data import lay_out

CONTEXT, SCORED = 16384, 8192
FACTS_SEED = 1
FACTS_PER_BOOK, FACTS_BOOKS = 8, 4
LONG_ENOUGH = 400_000
"""Characters read of each book; more than the longest context."""
ROOM = 48
"""Tokens kept free at the end of a context for a question and its answer."""


@torch.inference_mode()
def predictions(model: PreTrainedModel, tokens: Tensor) -> tuple[float, Tensor]:
    """Perplexity of the last ``SCORED`` of ``tokens`` [1, T] and the greedy predictions of them [SCORED]."""
    logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=SCORED).logits[0].float()
    loss = F.cross_entropy(logits, tokens[0, -SCORED:])
    return loss.exp().item(), logits.argmax(-1)


@torch.inference_mode()
def recalled(model: PreTrainedModel, context: Tensor, questions: list[Tensor]) -> list[list[int]]:
    """The ``DIGITS`` tokens that follow each of ``questions`` [1, Q] after ``context`` [1, T], greedily."""
    cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
    answers = []
    for question in questions:
        tokens, answer = question, []
        for _ in range(DIGITS):
            tokens = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            answer.append(tokens.item())
        cache.crop(1 - DIGITS - question.shape[1])
        answers.append(answer)
    return answers


def fact_documents(
    tokenizer: PreTrainedTokenizerBase, books: list[list[int]], length: int
) -> list[tuple[list[int], list[Fact]]]:
    """Beginnings of the first books long enough, with planted statements, and the facts they state."""
    documents = []
    for number, book in enumerate(book for book in books if len(book) >= length):
        rng = random.Random(f"{FACTS_SEED} {length} {number}")
        facts = draw_facts(rng, FACTS_PER_BOOK)
        statements = [tokenizer.encode(fact.statement, add_special_tokens=False) for fact in facts]
        text = np.array(book[: length - ROOM], dtype=np.int64)
        documents.append((lay_out(text, statements, rng).tolist(), facts))
        if len(documents) == FACTS_BOOKS:
            break
    return documents


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: list[tuple[list[int], list[Fact]]]
) -> tuple[int, int]:
    """Facts recalled to the last digit, and facts asked for."""
    right = total = 0
    for text, facts in documents:
        context = torch.tensor([text], device=model.device)
        encoded = [tokenizer.encode(fact.question, add_special_tokens=False) for fact in facts]
        answers = recalled(model, context, [torch.tensor([q], device=model.device) for q in encoded])
        right += sum(tokenizer.decode(a) == fact.answer for a, fact in zip(answers, facts, strict=True))
        total += len(facts)
    return right, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="folder of held-out UTF-8 .txt files")
    parser.add_argument("--out", type=Path, help="file to append one JSON line to")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--books", type=int, help="score only the first so many books")
    parser.add_argument("--contexts", type=int, nargs="*", default=(16384, 32768), help="lengths for facts")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(device).eval()
        for name, folder in (("target", args.target), ("draft", args.draft))
    }
    paths = sorted(args.texts.glob("*.txt"))
    texts = [path.read_text(encoding="utf-8")[:LONG_ENOUGH] for path in paths]
    books = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    result: dict = {"benchmark": "pair", "context": CONTEXT, "scored": SCORED, "books": {}}
    for path, book in list(zip(paths, books, strict=True))[: args.books]:
        tokens = torch.tensor([book[:CONTEXT]], device=device)
        scores = {name: predictions(model, tokens) for name, model in models.items()}
        agreement = (scores["target"][1] == scores["draft"][1]).float().mean().item()
        row = {name: round(score[0], 3) for name, score in scores.items()} | {"agreement": round(agreement, 4)}
        result["books"][path.stem] = row
        print(f"{path.stem:48.48} {row['target']:8.2f} {row['draft']:8.2f} {agreement:7.3f}", flush=True)
    for key in ("target", "draft", "agreement"):
        result[key] = round(sum(row[key] for row in result["books"].values()) / len(result["books"]), 4)
    print(f"{'mean of ' + str(len(result['books'])):48} {result['target']:8.2f} {result['draft']:8.2f}", end=" ")
    print(f"{result['agreement']:7.3f}")
    for length in args.contexts:
        documents = fact_documents(tokenizer, books, length)
        result[f"facts_{length}"] = {name: recall(model, tokenizer, documents) for name, model in models.items()}
        print(f"facts at {length}: {result[f'facts_{length}']}", flush=True)
    result["conditions"] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
