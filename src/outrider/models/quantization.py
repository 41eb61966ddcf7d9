"""Caches in 8 bits: e4m3 floats, one factor for the keys and one for the values of every layer and KV head.

    stored = round(row / factor), brought into -448 .. 448          read back as  stored * factor

A factor belongs to the model. It must not depend on a text, or what came first would change the result of what comes later. So
it is measured once, by a forward of fixed tokens spread over the vocabulary: the largest magnitude that a head's keys (position
encoding applied) or values have there, times `MARGIN`, becomes the largest number that can be stored.

- A margin costs nothing: e4m3 floats, so what is stored between 2^-6 and 448 errs by at most 2^-4 of itself, and the probe's
  largest number lies at 56 to 112. Text may exceed the probe; what exceeds the margin, too, is clamped.
- Positions behind the probe's are covered: a rotation of two components leaves none larger than sqrt(2) times the larger one.
- Factors are rounded up to powers of two: division and multiplication are then exact, and rounding to e4m3 is all that is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.config import KV_DTYPES, check
from outrider.errors import OptionError
from outrider.ops.compiler import compute_capability

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST_CAPABILITY = (8, 9)  # of a GPU that converts to and from e4m3
MARGIN = 4  # text over probe
PROBE_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScales:
    """What stored keys and values are multiplied with, by layer [Hkv] float32 on the model's device."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def check_kv_dtype(kv_dtype: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise OptionError for unknown storage of keys and values, and for what a model of `dtype` cannot use on `device`."""
    check("kv-dtype", kv_dtype, kv_dtype in KV_DTYPES, ", ".join(KV_DTYPES))
    if kv_dtype != "fp8" or device.type != "cuda":
        return
    if dtype not in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        raise OptionError("kv-dtype", kv_dtype, f"auto with dtype {name} on a GPU (fp8 needs bfloat16 or float16)")
    if compute_capability(device) < LEAST_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (compute_capability(device), LEAST_CAPABILITY))
        raise OptionError("kv-dtype", kv_dtype, f"auto on this device (compute capability {found}; fp8 needs {needed})")


def probe(vocabulary: int, context: int) -> Tensor:
    """The tokens that factors are measured on, [1, S] int64: evenly spaced over the vocabulary, in an order without sense."""
    ids = torch.linspace(0, vocabulary - 1, PROBE_TOKENS, dtype=torch.float64).long()
    return ids[torch.randperm(PROBE_TOKENS, generator=torch.Generator().manual_seed(0))][None, :context]


def scale_of(rows: Tensor) -> Tensor:
    """The factor of every head of `rows` [B, S, Hkv, D]: a power of two, [Hkv] float32; 1 for a head of zeros."""
    largest = rows.double().abs().amax((0, 1, 3)).cpu()  # on the host, in fp64: the logarithm must not miss a power of two
    scale = torch.exp2(torch.ceil(torch.log2(largest * MARGIN / LARGEST)))
    return torch.where(largest > 0, scale, 1.0).float().to(rows.device)


def dequantize(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Stored rows [B, S, Hkv, D] times their factor, in `dtype`; rows that have none as they are."""
    return rows if scale is None else rows.to(dtype).mul_(scale[:, None])
