"""Train the byte-level BPE tokenizer that both models of the pair share.

    python -m pair.tokenizer --texts TEXTS --out tokenizer.json

Digits never merge, so a number of six digits after a space is six tokens, the first with its space.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from outrider.eval.facts import draw_facts

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 8192
SPLIT = r"['’](?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Words with their leading space, single digits, runs of punctuation, line breaks, other white space."""

FACTS_SEED = 20_000
FACTS_COUNT = 40_000


def untrained() -> Tokenizer:
    """A byte-level BPE tokenizer without merges. It is lossless: no normalisation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train on ``texts``; the end-of-text token gets id 0. Deterministic: equal texts give equal tokenizers."""
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def corpus(folder: Path, facts: int = FACTS_COUNT) -> Iterator[str]:
    """Every ``.txt`` file of ``folder``, then planted facts at about their share of the training sequences."""
    for path in sorted(folder.glob("*.txt")):
        yield path.read_text(encoding="utf-8")
    for fact in draw_facts(random.Random(FACTS_SEED), facts):
        yield f" {fact.statement} {fact.exchange}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder of UTF-8 .txt files")
    parser.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args()
    tokenizer = train(corpus(args.texts), args.vocab_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
