"""A kernel that only reads: it measures the streaming rate, and its reading flushes the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SHAPES = ((8192, 8, 4), (4096, 4, 8), (2048, 4, 16))  # elements a block, warps, blocks per multiprocessor


@triton.jit
def _read(source, partial, n, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for _ in range(STEPS):
        total += tl.load(source + offsets, mask=offsets < n, other=0)
        offsets += tl.num_programs(0) * BLOCK
    tl.store(partial + tl.program_id(0), tl.sum(total))


def read(source: Tensor, partial: Tensor, shape: tuple[int, int, int] = SHAPES[1]) -> None:
    """Read all of `source`, int32, at most 2^30 elements; `partial` receives one sum a block.

    `partial` holds 16 int32 per multiprocessor; as many blocks are started as `shape` says.
    """
    block, warps, waves = shape
    programs = partial.numel() // 16 * waves
    steps = triton.cdiv(source.numel(), programs * block)
    _read[(programs,)](source, partial, source.numel(), STEPS=steps, BLOCK=block, num_warps=warps)


def sums(device: torch.device) -> Tensor:
    """A `partial` for `read` on this device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return torch.zeros(16 * processors, dtype=torch.int32, device=device)
