"""One case after the other: inputs, check, and only then the clock."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import peers
from benchmarks.kernels.case import Case
from benchmarks.kernels.rows import STREAM, Row, best_peer
from benchmarks.timing import Timer

COPIES = 8  # input sets of a chain: as many layers of a decode graph, each with its own memory
# what an op says about a backend that does not take its arguments, or that it does not have
CANNOT_RUN = ("cannot run this call", "backend: expected one of")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all cases of a run share."""

    backends: Sequence[str]
    timer: Timer
    device: torch.device
    conditions: Mapping[str, Any]  # "stream_gb_s" among them
    missing: Mapping[str, str] = field(default_factory=dict)  # option of a peer -> why it is not there, "" if it is
    chained: bool = True
    note: Callable[[str], None] = print


def measure(case: Case, bench: Bench) -> tuple[list[Row], bool]:
    """The rows of one case, and whether all went well: a wrong result or an error makes no row and is noted."""
    try:
        rows, well = _measure(case, bench)
    except Exception as error:
        bench.note(f"{case.id}: FAILED: {_text(error)}")
        rows, well = [], False
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows, well


def _measure(case: Case, bench: Bench) -> tuple[list[Row], bool]:
    sets = [case.inputs(bench.device, copy) for copy in range(COPIES if bench.chained else 1)]
    errors: dict[str, float] = {}
    well = True
    for backend in bench.backends:
        try:
            error = case.error(sets[0], case.run(sets[0], backend))
        except Exception as problem:
            if any(said in str(problem) for said in CANNOT_RUN):
                bench.note(f"{case.id}: left out: {problem}")
            else:
                bench.note(f"{case.id}: {backend} FAILED: {_text(problem)}")
                well = False
            continue
        if error <= case.tolerance:  # NaN is not
            errors[backend] = error
        else:
            bench.note(f"{case.id}: {backend} FAILED: wrong result: error {error:.3g}, allowed {case.tolerance:g}")
            well = False
    if not errors:
        return [], well
    times, chained = _peers(case, sets, bench)
    rows = []
    for backend, error in errors.items():
        try:
            rows.append(_row(case, backend, error, sets, bench, times, chained))
        except Exception as problem:
            bench.note(f"{case.id}: {backend} FAILED: {_text(problem)}")
            well = False
    return rows, well


def _row(
    case: Case,
    backend: str,
    error: float,
    sets: Sequence[Any],
    bench: Bench,
    times: dict[str, float],
    chained: dict[str, float],
) -> Row:
    calls = [lambda inputs=inputs: case.run(inputs, backend) for inputs in sets]
    timing = bench.timer.time(calls[:1])
    gb, key_bytes, rate = case.fewest_bytes(sets[0]) / 1e9, case.key_bytes(sets[0]), bench.conditions["stream_gb_s"]
    gb_s = gb / timing.us * 1e6
    best, operations = best_peer(times), case.operations(sets[0])
    if key_bytes is not None:
        times = times | {STREAM: key_bytes / 1e3 / rate}
    return Row(
        id=case.id,
        backend=backend,
        us=timing.us,
        us_min=timing.us_min,
        us_chained=bench.timer.time(calls).us if bench.chained else None,
        gb=gb,
        gb_s=gb_s,
        stream_fraction=gb_s / rate,
        key_fraction=None if key_bytes is None else key_bytes / 1e3 / rate / timing.us,
        tflop_s=None if operations is None else operations / 1e6 / timing.us,
        peers=times,
        peers_chained=chained,
        ratio=None if best is None else best[1] / timing.us,
        error=error,
        conditions=dict(bench.conditions),
    )


def _peers(case: Case, sets: Sequence[Any], bench: Bench) -> tuple[dict[str, float], dict[str, float]]:
    """Times of the peers, single and chained; one that is missing, wrong or broken is noted and left out."""
    single: dict[str, float] = {}
    chained: dict[str, float] = {}
    for peer in case.peers():
        if peer.needs and (reason := bench.missing.get(peer.needs, f"{peer.needs} not given")):
            bench.note(f"{case.id}: peer {peer.name} left out: {reason}")
            continue
        try:
            calls = [peer.prepare(inputs) for inputs in sets]
            output = calls[0]()
            if peer.error is not None and not (error := peer.error(sets[0], output)) <= peers.TOLERANCE:
                raise RuntimeError(f"wrong result: error {error:.3g}, allowed {peers.TOLERANCE:g}")
            del output
            timing = bench.timer.time(calls[:1], eager=True)
            single[peer.name + " (eager)" * (not timing.graph)] = timing.us
            if bench.chained:
                timing = bench.timer.time(calls, eager=True)
                chained[peer.name + " (eager)" * (not timing.graph)] = timing.us
        except Exception as error:
            bench.note(f"{case.id}: peer {peer.name} FAILED: {_text(error)}")
    return single, chained


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip()[:2000]
