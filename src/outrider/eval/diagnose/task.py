"""The task: given text through the stages of generation, beside a dense reading; then generation behind the same prefix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from outrider.config import SamplingParams, check
from outrider.decoding.outrider import Outrider
from outrider.decoding.prefill import ProgressCallback, ReadChunk
from outrider.errors import EngineError
from outrider.eval.answers import copy_rows, make_engine
from outrider.eval.diagnose.lists import ListFigures, dense_mass, means
from outrider.eval.diagnose.rows import ROUNDS, TARGET, Acceptance, Diagnosis, Disagreement, Heads, Overlap
from outrider.eval.rows import DENSE, Case, Text, conditions
from outrider.eval.teacher_forced import TeacherForced, budget_of, check_context, make_selector, tokenize
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.rivals import Rival
from outrider.guidance.selectors.base import Selector
from outrider.models import KVCache, LanguageModel
from outrider.models.quantized_keys import code_bits


def evaluate(
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    texts: list[Text],
    cases: list[Case],
    *,
    context: int,
    scored_tokens: int,
    draft_tokens: int = 4,
    score_keys: str = "auto",
    map_name: str | None = None,
    prefill_chunk: int = 2048,
    progress: ProgressCallback | None = None,
) -> Iterator[Diagnosis]:
    """Diagnose every case on the last `scored_tokens` of the first `context` tokens of every text.

    Of each (text, case) yields a Disagreement; with lists, Heads and two Overlaps; and the Acceptance of as many tokens,
    written greedily behind the same prefix. All options are checked before any work: OptionError, PromptError.
    """
    least = draft_tokens + 2  # tokens of two rounds
    check("scored-tokens", scored_tokens, least <= scored_tokens < context, f"{least} .. context - 1 = {context - 1}")
    check_context(context, pair, 2)
    bits = code_bits(score_keys, pair[1], draft_tokens + 1)
    selectors = [make_selector(case, pair, alignments, map_name, draft_tokens, bits) for case in cases]
    prefix = context - scored_tokens - 1
    for case in cases:
        if case.method != DENSE:
            shortest = budget_of(case).min_context
            allowed = f"at most {prefix}, the tokens before the scored ones, so that all rounds have lists"
            check("min-context", shortest, shortest <= prefix, allowed)
    documents = [(text.name, tokenize(pair[0], text.name, text.text, context)) for text in texts]
    reader = TeacherForced(pair, context, draft_tokens, bits)
    options = {"draft_tokens": draft_tokens, "score_keys": score_keys, "prefill_chunk": prefill_chunk}
    engines = [make_engine(case, pair, alignments, map_name, _copying(reader), **options) for case in cases]
    common = conditions(pair, draft_tokens, map_name, bits)

    def rows() -> Iterator[Diagnosis]:
        for name, tokens in documents:
            reader.read([tokens[:prefix]], prefill_chunk, progress)
            twin = reader.dense_twin()
            for done, (case, selector, engine) in enumerate(zip(cases, selectors, engines, strict=True), start=1):
                about = {
                    "text": name,
                    "method": case.method,
                    "keep": case.budget.keep if case.budget else None,
                    "top_p": case.budget.top_p if case.budget else None,
                    "context": context,
                    "conditions": common,
                }
                yield from _given(reader, twin, tokens[prefix:-1], selector, about)
                yield _generated(engine, tokens[: prefix + 1], scored_tokens, about)
                if progress is not None:
                    progress(f"diagnose {name}", done, len(cases))
            del twin  # before the next one is made

    return rows()


def _given(
    reader: TeacherForced, twin: TeacherForced, tokens: list[int], selector: Selector | Rival | None, about: dict[str, Any]
) -> Iterator[Diagnosis]:
    """What reading `tokens` by lists shows; both readers take every round, so that each holds its own keys of it."""
    figures = ListFigures()
    listed = cached = read = dense_read = differ = 0.0
    readings = reader.rounds([tokens], selector, record=True), twin.rounds([tokens], None, record=True)
    for sparse, dense in zip(*readings, strict=True):
        if sparse.lists is not None:
            figures.add(sparse.lists, dense_mass(twin.target, twin.caches[0], dense))
        [reads] = sparse.reads
        listed, cached = listed + reads.listed, cached + sparse.cached
        read, dense_read = read + reads.bytes_read, dense_read + reads.bytes_dense
        differ += int((sparse.logits.argmax(-1) != dense.logits.argmax(-1)).sum())
    yield Disagreement(
        **about,
        kept_fraction=listed / cached,
        kv_read_fraction=read / dense_read,
        disagreement=differ / len(tokens),
        scored_tokens=len(tokens),
    )
    if figures.recall:
        layers, recall = means(figures.recall)
        yield Heads(**about, layers=layers, recall=recall)
        for between, found in ((ROUNDS, figures.with_previous), (TARGET, figures.with_target)):
            layers, overlap = means(found)
            yield Overlap(**about, between=between, layers=layers, overlap=overlap)


def _generated(engine: Outrider, prompt: list[int], count: int, about: dict[str, Any]) -> Acceptance:
    """How far drafts get in `count` tokens behind the prompt. Raises EngineError where the run fails."""
    [result] = engine.generate(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True))
    if result.error is not None:
        raise EngineError(f"{about['method']}: {result.error}")
    run = result.statistics
    shares = [accepted / run.rounds for accepted in run.accepted_at]
    drafting = {"drafting": run.drafting or "none"}
    return Acceptance(**about | {"conditions": about["conditions"] | drafting}, by_position=shares, rounds=run.rounds)


def _copying(reader: TeacherForced) -> ReadChunk:
    """Reads a prompt that begins like what `reader` holds: its keys and values are there already."""
    held = {id(model.module): cache for model, cache in zip(reader.models, reader.caches, strict=True)}

    def read(model: LanguageModel, cache: KVCache, tokens: Tensor, stop: int) -> None:
        copy_rows(held[id(model.module)], cache, stop - tokens.shape[1], stop)
        cache.advance(tokens.shape[1])

    return read
