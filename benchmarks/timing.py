"""How kernels are timed: replay of a CUDA graph, with a cold L2 cache, between two events.

One iteration queues, without waiting for the device:

    flush    512 MB are read. Reading, not writing: dirty lines would be written back during the measured interval.
    start    event
    replay   the graph: one call, or several calls one after the other
    stop     event

The host must have queued the replay before the device reaches `start`, or the interval holds the host's time too. That is
checked, not hoped for: right after the replay was queued, `start` must not have happened yet. Iterations where it had are
thrown away; where more than a fifth had, all is done again with twice as many flushes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
FLUSH_BYTES = 512 * 2**20
WARM_UP, MAX_FLUSHES, PUNCTUAL = 3, 32, 0.8


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds per call."""

    us: float  # median over the iterations
    us_min: float
    graph: bool = True  # False: launched call by call, since it could not be captured


class Timer(Protocol):
    def time(self, calls: Sequence[Call], *, eager: bool = False) -> Timing:
        """Time per call of `calls`, run one after the other. With `eager`, what cannot be captured is launched directly."""
        ...


class GraphTimer:
    """The timer described above, for one CUDA device."""

    def __init__(self, device: torch.device, iterations: int = 50) -> None:
        from outrider.bench.stream import triton as stream

        self.iterations = iterations
        buffer = torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._flush: Call = partial(stream.read, buffer, stream.sums(device))
        self._flush()
        torch.cuda.synchronize()

    def time(self, calls: Sequence[Call], *, eager: bool = False) -> Timing:
        launch, captured = self._prepare(calls, eager)
        launch()  # the first replay uploads the graph
        torch.cuda.synchronize()
        flushes = 1
        while len(times := self._punctual(launch, flushes)) < PUNCTUAL * self.iterations:
            flushes *= 2
            if flushes > MAX_FLUSHES:
                raise RuntimeError(f"the host takes longer to launch this than {MAX_FLUSHES} flushes last")
        return Timing(statistics.median(times) / len(calls), min(times) / len(calls), captured)

    def _prepare(self, calls: Sequence[Call], eager: bool) -> tuple[Call, bool]:
        """What launches all the calls, and whether it is a graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception:
            if not eager:
                raise
            torch.cuda.synchronize()
            return lambda: [call() for call in calls], False
        return graph.replay, True

    def _punctual(self, launch: Call, flushes: int) -> list[float]:
        """Microseconds of the iterations that the host queued in time."""
        intervals = []
        for _ in range(self.iterations):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(flushes):
                self._flush()
            start.record()
            launch()
            late = start.query()
            stop.record()
            if not late:
                intervals.append((start, stop))
        torch.cuda.synchronize()
        return [1000 * start.elapsed_time(stop) for start, stop in intervals]


def empty_graph_us(timer: Timer, device: torch.device) -> float:
    """What the method itself costs: a graph of one kernel that changes one number."""
    number = torch.zeros(1, device=device)
    return timer.time([lambda: number.add_(1)]).us
