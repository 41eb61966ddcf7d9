"""Rounds while no sequence runs, over whatever the caches hold: to build, compile and capture them, or to take their time."""

from __future__ import annotations

import torch

from outrider.decoding.confirmation import WIDTH, ConfirmationKind
from outrider.decoding.prefill import ProgressCallback, read_chunk
from outrider.decoding.rounds import RoundKind
from outrider.decoding.runner import Runner
from outrider.decoding.statistics import StageClock
from outrider.models.attention import ROUND


def warm_up(runner: Runner, kind: RoundKind, progress: ProgressCallback) -> None:
    """Two rounds of each sort: what they need is built and captured before the first prompt is read."""
    if not runner.stages.capture or runner.stages.knows(kind):
        return
    for done in range(2):
        progress("compile rounds", done, 2)
        rehearse(runner, kind, 1)
        if runner.audits is not None and kind.sparse:
            rehearse(runner, kind, 1, audited=True)
        for tokens in (ROUND, WIDTH) if runner.confirms and kind.sparse else ():
            rehearse_confirmation(runner, kind, 1, min(tokens, runner.tentative.width))
    runner.clear(slice(None))
    progress("compile rounds", 2, 2)


def rehearse(runner: Runner, kind: RoundKind, cached: int, *, audited: bool = False) -> dict[str, float]:
    """A round of rows of `cached` tokens each, an `audited` one or another; seconds by stage."""
    clock = _begin(runner, cached)
    if runner.quantized is not None and kind.sparse:
        runner.quantized.rows(0, kind.rows).fill(runner.caches[1].rows(0, kind.rows))
    runner.run_stages(kind, clock, audited=audited)
    return clock.settle()


def rehearse_confirmation(runner: Runner, kind: RoundKind, cached: int, tokens: int) -> dict[str, float]:
    """A confirmation of so many tokens a row, behind a round that gives the draft its lists."""
    lists = runner.drafting
    if kind.sparse and lists is not None and bool((lists.lengths[: kind.rows] != cached).any()):
        rehearse(runner, kind, cached)
    clock = _begin(runner, cached)
    width = runner.tentative.width_of(max(tokens - 1 - runner.tentative.tail, 0))
    runner.run_confirmation(ConfirmationKind(round=kind, width=width, listed=kind.sparse), cached + width, clock)
    return clock.settle()


def rehearse_reading(runner: Runner, cached: int, tokens: int) -> dict[str, float]:
    """The draft reads so many tokens of one row."""
    assert runner.draft is not None
    clock, cache = _begin(runner, cached), runner.caches[1].rows(0, 1)
    with clock.stage("prefill"):
        read_chunk(runner.draft.uncompiled(), cache, torch.zeros(1, tokens, dtype=torch.int64), cached + tokens)
    return clock.settle()


def _begin(runner: Runner, cached: int) -> StageClock:
    runner.tentative.clear(slice(None))
    for cache in runner.caches:
        cache.lengths.fill_(cached)
    return StageClock(runner.device)
