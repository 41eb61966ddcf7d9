"""Task "prefill": what a target loses that has read its prompt from lists, whatever it reads afterwards.

Three parts, a row each:

    prompt        perplexity of the prompt's last tokens while it is read; no row where a method predicts none of them
    continuation  perplexity of the tokens behind it, read densely from the keys and values that reading left behind
    facts         planted facts, each asked for at the end of the prompt, at another place of its last block every time; the
                  answer is read densely. Recalled means every digit right.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.config import PREFILL_METHODS, EngineConfig, check
from outrider.decoding.prefill import ProgressCallback
from outrider.decoding.prompt_reader import PromptReader, make_prompt_reader
from outrider.decoding.sparse_prefill import PREFILL_METHOD, Kept
from outrider.errors import OptionError
from outrider.eval.facts import draw_facts
from outrider.eval.facts_task import Question, plant
from outrider.eval.perplexity import perplexity_of
from outrider.eval.rows import DENSE, Case, Row, Text, conditions, of_case
from outrider.eval.teacher_forced import budget_of, check_context, tokenize
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.selectors import SELECTORS
from outrider.models import LanguageModel, Output
from outrider.models.cache import aligned


def evaluate(
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    texts: list[Text],
    cases: list[Case],
    *,
    context: int,
    scored_tokens: int = 4096,
    continued: int = 512,
    facts: int = 10,
    seed: int | str = 0,
    map_name: str | None = None,
    prefill_chunk: int = 2048,
    prefill_block: int = 128,
    prefill_draft_keep: float = 0.1,
    prefill_draft_least: int = 8192,
    prefill_min_context: int = 4096,
    progress: ProgressCallback | None = None,
) -> Iterator[Row]:
    """Read the first `context` tokens of every text, all but `continued` as the prompt; yields a row a (text, case, part).

    The last `scored_tokens` of the prompt are scored, and all that are `continued`. agreement is the share of tokens whose most
    probable successor is that of the dense target, kept_fraction what blocks read of the tokens before them, or what a method
    keeps of a prompt's tokens. Methods are "dense" and those of `PREFILL_METHODS`. All options are checked before any work:
    OptionError, PromptError.
    """
    check("continued", continued, 1 <= continued < context, f"1 .. context - 1 = {context - 1}")
    most = context - continued
    check("scored-tokens", scored_tokens, 1 <= scored_tokens < most, f"1 .. context - continued - 1 = {most - 1}")
    check("facts", facts, facts >= 0, "a whole number >= 0")
    check_context(context, pair, 2)
    shape = {
        "prefill_chunk": prefill_chunk,
        "prefill_block": prefill_block,
        "prefill_draft_keep": prefill_draft_keep,
        "prefill_draft_least": prefill_draft_least,
        "prefill_min_context": prefill_min_context,
    }
    readers = [reader_of(case, pair, alignments, map_name, shape) for case in cases]
    ahead = max([reader.ahead for reader in readers if reader is not None], default=0)
    check("continued", continued, continued >= ahead, f"at least {ahead}, for a method that reads so many behind a prompt")
    documents = []
    for number, text in enumerate(texts):
        rng = random.Random(f"{seed} {context} {number}")
        tokens = tokenize(pair[0], text.name, text.text, context)
        planted = plant(pair[0], tokens[:most], draw_facts(rng, facts), rng) if facts else ([], [])
        ends = [len(planted[0]) - rng.randrange(prefill_block) for _ in range(facts)]
        documents.append(Document(name=text.name, tokens=tokens, prompt=most, text=planted[0], questions=planted[1], ends=ends))

    common: dict[str, Any] = conditions(pair, 0, map_name, None) | shape

    def rows() -> Iterator[Row]:
        prompts = Prompts(pair, context, prefill_chunk)
        for document in documents:
            dense = prompts.run(document, None, scored_tokens)
            for done, (case, reader) in enumerate(zip(cases, readers, strict=True), start=1):
                run = dense if reader is None else prompts.run(document, reader, scored_tokens)
                if progress is not None:
                    progress(f"read {document.name}", done, len(cases))
                yield from rows_of(run, dense, document, case, context, of_case(common, case))

    return rows()


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text, and the same text with facts in it."""

    name: str
    tokens: list[int]
    prompt: int  # of the tokens, the first ones
    text: list[int]  # with facts
    questions: list[Question]
    ends: list[int]  # for each question: where the text is cut before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the target predicted of one document."""

    prompt: Tensor  # [scored, V] fp32: row i predicts the i-th scored token; fewer where a method has no prediction of all
    continuation: Tensor  # [continued, V] fp32
    answers: list[Tensor]  # per question the most probable token at each of the answer's places
    kept_fraction: float
    seconds: float


