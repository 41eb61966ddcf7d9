"""Stages as CUDA graphs: run once to warm up, then captured, then replayed without the host.

A captured stage reads and writes the same memory at every replay. What it needs comes from tensors that stay where they are:
the caches, the inputs of the round, the results of the captured stages before it. Its own result stays in place, too, until the
next replay.

Stages of one name share memory, those of two names none. A stage that not every round has is captured behind others, and runs
before them: in their memory its result would lie where they have what they need on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(slots=True)
class _Variant:
    """The stages of one kind of round."""

    warm: set[str] = field(default_factory=set)  # that have run as they are
    stages: dict[str, tuple[torch.cuda.CUDAGraph, Any]] = field(default_factory=dict)


class Stages:
    """Runs the stages of rounds, as graphs or, with `capture` off, as they are.

    A round is of one *kind*: what decides shapes and branches on the host. A stage of a kind first runs as it is, which lets
    kernels be built and libraries be set up; the second time it is captured. Other lengths, tokens and lists need no new
    capture.
    """

    def __init__(self, *, capture: bool) -> None:
        self.capture = capture
        self._variants: dict[Hashable, _Variant] = {}
        self._current = _Variant()
        self._pools: dict[str, Any] = {}  # by the name of a stage

    def begin(self, kind: Hashable) -> None:
        """A round of this kind starts."""
        self._current = self._variants.setdefault(kind, _Variant())

    def knows(self, kind: Hashable) -> bool:
        """Rounds of this kind are captured already."""
        return kind in self._variants and bool(self._variants[kind].stages)

    def run(self, name: str, function: Callable[[], Result]) -> Result:
        """The stage's result. `function` must not wait for the device."""
        if not self.capture:
            return function()
        if name not in self._current.warm:
            self._current.warm.add(name)
            return function()
        if name not in self._current.stages:
            self._current.stages[name] = self._record(name, function)
        graph, result = self._current.stages[name]
        graph.replay()
        return result

    def _record(self, name: str, function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        if name not in self._pools:
            self._pools[name] = torch.cuda.graph_pool_handle()
        # thread_local: NCCL has a thread of its own that asks the device how collectives go
        with torch.cuda.graph(graph, pool=self._pools[name], capture_error_mode="thread_local"):
            result = function()
        return graph, result
