"""How fast a device reads its memory, or multiplies matrices, when it does nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Call = Callable[[], Any]
STREAM_BYTES = 4 * 2**30
MATRIX = 8192


def stream_rate(device: torch.device, repeats: int = 10) -> float:
    """GB/s (10^9 bytes) of reading 4 GiB on a CUDA device, by the fastest of a few kernels that do nothing else."""
    from outrider.bench.stream import triton as stream

    buffer = torch.randint(2**31 - 1, (STREAM_BYTES // 4,), dtype=torch.int32, device=device)
    sums = stream.sums(device)
    readers: list[Call] = [partial(stream.read, buffer, sums, shape) for shape in stream.SHAPES]
    readers.append(lambda: buffer.view(torch.bfloat16).amax())
    best = min(_median_ms(reader, repeats) for reader in readers)
    return STREAM_BYTES / best / 1e6


def matmul_rate(device: torch.device, repeats: int = 10) -> float:
    """TFLOP/s (10^12) of a product of two large bfloat16 matrices of random numbers on a CUDA device."""
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * MATRIX**3 / _median_ms(lambda: left @ right, repeats) / 1e9


def _median_ms(call: Call, repeats: int) -> float:
    call()
    pairs = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs)
