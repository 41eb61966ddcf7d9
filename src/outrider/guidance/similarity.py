"""How alike a target head and a draft head are, measured on rounds of a calibration text.

A *round* is a run of T consecutive query rows; masses are averaged over them, as in decoding. Axes: N rounds, Ht target
heads, Ld draft layers, Hd draft query heads, R = Ld * Hd draft rows (row = layer * Hd + head), S cached tokens. Mass at
and past a round's length is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_EPSILON = 1e-9  # added to both probabilities: a draft token without any mass costs at most log(1e9) = 21 nats


def kl_layers(target: Tensor, draft: Tensor) -> Tensor:
    """KL divergence of a target layer from every draft layer, in nats (SpecAttn, arXiv 2510.27641).

    target [N, Ht, S], draft [N, Ld, Hd, S] -> [Ld]: mean over the rounds of KL(target || draft), both averaged over their
    heads and normalised over the cached tokens. The paper does not say whether heads are averaged; a single distribution
    per layer implies it.
    """
    return kl_rows(target.mean(1), draft.mean(2))


def kl_rows(target: Tensor, rows: Tensor) -> Tensor:
    """Mean over the rounds of KL(target || row) in nats, both normalised over the cached tokens.

    target [N, S], rows [N, R, S] -> [R].
    """
    t = _normalised(target.float())  # [N, S]
    entropy = (t * (t + KL_EPSILON).log()).sum(-1)  # [N], negative
    cross = torch.einsum("ns,nrs->nr", t, (_normalised(rows.float()) + KL_EPSILON).log())
    return (entropy.unsqueeze(1) - cross).mean(0)


def forced_mask(lengths: Tensor, size: int, sinks: int, recent: int) -> Tensor:
    """lengths [N] -> [N, S] bool: the first `sinks` and last `recent` cached tokens of each round."""
    position = torch.arange(size, device=lengths.device)
    end = lengths.unsqueeze(1)
    return ((position < sinks) | (position >= end - recent)) & (position < end)


def top_sets(mass: Tensor, lengths: Tensor, k: Tensor | int, *, sinks: int = 0, recent: int = 0) -> Tensor:
    """The k tokens of most mass of every row, as a set.

    mass [N, ..., S], lengths [N], k an int or [N] int64 -> [N, ..., S] bool with exactly min(k, length) tokens set. Sinks
    and recent tokens come first and count towards k.
    """
    counts = torch.minimum(torch.as_tensor(k, device=mass.device).expand_as(lengths), lengths)
    width = int(counts.max()) if counts.numel() else 0
    per_round = (-1,) + (1,) * (mass.dim() - 1)
    position = torch.arange(mass.shape[-1], device=mass.device)
    ranked = mass.masked_fill(position >= lengths.view(per_round), -torch.inf)
    if sinks or recent:
        forced = forced_mask(lengths, mass.shape[-1], sinks, recent)
        ranked.masked_fill_(forced.view(forced.shape[0], *(1,) * (mass.dim() - 2), -1), torch.inf)
    best = ranked.topk(width, dim=-1).indices  # [N, ..., width], best first
    wanted = torch.arange(width, device=mass.device) < counts.view(per_round)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, wanted.expand_as(best))


def jaccard(target_sets: Tensor, draft_sets: Tensor) -> Tensor:
    """Overlap of token sets (STS, arXiv 2605.15508): |A and B| / |A or B|, mean over the rounds.

    target_sets [N, Ht, S] bool, draft_sets [N, R, S] bool -> [Ht, R] fp32.
    """
    total = torch.zeros(target_sets.shape[1], draft_sets.shape[1], device=target_sets.device)
    for a, b in zip(target_sets, draft_sets, strict=True):
        both = a.float() @ b.float().T
        either = a.sum(-1).unsqueeze(1) + b.sum(-1) - both
        total += both / either.clamp_min(1)
    return total / len(target_sets)


def recall(target: Tensor, draft_sets: Tensor) -> Tensor:
    """Share of each target head's mass that each draft row's list holds, mean over the rounds.

    target [N, Ht, S] with the forced tokens set to zero (they are kept whatever the draft says), draft_sets [N, R, S] bool
    -> [Ht, R] fp32 in 0 .. 1. A target head without any mass outside the forced tokens has recall 1.
    """
    total = torch.zeros(target.shape[1], draft_sets.shape[1], device=target.device)
    for mass, sets in zip(target.float(), draft_sets, strict=True):
        whole = mass.sum(-1, keepdim=True)
        total += torch.where(whole > 0, mass @ sets.float().T / whole.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return total / len(target)


def _normalised(mass: Tensor) -> Tensor:
    return mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
