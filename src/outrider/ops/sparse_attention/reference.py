"""Sparse attention in plain PyTorch: the specification of the op, and its path on the CPU.

With lists, for which the first tokens are named where there are counts alone:

    past     the listed rows of keys and values, gathered per list; slots at and past the count read the first tail row
             instead and are masked, so no unlisted row is touched
    tail     rows lengths[b] .. lengths[b]+T-1, masked causally
    weights  softmax over [past logits, tail logits], fp32 (fp64 for fp64 inputs)
    out      weights_past @ values_past + weights_tail @ values_tail, mixed with the value that stands for unlisted tokens

The tail's product is summed term by term, hidden terms left out, so that a later row cannot reach an earlier query.

Without lists (dense) each sequence is one call of PyTorch's attention over the rows that any of its queries sees, a group's
queries folded into the rows of its KV head, so that a key is read once for all of them. A mask does not keep a hidden row out
of the product where it is not finite: should the result not be, every query goes alone, over the rows that it sees itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    *,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    page_table: Tensor | None,
    window: int | None = None,
    unlisted_values: Tensor | None = None,
    unlisted_shares: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    if counts is None:
        return _dense(queries, keys, values, lengths, scale, key_scale, value_scale, page_table, window, logsumexp)
    B, T, Hq, D = queries.shape
    if indices is None:
        indices = torch.arange(int(counts.max()), dtype=counts.dtype, device=counts.device).expand(*counts.shape, -1)
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

    logits = torch.cat([past_logits, tail_logits], dim=-1)  # [B, Hkv, group, T, M + T]
    if logsumexp is not None:
        logsumexp.copy_(logits.logsumexp(-1).flatten(1, 2))
    weights = logits.softmax(-1)
    out = weights[..., :M].reshape(B, H, Hq // H * T, M) @ rows(values, value_scale, past, owner)
    terms = weights[..., M:].unsqueeze(-1) * rows(values, value_scale, tail, all_kv).view(B, Hkv, 1, 1, T, D)
    out = out.view(B, Hkv, Hq // Hkv, T, D) + terms.masked_fill(~visible.unsqueeze(-1), 0).sum(-2)
    if unlisted_values is not None and unlisted_shares is not None:
        share = unlisted_shares.to(dtype).view(B, Hkv, -1, 1, 1)
        out = (1 - share) * out + share * unlisted_values.to(dtype).view(Hkv, 1, 1, D)
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


def _dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    page_table: Tensor | None,
    window: int | None,
    logsumexp: Tensor | None,
) -> Tensor:
    T, page_size = queries.shape[1], keys.shape[1]
    result = queries.new_empty(queries.shape)
    if keys.dtype != queries.dtype:  # float8
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    for b, length in enumerate(lengths.tolist()):
        start, end = 0 if window is None else max(length + 1 - window, 0), length + T
        if page_table is None:
            rows = [cache[b, start:end] for cache in (keys, values)]
        else:
            first = start // page_size
            pages = page_table[b, first : -(-end // page_size)]
            rows = [
                cache.index_select(0, pages).flatten(0, 1)[start - first * page_size : end - first * page_size]
                for cache in (keys, values)
            ]
        k, v = (
            x.to(queries.dtype) if factor is None else x.to(queries.dtype) * factor.to(queries.dtype).view(-1, 1)
            for x, factor in zip(rows, (key_scale, value_scale), strict=True)
        )
        past = length - start
        result[b] = _attend(queries[b], k, v, scale, past, window)
        if logsumexp is not None:
            logsumexp[b] = _log_sums(queries[b], k, scale, past, window)
        if T > 1 and not bool(result[b].isfinite().all()):
            for t in range(T):
                seen = slice(0 if window is None else max(past + t + 1 - window, 0), past + t + 1)
                result[b, t] = _attend(queries[b, t : t + 1], k[seen], v[seen], scale, past, None)[0]
    return result


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, past: int, window: int | None) -> Tensor:
    """Queries `[T, Hq, D]` over rows `[n, Hkv, D]` of one sequence; query t is token `past + t` of them."""
    T, Hq, D = queries.shape
    n, Hkv = keys.shape[:2]
    mask = None
    if T > 1:
        step = torch.arange(T, device=queries.device).view(T, 1)
        mask = torch.zeros(Hq // Hkv, T, n, dtype=queries.dtype, device=queries.device)  # [group, T, n]
        mask[..., past:].masked_fill_(step.view(T) > step, -torch.inf)
        if window is not None:
            edge = torch.arange(max(past + T - window, 0), device=queries.device)
            mask[..., : len(edge)].masked_fill_(edge <= past + step - window, -torch.inf)
        mask = mask.view(-1, n)
    folded = queries.transpose(0, 1).reshape(1, Hkv, -1, D)  # [1, Hkv, group * T, D]
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (keys, values))
    out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    return out.reshape(Hq, T, D).transpose(0, 1)


def _log_sums(queries: Tensor, keys: Tensor, scale: float, past: int, window: int | None) -> Tensor:
    """`[Hq, T]`: logarithms of the softmax denominators of queries `[T, Hq, D]` over rows `[n, Hkv, D]`, as in `_attend`."""
    T, Hq, D = queries.shape
    n, Hkv = keys.shape[:2]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    folded = queries.to(dtype).transpose(0, 1).reshape(Hkv, -1, D)
    logits = (folded @ keys.to(dtype).permute(1, 2, 0)).mul(scale).view(Hq, T, n)
    position, own = torch.arange(n, device=queries.device), past + torch.arange(T, device=queries.device).view(T, 1)
    hidden = position > own
    if window is not None:
        hidden |= position <= own - window
    return logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
