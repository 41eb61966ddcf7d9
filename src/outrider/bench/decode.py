"""Our own engine under the clock: a few rounds to warm up, then the rounds that count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from outrider.bench.floors import Round, against_floor, stage_bytes
from outrider.bench.options import DecodeOptions, Run
from outrider.bench.results import Row
from outrider.bench.workload import Workload
from outrider.config import MAX_EXACT_EVERY, EngineConfig, SamplingParams, engine_config
from outrider.decoding.confirmation import tail
from outrider.decoding.engine import Engine
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import Statistics, total
from outrider.models.quantized_keys import name_of_bits

Progress = Callable[[str, int, int], None]  # what, done, of how many
PER_ROUND = "cached", "confirmations", "audits"
WORTH = 4096  # tokens of a scripted text in mode auto, which nobody reads: for fewer the draft might not be worth its prompt
WARM_UP = 4  # rounds: run as they are, captured, replayed for the first time; and one more


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The rounds that count: what happened in between, all sequences added up."""

    rounds: int
    tokens: int
    wall: float  # seconds
    before: Statistics
    after: Statistics

    def gain(self, name: str) -> float:
        return float(getattr(self.after, name) - getattr(self.before, name))

    @property
    def chosen(self) -> dict[str, int]:
        """Rounds of all sequences by how they were run."""
        gained = {name: rounds - self.before.chosen.get(name, 0) for name, rounds in self.after.chosen.items()}
        return {name: rounds for name, rounds in gained.items() if rounds}

    @property
    def stages(self) -> dict[str, float]:
        """ms a round, of the stages that ran."""
        spent = {stage: self.after.seconds[stage] - seconds for stage, seconds in self.before.seconds.items()}
        return {stage: 1e3 * seconds / self.rounds for stage, seconds in spent.items() if seconds > 0}


def new_tokens(options: DecodeOptions) -> int:
    """So many that no sequence ends in the measured rounds, or so near behind them that the engine sees it coming."""
    if not {"exact", "auto"} & {*options.mode}:
        return (WARM_UP + options.rounds + 2) * (options.draft_tokens + 1) + 1
    # measured up to where tokens are confirmed; drafted ones may come with them, and a bonus token
    k = options.draft_tokens
    return (WARM_UP + options.rounds + 2 * MAX_EXACT_EVERY) * (k + 1 + tail(k) + 1) + 1


def measure(work: Workload, run: Run, options: DecodeOptions, conditions: Mapping[str, Any], progress: Progress) -> Row:
    """The row of one workload in one mode."""
    config = engine_config(
        mode=run.mode,
        drafting=run.drafting or "dense",
        keep=options.keep,
        allocation=options.allocation,
        unlisted=options.unlisted,
        draft_tokens=options.draft_tokens,
        score_keys=run.scoring or "exact",
        kv_dtype=run.kv_dtype or "auto",
        exact_every=options.exact_every,
        guard_every=options.guard_every,
        guard_tolerance=1.0,
        batch_size=work.batch,
    )
    alignment = work.alignment if config.verifies_sparsely else None
    engine = Engine(work.target, work.draft, config, alignment, predicts=True, **work.seams)
    return _row(work, run, engine, time_rounds(engine, _sequences(work, run, options), options.rounds, progress), conditions)


def time_rounds(engine: Engine, sequences: list[Sequence], rounds: int, progress: Progress) -> Measured:
    """Run all sequences as one batch: `WARM_UP` rounds, then `rounds` by the clock. None of them may end on the way.

    Both are a few more where tokens are emitted some rounds later: the clock starts and stops where some are.
    Raises RuntimeError where a sequence ends.
    """
    events = engine.run(sequences, progress)

    def run_to(round_: int) -> None:
        """Until the sequences, which begin together, have had so many rounds and all events of the last one have come."""
        last = sequences[-1]
        if last.statistics.rounds >= round_:
            return
        for event in events:
            if event.sequence.finish_reason is not None:
                raise RuntimeError(event.sequence.error or f"a sequence has ended: {event.sequence.finish_reason}")
            if event.sequence is last and last.statistics.rounds >= round_:
                return

    def statistics() -> Statistics:
        return total([sequence.statistics for sequence in sequences])

    for done in range(WARM_UP):
        progress("warm up", done, WARM_UP)
        run_to(done + 1)
    progress("warm up", WARM_UP, WARM_UP)  # takes the bar away: nothing is drawn while the clock runs
    before, began = statistics(), time.perf_counter()
    run_to(before.rounds // len(sequences) + rounds)
    wall, after = time.perf_counter() - began, statistics()
    return Measured(
        rounds=(after.rounds - before.rounds) // len(sequences),
        tokens=after.generated_tokens - before.generated_tokens,
        wall=wall,
        before=before,
        after=after,
    )


def _sequences(work: Workload, run: Run, options: DecodeOptions) -> list[Sequence]:
    count = new_tokens(options)
    if run.mode == "auto" and work.rates is not None:
        count = max(count, WORTH)
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True, seed=seed) for seed in range(work.batch)]
    statistics = [
        Statistics(mode=run.mode, method=None, prompt_tokens=work.context, accepted_at=[0] * options.draft_tokens)
        for _ in work.prompts
    ]
    parts = zip(work.prompts, params, statistics, strict=True)
    return [Sequence(index, prompt, one, None, (), counts) for index, (prompt, one, counts) in enumerate(parts)]


