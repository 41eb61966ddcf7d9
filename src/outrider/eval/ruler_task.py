"""Task "ruler": RULER's synthetic families; what answers hold of what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outrider.decoding.prefill import ProgressCallback
from outrider.eval.answers import Answering, counter
from outrider.eval.book import Book
from outrider.eval.rows import Case, Row, Text, conditions, of_case
from outrider.eval.ruler.families import FAMILIES, check_ruler, make_samples
from outrider.eval.teacher_forced import check_context
from outrider.guidance.alignment import AlignmentFile
from outrider.models import LanguageModel
from outrider.models.quantized_keys import code_bits


def evaluate(
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    texts: list[Text],
    cases: list[Case],
    *,
    context: int,
    families: Sequence[str] = tuple(FAMILIES),
    samples: int = 5,
    style: str = "ruler",
    seed: int = 0,
    draft_tokens: int = 4,
    score_keys: str = "auto",
    map_name: str | None = None,
    prefill_chunk: int = 2048,
    progress: ProgressCallback | None = None,
) -> Iterator[Row]:
    """Make `samples` samples of every family from every text; yields one row per (text, family, sample, case).

    A sample and its answers take at most `context` tokens. recalled is how many of the strings asked for the greedy answers
    hold (of planted facts: begin with), agreement the share of the answers' tokens that the dense target, given the same text,
    would also have chosen. All options are checked before any work: OptionError, PromptError.
    """
    check_ruler(families, style, samples)
    check_context(context, pair, 2)
    count = counter(pair[0])
    answering = Answering(
        pair,
        alignments,
        cases,
        draft_tokens=draft_tokens,
        score_keys=score_keys,
        map_name=map_name,
        prefill_chunk=prefill_chunk,
    )
    made = []
    for text in texts:
        book = Book(text.text)
        for family in families:
            one = make_samples(text.name, book, family, count, context=context, samples=samples, style=style, seed=seed)
            made += [(f"{text.name} {number}", family, sample) for number, sample in enumerate(one, start=1)]
    common = conditions(pair, draft_tokens, map_name, code_bits(score_keys, pair[1], draft_tokens + 1)) | {
        "style": style,
        "seed": seed,
    }

    def rows() -> Iterator[Row]:
        for done, (name, family, sample) in enumerate(made, start=1):
            for number, case in enumerate(cases):
                answers = answering.answer(number, sample.prompts, sample.new_tokens)
                yield Row(
                    task="ruler",
                    part=family,
                    text=name,
                    method=case.method,
                    keep=case.budget.keep if case.budget else None,
                    top_p=case.budget.top_p if case.budget else None,
                    context=context,
                    scored_tokens=answers.tokens,
                    agreement=answers.agreement,
                    recalled=sample.recalled(answers.texts),
                    asked=sample.asked,
                    kept_fraction=answers.kept_fraction,
                    kv_read_fraction=answers.kv_read_fraction,
                    seconds=answers.seconds,
                    conditions=of_case(common, case),
                )
            if progress is not None:
                progress("ruler", done, len(made))

    return rows()
