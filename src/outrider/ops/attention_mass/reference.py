"""Attention mass in plain PyTorch: the specification of the op, and its path on the CPU.

In order:

    past, tail     keys 0 .. lengths[b]-1, and lengths[b] .. lengths[b]+T-1
    logits         scale * queries @ keys^T                       in fp32, or fp64 for fp64 inputs
    visible        key position <= lengths[b] + t                 the past, and the tail up to the query itself
    mass           softmax(logits over visible), cut to the past, reduced over t, summed over groups of heads
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    reduce: str,
    heads: Tensor | None,
    key_scale: Tensor | None,
    page_table: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    N = keys.shape[1] if page_table is None else page_table.shape[1] * keys.shape[1]
    shortest, end = int(lengths.min()), int(lengths.max()) + T  # rows at and past `end` are never touched
    wide = torch.promote_types(queries.dtype, torch.float32)

    keys = (keys if page_table is None else _gather_pages(keys, page_table, end))[:, :end].to(wide)
    if key_scale is not None:
        keys = keys * key_scale.view(-1, 1).to(wide)
    queries = queries.to(wide).reshape(B, T, Hkv, Hq // Hkv, D).permute(0, 2, 3, 1, 4) * scale
    logits = queries.reshape(B, Hkv, -1, D) @ keys.permute(0, 2, 3, 1)
    logits = logits.view(B, Hq, T, end)

    position = torch.arange(shortest, end, device=keys.device)  # every query sees all keys before `shortest`
    step = torch.arange(T, device=keys.device).view(T, 1)
    logits[..., shortest:].masked_fill_(position > lengths.view(B, 1, 1, 1) + step, -torch.inf)
    mass = logits.softmax(-1)
    mass = mass.mean(2) if reduce == "mean" else mass.amax(2) if reduce == "max" else mass.transpose(1, 2)
    mass[..., shortest:].masked_fill_(position >= lengths.view([B] + [1] * (mass.ndim - 1)), 0)
    if heads is not None:
        mass = mass[..., heads, :].sum(-2)
    mass = torch.nn.functional.pad(mass, (0, N - end)).to(dtype)
    return mass if out is None else out.copy_(mass)


def _gather_pages(keys: Tensor, page_table: Tensor, end: int) -> Tensor:
    """The first `end` tokens (rounded up to pages) of every sequence, `[B, tokens, Hkv, D]`."""
    pages, page_size, Hkv, D = keys.shape
    used = page_table[:, : -(-end // page_size)].clamp(0, pages - 1)
    return keys[used].reshape(page_table.shape[0], -1, Hkv, D)
