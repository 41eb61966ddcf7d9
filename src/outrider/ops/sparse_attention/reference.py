"""Sparse attention in plain PyTorch: the specification of the op, and its path on the CPU.

    past     the listed rows of keys and values, gathered per list; slots at and past the count read the first tail row
             instead and are masked, so no unlisted row is touched
    tail     rows lengths[b] .. lengths[b]+T-1, masked causally
    weights  softmax over [past logits, tail logits], fp32 (fp64 for fp64 inputs)
    out      weights_past @ values_past + weights_tail @ values_tail

The tail's product is summed term by term, hidden terms left out, so that a later row cannot reach an earlier query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    page_table: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv, M = keys.shape[2], indices.shape[2]
    H = max(indices.shape[1], Hkv)  # heads that own gathered rows: a shared list is gathered once per KV head
    output, dtype, device = queries.dtype, torch.promote_types(queries.dtype, torch.float32), queries.device

    first = lengths.view(B, 1, 1).to(indices.dtype)
    listed = torch.arange(M, device=device) < counts.unsqueeze(-1)  # [B, Hs, M]
    past = torch.where(listed, indices, first)
    step = torch.arange(T, device=device, dtype=indices.dtype)
    tail = (first + step).expand(B, Hkv, T)
    owner = torch.arange(H, device=device) // (H // Hkv)  # KV head of each gathered head

    def rows(cache: Tensor, factor: Tensor | None, positions: Tensor, heads: Tensor) -> Tensor:
        """`[B, heads, tokens, D]`: the cache rows at the positions `[B, heads or 1, tokens]`."""
        outer, inner = _locate(positions, cache.shape[1], page_table)
        taken = _take_rows(cache, outer, inner, heads.view(-1, 1)).view(B, len(heads), positions.shape[2], D).to(dtype)
        return taken if factor is None else taken * factor.to(dtype)[heads].view(-1, 1, 1)

    queries = queries.to(dtype).mul(scale).reshape(B, T, H, Hq // H, D).permute(0, 2, 3, 1, 4)  # [B, H, group, T, D]
    past_logits = queries.reshape(B, H, Hq // H * T, D) @ rows(keys, key_scale, past, owner).transpose(-1, -2)
    past_logits = past_logits.masked_fill(~listed.unsqueeze(2), -torch.inf).view(B, Hkv, Hq // Hkv, T, M)

    all_kv = torch.arange(Hkv, device=device)
    visible = step <= step.view(T, 1)
    tail_logits = queries.reshape(B, Hkv, Hq // Hkv * T, D) @ rows(keys, key_scale, tail, all_kv).transpose(-1, -2)
    tail_logits = tail_logits.view(B, Hkv, Hq // Hkv, T, T).masked_fill(~visible, -torch.inf)

    weights = torch.cat([past_logits, tail_logits], dim=-1).softmax(-1)  # [B, Hkv, group, T, M + T]
    out = weights[..., :M].reshape(B, H, Hq // H * T, M) @ rows(values, value_scale, past, owner)
    terms = weights[..., M:].unsqueeze(-1) * rows(values, value_scale, tail, all_kv).view(B, Hkv, 1, 1, T, D)
    out = out.view(B, Hkv, Hq // Hkv, T, D) + terms.masked_fill(~visible.unsqueeze(-1), 0).sum(-2)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, Hq, D).to(output)


def _locate(positions: Tensor, page_size: int, page_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """First two cache coordinates of the positions `[B, heads, tokens]`: sequence and token, or page and slot."""
    B = positions.shape[0]
    if page_table is None:
        return torch.arange(B, device=positions.device).view(B, 1, 1), positions
    page = page_table.gather(1, (positions // page_size).reshape(B, -1).long()).view(positions.shape)
    return page, positions % page_size


def _take_rows(cache: Tensor, outer: Tensor, inner: Tensor, head: Tensor) -> Tensor:
    """`cache[outer, inner, head]` as one list of rows `[n, D]`, for any strides.

    The same as advanced indexing and several times faster on the CPU: whole rows are copied out of a flat view of the
    storage, whose row stride is the common divisor of the three strides.
    """
    *sizes, D = cache.shape
    strides = [stride if size > 1 else 0 for size, stride in zip(sizes, cache.stride(), strict=False)]
    unit = math.gcd(*strides) or 1
    o, i, h = (stride // unit for stride in strides)
    span = sum((size - 1) * stride for size, stride in zip(sizes, (o, i, h), strict=True))
    flat = cache.as_strided((span + 1, D), (unit, cache.stride(3)))
    return flat.index_select(0, (outer.long() * o + inner * i + head * h).reshape(-1))
