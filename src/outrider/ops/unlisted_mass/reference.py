"""Unlisted mass in plain PyTorch: the specification of the op, and its path on the CPU.

total   of a score row, over its cached tokens; of a list, over the rows it is averaged from
listed  the same over the tokens of the list, gathered
share   1 - listed / total, in fp64
"""

from __future__ import annotations

import torch
from torch import Tensor


def unlisted_mass(scores: Tensor, lengths: Tensor, sources: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    B, _, S = scores.shape
    device = scores.device
    cached = torch.arange(S, device=device) < lengths.view(B, 1, 1)
    rows = torch.where(cached & (scores > 0), scores, 0)
    totals = rows.sum(-1, dtype=torch.float64)  # [B, R]
    shares = []
    for layer, places, count in zip(sources, indices, counts, strict=True):
        used = torch.arange(places.shape[-1], device=device) < count.unsqueeze(-1)  # [B, Hs, M]
        position = torch.where(used, places, 0).long()
        total, listed = (torch.zeros(count.shape, dtype=torch.float64, device=device) for _ in range(2))
        for row in layer.unbind(1):  # [Hs]
            total += totals[:, row]
            found = rows.flatten(1).gather(1, (row.view(-1, 1) * S + position).flatten(1)).view(position.shape)
            listed += torch.where(used, found, 0).sum(-1, dtype=torch.float64)
        share = (1 - listed / total).clamp(0, 1)
        shares.append(torch.where((count < lengths.view(B, 1)) & (total > 0), share, 0).float())
    return torch.stack(shares)
