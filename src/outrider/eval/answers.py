"""Answers as users get them: `Outrider.generate`, greedily, one engine a case over the same models.

Every method, dense included, runs the engine's own loop: the prompt, question and all, is read densely, the answer is written
in speculative rounds. Prompts that begin alike are read once: what the last one and the next have in common is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from outrider.config import Budget, EngineConfig, SamplingParams
from outrider.decoding.outrider import Outrider, Prompt
from outrider.decoding.prefill import read_chunk
from outrider.decoding.statistics import total
from outrider.errors import EngineError, OptionError, PromptError
from outrider.eval.rows import DENSE, Case
from outrider.eval.teacher_forced import budget_of, check_generates
from outrider.guidance.alignment import AlignmentFile
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
        memory = PromptMemory()
        self._engines = []
        for case in cases:
            check_generates(case)
            if case.method != DENSE and alignments is None:
                raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair")
            config = EngineConfig(
                mode="dense" if case.method == DENSE else "sparse",
                method=EngineConfig().method if case.method == DENSE else case.method,
                budget=Budget() if case.method == DENSE else budget_of(case),
                draft_tokens=draft_tokens,
                score_keys=score_keys,
                batch_size=1,  # prompts one after another: memory for one, and what they share is read once
                prefill_chunk=prefill_chunk,
                kv_dtype=pair[0].spec.kv_dtype,
                eager=True,  # answers are short: to capture rounds for each case and prompt would take longer than to run them
                audit=True,
                backend=pair[0].backend,
            )
            self._engines.append(Outrider(*pair, config, alignments, case.map or map_name, read=memory.read))

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
        _copy(last.cache, cache, start, known)
        cache.advance(known - start)
        if known == stop:
            return
        read_chunk(model, cache, tokens[:, known - start :], stop)
        _copy(cache, last.cache, known, stop)
        last.tokens[known:] = given[known - start :]

    def _widened(self, last: _Prompt | None, model: LanguageModel, capacity: int) -> _Prompt:
        """The same with room for `capacity` tokens."""
        wider = _Prompt(tokens=[] if last is None else last.tokens, cache=model.new_cache(1, capacity))
        if last is not None:
            _copy(last.cache, wider.cache, 0, len(last.tokens))
        return wider


def _copy(source: KVCache, target: KVCache, start: int, stop: int) -> None:
    """Rows start .. stop - 1 of every layer."""
    for layer in range(len(source.layers)):
        target.keys(layer, stop)[:, start:] = source.keys(layer, stop)[:, start:]
        target.values(layer, stop)[:, start:] = source.values(layer, stop)[:, start:]


def counter(model: LanguageModel) -> Callable[[str], int]:
    """Counts the tokens of a prompt as the model's tokenizer makes them. Raises PromptError where there is none."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise PromptError(f"{model.spec.name!r} has no tokenizer to read texts with; allowed: a checkpoint with one")
    return lambda text: len(tokenizer(text, verbose=False)["input_ids"])
