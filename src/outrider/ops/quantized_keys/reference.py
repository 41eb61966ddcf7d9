"""Quantised keys in plain PyTorch: the specification of the op, and its path on the CPU.

In order:

    coded      blocks 0 .. coded_blocks(lengths[b]) - 1 of a sequence, each channel between its smallest and largest value there
    keys       low + code * step where coded, the cache's own behind
    mass       as in attention_mass: softmax over the past and the tail up to the query itself, cut to the past
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.ops.quantized_keys.layout import BLOCK, coded_blocks, decode, encode


def quantize_keys(
    keys: Sequence[Tensor],
    lengths: Tensor,
    records: Tensor,
    *,
    bits: int,
    key_scales: Sequence[Tensor | None],
    last: bool,
) -> None:
    for b, stop in enumerate(coded_blocks(lengths).tolist()):
        start = max(stop - 1, 0) if last else 0
        if start == stop:
            continue
        for layer, (cached, scale) in enumerate(zip(keys, key_scales, strict=True)):
            rows = _wide(cached[b, start * BLOCK : stop * BLOCK], scale).float()
            records[layer, b, :, start:stop] = encode(rows.transpose(0, 1).unflatten(1, (-1, BLOCK)), bits)


def quantized_mass(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    records: Tensor,
    lengths: Tensor,
    *,
    bits: int,
    scales: Sequence[float],
    reduce: str,
    key_scales: Sequence[Tensor | None],
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries[0].shape
    N, Hkv = keys[0].shape[1:3]
    end, coded = int(lengths.max()) + T, coded_blocks(lengths)
    longest = int(coded.max())
    position, step = torch.arange(end, device=lengths.device), torch.arange(T, device=lengths.device).view(T, 1)
    hidden = position > lengths.view(B, 1, 1, 1) + step  # [B, 1, T, end]
    behind = position >= lengths.view(B, 1, 1, 1)
    masses = []
    for layer, (asked, cached, scale) in enumerate(zip(queries, keys, key_scales, strict=True)):
        wide = torch.promote_types(asked.dtype, torch.float32)
        rows = _wide(cached[:, :end], scale).to(wide).transpose(1, 2)  # [B, Hkv, end, D]
        few = decode(records[layer, :, :, :longest], D, bits).flatten(2, 3).to(wide)
        in_codes = (position[: few.shape[2]] < BLOCK * coded.view(B, 1, 1)).unsqueeze(-1)  # [B, 1, longest * 64, 1]
        rows = torch.cat([torch.where(in_codes, few, rows[:, :, : few.shape[2]]), rows[:, :, few.shape[2] :]], 2)
        q = asked.to(wide).reshape(B, T, Hkv, Hq // Hkv, D).permute(0, 2, 3, 1, 4) * scales[layer]
        logits = (q.reshape(B, Hkv, -1, D) @ rows.mT).view(B, Hq, T, end)
        mass = logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(behind, 0)
        masses.append(mass.mean(2) if reduce == "mean" else mass.transpose(1, 2))
    result = torch.nn.functional.pad(torch.cat(masses, -2), (0, N - end)).to(dtype)
    return result if out is None else out.copy_(result)


def _wide(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Rows [..., Hkv, D] as they are, or those of a float8 cache times their factor."""
    return rows if scale is None else rows.float() * scale.view(-1, 1)