class Prompts:
    """A pair with caches for one prompt, which is read in one way after the other."""

    def __init__(self, pair: tuple[LanguageModel, LanguageModel], capacity: int, chunk: int) -> None:
        self.chunk = chunk
        self.rows = [(model, model.new_cache(1, aligned(capacity))) for model in pair]

    def run(self, document: Document, reader: PromptReader | None, scored: int) -> Read:
        """Read its prompt, what follows it, and its questions."""
        end, started, kept = document.prompt, time.perf_counter(), Kept()
        self.forget(0)
        prompt = self.read(document.tokens[:end], 0, reader, scored + 1, kept)
        seconds = time.perf_counter() - started
        behind = self.read(document.tokens[:-1], end, None, len(document.tokens) - 1 - end)
        return Read(
            prompt=prompt[:-1],
            continuation=torch.cat([prompt[-1:], behind]),
            answers=self.ask(document, reader),
            kept_fraction=1.0 if kept.fraction is None else kept.fraction,
            seconds=seconds,
        )

    def ask(self, document: Document, reader: PromptReader | None) -> list[Tensor]:
        """The questions one by one, the last blocks of the text being read again with each; all of it by a reader that wants
        prompts whole."""
        if not document.questions:
            return []
        self.forget(0)
        common, choices = min(document.ends), []
        if reader is not None:
            common = 0 if reader.whole else common // reader.block * reader.block
        self.read(document.text[:common], 0, reader)
        for (question, answer), end in zip(document.questions, document.ends, strict=True):
            asked = document.text[:end] + question
            self.forget(common)
            last = self.read(asked, common, reader, 1)
            rest = self.read(asked + answer[:-1], len(asked), None, len(answer) - 1)
            choices.append(torch.cat([last, rest]).argmax(-1).cpu())
        return choices

    def forget(self, cached: int) -> None:
        """What lies at and past `cached` tokens, in caches that hold them all."""
        for _, cache in self.rows:
            cache.truncate(cached)

    def read(
        self, tokens: list[int], cached: int, reader: PromptReader | None, scored: int = 0, kept: Kept | None = None
    ) -> Tensor:
        """Read all but the first `cached` tokens, which have been read. Returns the target's logits [scored, V] behind the last
        ones, or of as many as the reader has."""
        whole = reader is not None and reader.whole and len(tokens) > reader.min_context
        chunk = len(tokens) if whole else self.chunk
        found = [torch.empty(0, self.rows[0][0].spec.vocabulary, device=self.rows[0][1].device)]
        for start in chunk_starts(cached, len(tokens), chunk):
            stop = min(start // chunk * chunk + chunk, len(tokens))
            part, last = torch.tensor([tokens[start:stop]]), stop - max(start, len(tokens) - scored)
            if reader is not None and stop > reader.min_context:
                rows = self.rows if reader.drafts else self.rows[:1]
                logits, lists = reader.read(rows, part, stop, logits=last > 0, last=max(last, 1))
                if kept is not None:
                    kept.add(lists, start, stop)
            else:
                logits = self._read_densely(part, stop, last)
            found.append(logits[0].float())
        return torch.cat(found)

    def _read_densely(self, part: Tensor, stop: int, last: int) -> Tensor:
        """A chunk through both models, at its place in the text: the target's logits of its `last` tokens [1, n, V]."""
        outputs: list[Output] = []
        for model, cache in self.rows:
            known = part.clamp(max=model.spec.vocabulary - 1)
            positions = torch.arange(stop - part.shape[1], stop)[None]  # a cache may hold a part of the text
            wanted = last > 0 and not outputs
            outputs.append(model.forward(known, cache, stop=stop, positions=positions, logits=wanted, last=max(last, 1)))
            cache.advance(part.shape[1])
        return outputs[0].logits


def chunk_starts(cached: int, stop: int, chunk: int) -> list[int]:
    """Where chunks begin: at `cached`, then at multiples of `chunk`."""
    return [cached, *range(cached // chunk * chunk + chunk, stop, chunk)] if cached < stop else []


def reader_of(
    case: Case,
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    map_name: str | None,
    shape: dict[str, Any],
) -> PromptReader | None:
    """How a case reads prompts; None: densely. Raises OptionError for another method, and for what a method lacks."""
    if case.method == DENSE:
        return None
    check("method", case.method, case.method in PREFILL_METHODS, f"{DENSE}, {', '.join(PREFILL_METHODS)} (of prefill)")
    budget = budget_of(case)
    if budget.keep is None:
        raise OptionError("top-p", budget.top_p, "keep, a share of the tokens (of prefill)")
    config = EngineConfig(mode="dense", budget=budget, backend=pair[0].backend, **shape)
    named = case.map or map_name or SELECTORS[PREFILL_METHOD].default_map
    alignment = None if alignments is None else alignments.map(named).alignment
    return make_prompt_reader(case.method, *pair, config, budget.keep, alignment)


def rows_of(
    run: Read, dense: Read, document: Document, case: Case, context: int, conditions: dict[str, str | int]
) -> Iterator[Row]:
    """One for each part."""
    budget, end = case.budget, document.prompt
    about: dict[str, Any] = {
        "task": "prefill", "text": document.name, "method": case.method, "keep": budget.keep if budget else None, "top_p": None,
        "context": context, "kept_fraction": run.kept_fraction, "seconds": run.seconds, "conditions": conditions,
    }  # fmt: skip
    for part, found, truth, wanted in (
        ("prompt", run.prompt, dense.prompt, document.tokens[end - len(dense.prompt) : end]),
        ("continuation", run.continuation, dense.continuation, document.tokens[end:]),
    ):
        if len(found) < len(truth):
            continue
        ppl, ppl_dense = (perplexity_of(logits, torch.tensor(wanted)) for logits in (found, truth))
        agreement = float((found.argmax(-1) == truth.argmax(-1)).float().mean())
        delta = 100 * (ppl / ppl_dense - 1)
        given = about | {"ppl": ppl, "ppl_dense": ppl_dense, "delta_percent": delta, "agreement": agreement}
        yield Row(**given, part=part, scored_tokens=len(wanted))
    if document.questions:
        answers = [torch.tensor(answer) for _, answer in document.questions]
        yield Row(
            **about,
            part="facts",
            scored_tokens=sum(map(len, answers)),
            agreement=float((torch.cat(run.answers) == torch.cat(dense.answers)).float().mean()),
            recalled=sum(torch.equal(chosen, answer) for chosen, answer in zip(run.answers, answers, strict=True)),
            asked=len(answers),
        )
