"""Norm, rotation and appending in plain PyTorch, rounded where transformers' layers round: the specification of the op."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_append(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    B, T, H, _ = projected.shape
    Hkv = key_cache.shape[2]
    queries, keys, values = projected.split([H - 2 * Hkv, Hkv, Hkv], dim=2)
    queries, keys = (_rotate(_norm(x, gain, eps), cos, sin) for x, gain in ((queries, query_norm), (keys, key_norm)))
    position = lengths.long()[:, None] + torch.arange(T, device=projected.device)  # [B, T]
    sequence = torch.arange(B, device=projected.device)[:, None]
    for new, cache, scale in ((keys, key_cache, key_scale), (values, value_cache, value_scale)):
        if scale is not None:
            limit = torch.finfo(cache.dtype).max
            new = (new.float() / scale[:, None]).clamp(-limit, limit).to(cache.dtype)
        cache[sequence, position] = new
    return queries.contiguous()


def _norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