def _row(work: Workload, run: Run, engine: Engine, measured: Measured, conditions: Mapping[str, Any]) -> Row:
    per_row = measured.rounds * work.batch
    kept = measured.gain("listed") / measured.gain("cached")
    stages, round_ms = measured.stages, 1e3 * measured.wall / measured.rounds
    auto = run.mode == "auto"  # whose rounds differ, so that they have no floor in common
    return Row(
        case=work.name,
        engine=run.engine,
        mode=run.mode,
        drafting=run.drafting,
        scoring=run.scoring,
        kv_dtype=run.kv_dtype,
        parallel=run.parallel,
        context=work.context,
        batch=work.batch,
        tokens_per_second=measured.tokens / measured.wall,
        acceptance=_acceptance(work, run, measured, per_row) | _confirmation(work, engine.config, measured),
        round_ms=round_ms,
        predicted_ms=1e3 * measured.gain("predicted_seconds") / measured.rounds or None,
        chosen=measured.chosen if auto else {},
        host_ms=round_ms - sum(stages.values()),
        stages=stages,
        floors={} if auto else _floors(work, engine, measured, kept, conditions["stream_gb_s"]),
        kept=kept,
        conditions={
            **conditions,
            "score_keys": name_of_bits(engine.guidance.bits if engine.guidance is not None else None),
            "kv_dtype": engine.config.kv_dtype,
            "allocation": engine.config.budget.allocation,
            "unlisted": engine.config.budget.unlisted,
            "guard_every": engine.config.guard_every if engine.config.guards else None,
            "fused_layers": [len(model.fused_layers) for model in (engine.target, engine.draft)],
        },
    )


def _floors(work: Workload, engine: Engine, measured: Measured, kept: float, rate: float | None) -> dict[str, Any]:
    per_row = measured.rounds * work.batch
    reads = _reads(engine, work.batch, kept, {name: measured.gain(name) / per_row for name in PER_ROUND})
    counted = stage_bytes(engine.target.spec, engine.draft.spec, work.weights, reads)
    return {stage: against_floor(counted[stage], ms, rate) for stage, ms in measured.stages.items() if counted[stage]}


def _reads(engine: Engine, batch: int, kept: float, counted: Mapping[str, float]) -> Round:
    """What a round of this engine reads; `counted`: means of a sequence's round."""
    config, draft, cached = engine.config, engine.draft.spec, counted["cached"]
    if config.mode == "plain":
        return Round(batch=batch, cached=cached, draft_tokens=0)
    half = draft.device.type == "cuda" and draft.dtype == torch.bfloat16  # see decoding.scoring
    lists = config.draft_budget
    return Round(
        batch=batch,
        cached=cached,
        draft_tokens=config.draft_tokens,
        kept=kept if config.verifies_sparsely else None,
        draft_listed=max(config.draft_keep * cached, lists.sinks + lists.recent) if config.drafts_sparsely else None,
        scored_layers=engine.guidance.layers if engine.guidance is not None else (),
        score_bits=engine.guidance.bits if engine.guidance is not None else None,
        mass_bytes=2 if half else 4,
        confirmations=counted["confirmations"],
        tail=tail(config.draft_tokens),
        audits=counted["audits"],
    )


def _acceptance(work: Workload, run: Run, measured: Measured, rounds: int) -> dict[str, Any]:
    """`rounds`: of all sequences together."""
    kind = "none" if run.mode == "plain" else "real" if work.rates is None else "scripted"
    gains = zip(measured.before.accepted_at, measured.after.accepted_at, strict=True)
    seen = [(after - before) / rounds for before, after in gains]
    rates = {"none": [], "real": seen, "scripted": list(work.rates or ())}[kind]
    return {"kind": kind, "rates": rates, "tokens_per_round": measured.tokens / rounds}


def _confirmation(work: Workload, config: EngineConfig, measured: Measured) -> dict[str, Any]:
    """What became of tentative tokens; nothing where there were none."""
    confirmations = measured.gain("confirmations")
    if not confirmations:
        return {}
    return {
        "agreement": work.agreement,  # as scripted; None: real
        "exact_every": config.exact_every,
        "tentative_per_confirmation": measured.gain("tentative") / confirmations,
        "confirmed_per_confirmation": measured.gain("confirmed") / confirmations,
    }
