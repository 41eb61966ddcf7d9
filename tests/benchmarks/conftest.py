"""Make `benchmarks/` importable, and share tiny cases, a clock that needs no GPU, and a bench for the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.kernels.attention_mass import AttentionMass  # noqa: E402
from benchmarks.kernels.block_mass import BlockMass  # noqa: E402
from benchmarks.kernels.case import Case  # noqa: E402
from benchmarks.kernels.chunk_attention import ChunkAttention  # noqa: E402
from benchmarks.kernels.dense_attention import DenseAttention  # noqa: E402
from benchmarks.kernels.quantized_keys import QuantizedMass  # noqa: E402
from benchmarks.kernels.run import Bench  # noqa: E402
from benchmarks.kernels.sparse_attention import SparseAttention  # noqa: E402
from benchmarks.kernels.token_select import TokenSelect  # noqa: E402
from benchmarks.kernels.unlisted_mass import UnlistedMass  # noqa: E402
from benchmarks.timing import Call, Timing  # noqa: E402

HEADS = {"Hq": 8, "Hkv": 2, "D": 16}
TINY: tuple[Case, ...] = (
    SparseAttention(id="sparse_attention-tiny", S=200, B=2, **HEADS),
    SparseAttention(id="sparse_attention-tiny-separate", S=200, B=2, separate=True, **HEADS),
    SparseAttention(id="sparse_attention-tiny-fp8", S=200, B=1, fp8=True, **HEADS),
    DenseAttention(id="dense_attention-tiny-separate", S=200, B=2, separate=True, **HEADS),
    TokenSelect(id="token_select-tiny-top_k", R=8, S=2000),
    TokenSelect(id="token_select-tiny-top_p", R=8, S=2000, budget="top_p"),
    TokenSelect(id="token_select-tiny-merge4-top_k", R=16, S=2000, G=4),
    TokenSelect(id="token_select-tiny-merge4-fp32-top_k", R=16, S=2000, G=4, dtype=torch.float32),
    AttentionMass(id="attention_mass-tiny", S=200, B=2, **HEADS),
    AttentionMass(id="attention_mass-tiny-interleaved", S=200, B=2, interleaved=True, **HEADS),
    BlockMass(id="block_mass-tiny", S=200, B=2, T=11, block=4, **HEADS),
    BlockMass(id="block_mass-tiny-computed", S=200, B=2, T=11, block=4, known=False, **HEADS),
    QuantizedMass(id="quantized_mass-tiny-4bit", S=200, B=2, L=2, **(HEADS | {"D": 64})),
    QuantizedMass(id="quantized_mass-tiny-2bit", S=200, B=2, L=2, bits=2, **(HEADS | {"D": 64})),
    UnlistedMass(id="unlisted_mass-tiny", R=8, S=200),
    UnlistedMass(id="unlisted_mass-tiny-merge4", R=16, S=200, G=4),
    ChunkAttention(id="chunk_attention-tiny-keep10", S=200, B=2, T=90, block=40, **HEADS),
    ChunkAttention(id="chunk_attention-tiny-dense", S=200, B=2, T=90, keep=0, **HEADS),
)


class Clock:
    """Runs the calls; says what `answers` holds for them in turn, microseconds per call."""

    def __init__(self, answers: Sequence[float] = (10.0,), graph: bool = True) -> None:
        self.answers, self.graph = answers, graph
        self.asked: list[int] = []  # calls of each question

    def time(self, calls: Sequence[Call], *, eager: bool = False) -> Timing:
        for call in calls:
            call()
        us = self.answers[len(self.asked) % len(self.answers)]
        self.asked.append(len(calls))
        return Timing(us, us - 1, self.graph or not eager)


@pytest.fixture(params=TINY, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def clock() -> type[Clock]:
    return Clock


@pytest.fixture
def notes() -> list[str]:
    """What a run said."""
    return []


@pytest.fixture
def make_bench(notes: list[str]) -> Callable[..., Bench]:
    """`make_bench(timer, **changes)`: the reference on the CPU, at a streaming rate of 4,000 GB/s."""

    def make(timer=None, **changes) -> Bench:
        given = {"backends": ["reference"], "device": torch.device("cpu"), "conditions": {"stream_gb_s": 4000.0}}
        return Bench(timer=timer or Clock(), note=notes.append, **(given | changes))

    return make
