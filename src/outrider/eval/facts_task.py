"""Task "facts": six-digit facts planted in a long text, each asked for at its end; recalled means every digit right."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from outrider.config import check
from outrider.decoding.prefill import ProgressCallback
from outrider.errors import OptionError
from outrider.eval.facts import Fact, draw_facts
from outrider.eval.rows import Case, Row, Text, conditions, of_case
from outrider.eval.teacher_forced import TeacherForced, budget_of, check_context, make_selector, tokenize
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.channels import ChannelFile
from outrider.guidance.controller import ControllerFile
from outrider.guidance.rivals import Rival
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel
from outrider.models.quantized_keys import code_bits

Question = tuple[list[int], list[int]]  # tokens of the question up to "Answer:", tokens of the answer


def evaluate(
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    texts: list[Text],
    cases: list[Case],
    *,
    context: int,
    draft_tokens: int = 4,
    score_keys: str = "auto",
    map_name: str | None = None,
    channels: ChannelFile | None = None,
    controller: ControllerFile | None = None,
    prefill_chunk: int = 2048,
    progress: ProgressCallback | None = None,
    facts: int = 20,
    seed: int | str = 0,
) -> Iterator[Row]:
    """Plant `facts` facts at random places of each text and ask for each; yields one row per (text, case).

    The text is read densely, the question and the answer's digits in rounds. A fact counts as recalled when every token of the
    answer is the most probable one, which is when greedy decoding would write it. agreement is the share of the answers'
    tokens where the dense target chooses the same. All options are checked before any work: OptionError, PromptError.
    """
    check("facts", facts, facts >= 1, "a whole number >= 1")
    check_context(context, pair, 2)
    bits = code_bits(score_keys, pair[1], draft_tokens + 1)
    learned = channels, controller
    selectors = [make_selector(case, pair, alignments, map_name, draft_tokens, bits, *learned) for case in cases]
    documents = []
    for number, text in enumerate(texts):
        rng = random.Random(f"{seed} {context} {number}")
        tokens = tokenize(pair[0], text.name, text.text, context)
        documents.append((text.name, *plant(pair[0], tokens, draw_facts(rng, facts), rng)))

    common = conditions(pair, draft_tokens, map_name, bits)

    def rows() -> Iterator[Row]:
        reader = TeacherForced(pair, context, draft_tokens, bits)
        for name, tokens, questions in documents:
            reader.read([tokens], prefill_chunk, progress)
            dense = _ask(reader, questions, None, 0)
            for done, (case, selector) in enumerate(zip(cases, selectors, strict=True), start=1):
                asked = dense if selector is None else _ask(reader, questions, selector, budget_of(case).min_context)
                if progress is not None:
                    progress(f"ask {name}", done, len(cases))
                yield Row(
                    task="facts",
                    text=name,
                    method=case.method,
                    keep=case.budget.keep if case.budget else None,
                    top_p=case.budget.top_p if case.budget else None,
                    context=context,
                    scored_tokens=sum(len(answer) for _, answer in questions),
                    agreement=float((torch.cat(asked.choices) == torch.cat(dense.choices)).float().mean()),
                    recalled=sum(
                        bool((chosen == torch.tensor(answer)).all())
                        for chosen, (_, answer) in zip(asked.choices, questions, strict=True)
                    ),
                    asked=len(questions),
                    kept_fraction=asked.kept_fraction,
                    kv_read_fraction=asked.kv_read_fraction,
                    seconds=asked.seconds,
                    conditions=of_case(common, case),
                )

    return rows()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """All questions of one document, asked one by one behind the same text."""

    choices: list[torch.Tensor]  # per question the most probable token at each of the answer's places
    kept_fraction: float
    kv_read_fraction: float
    seconds: float


def _ask(reader: TeacherForced, questions: list[Question], selector: Selector | Rival | None, min_context: int) -> _Asked:
    runs = [reader.run([[*question, *answer][:-1]], selector, min_context)[0] for question, answer in questions]
    return _Asked(
        choices=[run.logits[-len(answer) :].argmax(-1).cpu() for run, (_, answer) in zip(runs, questions, strict=True)],
        kept_fraction=sum(run.kept_fraction for run in runs) / len(runs),
        kv_read_fraction=sum(run.kv_read_fraction for run in runs) / len(runs),
        seconds=sum(run.seconds for run in runs),
    )


def plant(model: LanguageModel, tokens: list[int], facts: list[Fact], rng: random.Random) -> tuple[list[int], list[Question]]:
    """Write the facts' statements over `tokens` at random places that do not overlap.

    Returns the text, cut so that the longest question and its answer have room behind it, and, per fact, the tokens of its
    question and of its answer. Raises OptionError when the text is too short for that many facts.
    """

    tokenizer: Any = model.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    questions = []
    for fact in facts:
        question, whole = encode(fact.question), encode(fact.question + fact.answer)
        together = whole[: len(question)] == question
        questions.append((question, whole[len(question) :] if together else encode(fact.answer)))
    room = max(len(question) + len(answer) for question, answer in questions)
    text = tokens[: max(0, len(tokens) - room)]
    statements = [encode(fact.statement) for fact in facts]
    free = len(text) - sum(map(len, statements))
    if free < 0:
        raise OptionError("facts", len(facts), f"as many as fit into a context of {len(tokens)} tokens")
    gaps = sorted(rng.randint(0, free) for _ in statements)
    planted = 0
    for gap, statement in zip(gaps, statements, strict=True):
        text[gap + planted : gap + planted + len(statement)] = statement
        planted += len(statement)
    return text, questions
