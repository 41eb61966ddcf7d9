"""Chunk attention in plain PyTorch: the specification of the op, and its path on the CPU.

For every sequence and block, in order:

    rows      with lists: the listed rows of keys and values, gathered per list, and behind them the block's own; slots at and
              past the count read the block's first row instead and are masked, so no unlisted row is touched
              without: all rows from the first in the window of the block's first query to the block's last
    logits    scale * queries @ keys^T                             in fp32, or fp64 for fp64 inputs
    visible   listed, or not behind the query itself and in its window
    out       softmax(logits over visible) @ values
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    *,
    block: int,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    window: int | None,
    logsumexp: Tensor | None,
) -> Tensor:
    _, T, Hq, D = queries.shape
    Hkv, device = keys.shape[2], queries.device
    dtype = torch.promote_types(queries.dtype, torch.float32)
    result = queries.new_empty(queries.shape)

    def rows(cache: Tensor, factor: Tensor | None, positions: Tensor) -> Tensor:
        """`[H, n, D]`: the rows of one sequence `[N, Hkv, D]` at the positions `[H or 1, n]`, for every list and KV head."""
        H = max(len(positions), Hkv)
        head = torch.arange(H, device=device).view(H, 1) // (H // Hkv)
        taken = cache[positions, head].to(dtype)
        return taken if factor is None else taken * factor.to(dtype)[head].unsqueeze(-1)

    for b, length in enumerate(lengths.tolist()):
        for i, first in enumerate(range(0, T, block)):
            last = min(first + block, T)
            own = torch.arange(length + first, length + last, device=device)
            if indices is None or counts is None:
                start = 0 if window is None else max(length + first + 1 - window, 0)
                positions = torch.arange(start, length + last, device=device).view(1, -1)
                hidden = positions > own.view(-1, 1)
                if window is not None:
                    hidden |= positions <= own.view(-1, 1) - window
                hidden = hidden.view(1, 1, *hidden.shape)
            else:
                width = int(counts[b, i].max())
                listed = torch.arange(width, device=device) < counts[b, i].view(-1, 1)  # [Hs, width]
                past = torch.where(listed, indices[b, i, :, :width], length + first)
                positions = torch.cat([past, own.expand(len(past), -1)], dim=-1)
                hidden = torch.cat(
                    [~listed.unsqueeze(1).expand(-1, len(own), -1), (own > own.view(-1, 1)).expand(len(past), -1, -1)], dim=-1
                ).unsqueeze(1)  # [Hs, 1, queries, width + queries]
            k, v = rows(keys[b], key_scale, positions), rows(values[b], value_scale, positions)
            q = queries[b, first:last].to(dtype).transpose(0, 1).reshape(len(k), -1, D)  # [H, group * queries, D]
            logits = (q @ k.transpose(-1, -2)).mul_(scale).view(len(k), Hq // len(k), last - first, -1)
            logits.masked_fill_(hidden, -torch.inf)
            if logsumexp is not None:
                logsumexp[b, :, first:last] = logits.logsumexp(-1).flatten(0, 1)
            out = logits.softmax(-1).flatten(1, 2) @ v
            result[b, first:last] = out.view(Hq, last - first, D).transpose(0, 1)
    return result
