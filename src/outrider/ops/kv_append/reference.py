"""Appending in plain PyTorch: the specification of the op, and its path on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_append(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    B, T = keys.shape[:2]
    position = lengths.long()[:, None] + torch.arange(T, device=keys.device)  # [B, T]
    sequence = torch.arange(B, device=keys.device)[:, None]
    for new, cache, scale in ((keys, key_cache, key_scale), (values, value_cache, value_scale)):
        if scale is not None:
            limit = torch.finfo(cache.dtype).max
            new = (new.float() / scale[:, None]).clamp(-limit, limit).to(cache.dtype)
        cache[sequence, position] = new
