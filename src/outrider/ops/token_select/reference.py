"""Token selection in plain PyTorch: the specification of the op, and its path on the CPU.

Nonnegative floats order like their bit patterns, so the threshold of a list is found exactly by bisection on the integer
view, one bit a step from the highest down, for all rows of a layer at once:

    threshold = 0
    for bit in 30 .. 0:                                             (62 .. 0 for fp64 scores)
        if enough(candidates with view >= threshold + 2^bit):
            threshold += 2^bit

`enough` counts (top-k) or sums scores in fp64 (top-p). What lies above the threshold is kept; of the candidates equal to it
the first `quota` in order of position. Candidates are the cached tokens that are not kept anyway (sinks, recent window).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from outrider.ops.checks import check_range


def token_select(
    scores: Tensor,
    lengths: Tensor,
    sources: Tensor,
    *,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    sinks: int,
    recent: int,
    merge: str,
    width: int | None,
) -> tuple[Tensor, Tensor]:
    B, _, S = scores.shape

    position = torch.arange(S, device=scores.device)
    length = lengths.view(B, 1, 1)
    cached = position < length  # [B, 1, S]
    forced = cached & ((position < sinks) | (position >= length - recent))
    rows = torch.where(cached & (scores > 0), scores, 0).to(torch.promote_types(scores.dtype, torch.float32))

    if top_k is not None:
        ks = _by_layer(torch.as_tensor(top_k, device=scores.device), len(sources))
        needed = (torch.minimum(ks, length) - forced.sum(-1, keepdim=True)).clamp(min=0)
        chosen = zip(sources, needed, strict=True)
        keep = [_keep_top_k(_merge(rows, layer, merge), cached, forced, few) for layer, few in chosen]
    else:
        ps = _by_layer(torch.as_tensor(top_p, dtype=torch.float64, device=scores.device), len(sources))
        chosen = zip(sources, ps, strict=True)
        keep = [_keep_top_p(_merge(rows, layer, merge), cached, forced, p) for layer, p in chosen]
    return _lists(torch.stack(keep), width)


def union_lists(indices: Tensor, counts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    L, B, Q, Hs, M = indices.shape
    listed = torch.arange(M, device=indices.device) < counts.unsqueeze(-1)
    check_range("indices", indices[listed], 0, length - 1)
    slots = torch.where(listed, indices, length).transpose(2, 3).reshape(L, B, Hs, Q * M).long()
    keep = torch.zeros(L, B, Hs, length + 1, dtype=torch.bool, device=indices.device)
    return _lists(keep.scatter_(-1, slots, True)[..., :length], None)


def _by_layer(budget: Tensor, layers: int) -> Tensor:
    """`[Lt, B or 1, Hs or 1, 1]` of one budget, of one for each sequence or one for each list."""
    return budget[..., None] if budget.dim() == 3 else budget.view(1, -1, 1, 1).expand(layers, -1, -1, -1)


def _merge(rows: Tensor, sources: Tensor, merge: str) -> Tensor:
    """`[B, Hs, S]`: the mean or maximum of the score rows of every list of one layer."""
    merged = rows[:, sources[:, 0]]
    for source in sources[:, 1:].unbind(1):
        merged = merged + rows[:, source] if merge == "mean" else torch.maximum(merged, rows[:, source])
    return merged / sources.shape[1] if merge == "mean" else merged


def _keep_top_k(merged: Tensor, cached: Tensor, forced: Tensor, needed: Tensor) -> Tensor:
    """`[B, Hs, S]` bool: the forced tokens and the `needed [B, 1 or Hs, 1]` best of the others."""
    view = _candidates(merged, cached, forced)
    threshold = _bisect(view, lambda passing: passing.sum(-1, keepdim=True, dtype=torch.int32) >= needed)
    above = view > threshold
    return forced | above | _first(view == threshold, needed - above.sum(-1, keepdim=True))


def _keep_top_p(merged: Tensor, cached: Tensor, forced: Tensor, p: Tensor) -> Tensor:
    """`[B, Hs, S]` bool: the forced tokens and the fewest others that bring the mass to `p` [B or 1, Hs or 1, 1] of all."""
    view = _candidates(merged, cached, forced)
    buffer = torch.empty_like(view)

    def mass(chosen: Tensor) -> Tensor:  # chosen: 0 or 1, of view's dtype; 0 times a pattern is the pattern of 0.0
        return torch.mul(view, chosen, out=buffer).view(merged.dtype).sum(-1, keepdim=True, dtype=torch.float64)

    held = (merged.double() * forced).sum(-1, keepdim=True)
    wanted = p * (held + mass((view >= 0).to(view.dtype))) - held
    threshold = _bisect(view, lambda passing: mass(passing) >= wanted)
    above = view > threshold
    value = threshold.view(merged.dtype).double()
    # Where the threshold is 0 every positive score is above it: zeros add no mass, none is needed.
    quota = torch.where(value > 0, ((wanted - mass(above.to(view.dtype))) / value).ceil(), 0)
    keep = forced | above | _first(view == threshold, quota)
    return torch.where(p >= 1, cached, keep)


def _candidates(merged: Tensor, cached: Tensor, forced: Tensor) -> Tensor:
    """Integer view of the scores that compete for a place; -1, below every threshold, for all others."""
    integer = torch.int64 if merged.dtype == torch.float64 else torch.int32
    return merged.view(integer).masked_fill(~cached | forced, -1)


def _bisect(view: Tensor, enough: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest threshold `[..., 1]` for which `enough(view >= threshold)` holds, 0 where it holds for none."""
    threshold = view.new_zeros(*view.shape[:-1], 1)
    passing = torch.empty_like(view)
    for bit in reversed(range(torch.iinfo(view.dtype).bits - 1)):
        higher = threshold + (1 << bit)
        threshold = torch.where(enough(torch.ge(view, higher, out=passing)), higher, threshold)
    return threshold


def _first(chosen: Tensor, quota: Tensor) -> Tensor:
    """The first `quota` of the chosen positions of every row."""
    return chosen & (chosen.cumsum(-1, dtype=torch.int32) <= quota)


def _lists(keep: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """Lists of the kept positions: padded indices and counts, both int32."""
    counts = keep.sum(-1, dtype=torch.int32)
    longest = int(counts.max()) if counts.numel() else 0
    if width is None:
        width = longest
    elif width < longest:
        raise ValueError(f"width: expected at least the longest list's {longest}, got {width}")
    used = torch.arange(width, device=keep.device) < counts.unsqueeze(-1)
    positions = keep.nonzero()[:, -1].int()  # row by row, ascending: the order of the used slots
    indices = torch.full(used.shape, -1, dtype=torch.int32, device=keep.device)
    return indices.masked_scatter_(used, positions), counts
