"""Answers as users get them: `Outrider.generate`, greedily, one engine a case over the same models.

Every method, dense included, runs the engine's own loop: the prompt, question and all, is read densely, the answer is written
in speculative rounds. Prompts that begin alike are read once: what the last one and the next have in common is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from outrider.config import Budget, EngineConfig, SamplingParams, check
from outrider.decoding.outrider import Outrider, Prompt
from outrider.decoding.pair import METHODS
from outrider.decoding.prefill import ReadChunk, read_chunk
from outrider.decoding.statistics import total
from outrider.errors import EngineError, OptionError, PromptError
from outrider.eval.rows import DENSE, Case
from outrider.eval.teacher_forced import budget_of
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.rivals import RIVALS
from outrider.guidance.selectors import SELECTORS
from outrider.models import KVCache, LanguageModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one engine answered to the prompts of one document."""

    texts: list[str]
    tokens: int  # generated
    agreement: float  # share of these that the dense target, given the same text, would also have chosen
    kept_fraction: float
    kv_read_fraction: float
    seconds: float  # of decoding


def make_engine(
    case: Case,
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    map_name: str | None,
    read: ReadChunk,
    **options: Any,
) -> Outrider:
    """The engine of a case, for one prompt after another; `options` are fields of EngineConfig.

    Raises OptionError for an unknown method, a missing alignment, and what the engine refuses.
    """
    check("method", case.method, case.method in (DENSE, *METHODS), ", ".join((DENSE, *METHODS)))
    dense = case.method == DENSE
    if case.method in SELECTORS and alignments is None:
        raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair")
    config = EngineConfig(
        mode="dense" if dense else "sparse",
        method=EngineConfig().method if dense else case.method,
        budget=Budget() if dense else budget_of(case),
        drafting="dense" if case.method in RIVALS else "auto",  # a rival has no scores to draft from
        batch_size=1,  # memory for one, and what prompts share is read once
        kv_dtype=pair[0].spec.kv_dtype,
        eager=True,  # runs are short: to capture rounds for each case and prompt would take longer than to run them
        backend=pair[0].backend,
        **options,
    )
    return Outrider(*pair, config, alignments, case.map or map_name, read=read)


class Answering:
    """The engines of all cases."""

    def __init__(
        self,
        pair: tuple[LanguageModel, LanguageModel],
        alignments: AlignmentFile | None,
        cases: list[Case],
        *,
        draft_tokens: int,
        score_keys: str,
        map_name: str | None,
        prefill_chunk: int,
    ) -> None:
        """Raises OptionError for an unknown method, a missing alignment, and what the engine refuses."""
        self.cases = cases
        options = {"draft_tokens": draft_tokens, "score_keys": score_keys, "prefill_chunk": prefill_chunk, "audit": True}
        read = PromptMemory().read
        self._engines = [make_engine(case, pair, alignments, map_name, read, **options) for case in cases]

    def answer(self, number: int, prompts: Sequence[str], new_tokens: int, stop: tuple[str, ...] = ()) -> Answers:
        """Continue every prompt with the engine of case `number`. Raises EngineError where one fails."""
        engine = self._engines[number]
        given: list[Prompt] = [*prompts]
        results = engine.generate(given, SamplingParams(max_new_tokens=new_tokens, stop=stop))
        for result in results:
            if result.error is not None:
                raise EngineError(f"{self.cases[number].method}: {result.error}")
        run = total([result.statistics for result in results])
        return Answers(
            texts=[result.text for result in results],
            tokens=run.generated_tokens,
            agreement=run.agreement or 0.0,
            kept_fraction=run.kept_fraction,
            kv_read_fraction=run.kv_read_fraction,
            seconds=run.decode_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """The last prompt of a model: its tokens, and their keys and values in a cache of one row."""

    tokens: list[int]
    cache: KVCache


class PromptMemory:
    """Reads prompts like `read_chunk`, but copies what the last prompt of the same model began with, too.

    Holds the keys and values of one prompt beside the cache that is in use. For prompts read one after another.
    """

    def __init__(self) -> None:
        self._last: dict[int, _Prompt] = {}  # by module: engines have copies of a model over the same one

    def read(self, model: LanguageModel, cache: KVCache, tokens: Tensor, stop: int) -> None:
        """Put `tokens` [1, T] into `cache`, which holds `stop` tokens afterwards."""
        key, start, given = id(model.module), stop - tokens.shape[1], tokens[0].tolist()
        last = self._last.get(key)
        if last is None or last.cache.capacity < stop:
            last = self._last[key] = self._widened(last, model, cache.capacity)
        # up to `start` both are equal: a chunk that differs ends what is remembered
        same = [a == b for a, b in zip(last.tokens[start:stop], given, strict=False)]
        known = start + [*same, False].index(False)
        copy_rows(last.cache, cache, start, known)
        cache.advance(known - start)
        if known == stop:
            return
        read_chunk(model, cache, tokens[:, known - start :], stop)
        copy_rows(cache, last.cache, known, stop)
        last.tokens[known:] = given[known - start :]

    def _widened(self, last: _Prompt | None, model: LanguageModel, capacity: int) -> _Prompt:
        """The same with room for `capacity` tokens."""
        wider = _Prompt(tokens=[] if last is None else last.tokens, cache=model.new_cache(1, capacity))
        if last is not None:
            copy_rows(last.cache, wider.cache, 0, len(last.tokens))
        return wider


def copy_rows(source: KVCache, target: KVCache, start: int, stop: int) -> None:
    """Rows start .. stop - 1 of every layer, from one cache to another."""
    for layer in range(len(source.layers)):
        target.keys(layer, stop)[:, start:] = source.keys(layer, stop)[:, start:]
        target.values(layer, stop)[:, start:] = source.values(layer, stop)[:, start:]


def counter(model: LanguageModel) -> Callable[[str], int]:
    """Counts the tokens of a prompt as the model's tokenizer makes them. Raises PromptError where there is none."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PromptError(f"{model.spec.name!r} has no tokenizer to read texts with; allowed: a checkpoint with one")
    return lambda text: len(tokenizer(text, verbose=False)["input_ids"])
