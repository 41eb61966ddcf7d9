"""Prompts under the clock: a pair with dummy weights reads a prompt chunk by chunk, as the engine does, up to its first token.

    plain    the target alone, densely
    dense    target and draft, densely: what dense speculation begins with
    sparse   the draft densely or from blocks of its own, and the target from lists; or as another method reads a prompt, at
             once, with or without a draft

Seconds are of all chunks and of the last token's logits, which are the first token. Every kind of launch has run before.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from outrider.bench.decode import Progress
from outrider.bench.dummy import random_alignment
from outrider.bench.prefill_floors import stage_work
from outrider.bench.prefill_options import PrefillCase, PrefillOptions, PrefillRun
from outrider.bench.prompts import random_prompts
from outrider.config import EngineConfig
from outrider.decoding.prompt_reader import PromptReader, make_prompt_reader
from outrider.decoding.sparse_prefill import Kept
from outrider.decoding.statistics import StageClock
from outrider.models import KVCache, LanguageModel
from outrider.models.cache import aligned

MIN_CONTEXT = EngineConfig().prefill_min_context  # or a chunk, where that is less


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRow:
    """What reading one prompt took; a failed row says why in `error`."""

    case: str
    engine: str
    mode: str  # plain, dense or sparse
    method: str | None = None  # of mode sparse
    kv_dtype: str | None = None  # of keys and values in the cache: fp8; None: the models' dtype
    context: int  # tokens of the prompt
    seconds: float | None = None  # to the first token, wall clock
    tokens_per_second: float | None = None  # of the prompt
    kept: float | None = None  # share of the tokens before them that blocks read, or of the prompt's tokens that are kept
    stages: dict[str, float] = field(default_factory=dict)  # ms: draft, score, select, target
    # by stage: tflop of products, gb read and written, ms that these take at least, percent of the stage's ms; empty where a
    # method's work is not counted
    floors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    error: str | None = None
    conditions: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Reading:
    """A pair with caches for one prompt, read in one mode."""

    def __init__(
        self, models: tuple[LanguageModel, LanguageModel], case: PrefillCase, run: PrefillRun, options: PrefillOptions
    ):
        self.case, self.chunk = case, options.chunk
        named = [model.with_kv_dtype(run.kv_dtype or "auto") for model in models]
        self.reader = None if run.method is None else make_reader(run.method, named, options)
        readers, ahead = 1 if run.mode == "plain" else 2, 0
        if self.reader is not None:
            readers, ahead = 2 if self.reader.drafts else 1, self.reader.ahead
            self.chunk = case.context if self.reader.whole else options.chunk
        self.rows = [(model, model.new_cache(1, aligned(case.context + ahead))) for model in named[:readers]]
        [prompt] = random_prompts(case.context, 1, models[0].spec.vocabulary)
        self.tokens = torch.tensor([prompt])
        self.kept = Kept()

    @property
    def starts(self) -> range:
        """Where chunks begin."""
        return range(0, self.case.context, self.chunk)

    def warm_up(self) -> None:
        """The first chunks, and the last one behind rows of nothing."""
        for start in dict.fromkeys([*self.starts[:2], self.starts[-1]]):
            self.truncate(start)
            self.read(start, StageClock(self.rows[0][0].spec.device))
        self.truncate(0)
        self.kept = Kept()

    def truncate(self, length: int) -> None:
        for _, cache in self.rows:
            cache.lengths.fill_(length)

    def read(self, start: int, clock: StageClock) -> None:
        """The chunk that begins at `start`; the prompt's last one brings the first token's logits."""
        stop = min(start + self.chunk, self.case.context)
        part, last = self.tokens[:, start:stop], stop == self.case.context
        if self.reader is not None and stop > self.reader.min_context:
            _, lists = self.reader.read(self.rows, part, stop, logits=last, last=1, stage=clock.stage)
            self.kept.add(lists, start, stop)
            return
        for (model, cache), stage in zip(self.rows, ("target", "draft"), strict=False):
            with clock.stage(stage):
                _read_densely(model, cache, part, stop, last)


def make_reader(method: str, models: list[LanguageModel], options: PrefillOptions) -> PromptReader:
    """How `method` reads prompts, our own by a random alignment."""
    target, draft = models
    config = EngineConfig(
        mode="dense",
        prefill_chunk=options.chunk,
        prefill_block=options.block,
        prefill_draft_keep=options.draft_keep,
        prefill_draft_least=options.draft_least,
        prefill_min_context=min(options.chunk, MIN_CONTEXT),
    )
    return make_prompt_reader(method, target, draft, config, options.keep, random_alignment(target.spec, draft.spec))


def _read_densely(model: LanguageModel, cache: KVCache, part: torch.Tensor, stop: int, last: bool) -> None:
    """Only the last position's logits are wanted: all of a chunk's would be gigabytes."""
    body = part[:, :-1] if last else part
    if body.shape[1]:
        model.forward(body, cache, stop=stop - last, logits=False)
        cache.advance(body.shape[1])
    if last:
        model.forward(part[:, -1:], cache, stop=stop)
        cache.advance(1)


def measure(
    models: tuple[LanguageModel, LanguageModel],
    case: PrefillCase,
    run: PrefillRun,
    options: PrefillOptions,
    conditions: Mapping[str, Any],
    progress: Progress,
) -> PrefillRow:
    """The row of one case in one mode."""
    reading = Reading(models, case, run, options)
    progress("warm up", 0, 1)
    reading.warm_up()
    progress("warm up", 1, 1)
    device = models[0].spec.device
    clock = StageClock(device)
    _wait(device)
    began = time.perf_counter()
    for start in reading.starts:
        reading.read(start, clock)
    _wait(device)
    seconds = time.perf_counter() - began
    stages = {stage: 1e3 * spent for stage, spent in clock.settle().items() if spent > 0}
    work = stage_work(models, case.context, reading.reader, reading.kept.fraction, run)
    return PrefillRow(
        case=case.name,
        engine=run.engine,
        mode=run.mode,
        method=run.method,
        kv_dtype=run.kv_dtype,
        context=case.context,
        seconds=seconds,
        tokens_per_second=case.context / seconds,
        kept=reading.kept.fraction,
        stages=stages,
        floors={stage: work[stage].against(ms, conditions) for stage, ms in stages.items() if stage in work},
        conditions=dict(conditions),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
