"""Budgets by layer and head: how many tokens each list gets of what all may read together.

Calibration finds what a list costs that holds some share of the cached tokens: the error of its KV head's output, weighed by
what such an error does to the target's predictions. Costs are taken to add up, so the best way to divide a budget is to fill
all lists to one level of marginal cost (`water_fill`), for any budget, without a second calibration.

Shares are of the tokens beside those that every list holds (sinks, recent ones): these are no one's to give away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.types import ListCosts

# that calibration tries: close together, since the best part of a list is one of them
SHARES: tuple[float, ...] = (
    *(0.0, 0.002, 0.003, 0.004, 0.005, 0.0065, 0.008, 0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08),
    *(0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
)
WEIGHED = 0.02  # the one of them at which a list's effect on predictions is measured


def water_fill(shares: Sequence[float], costs: Tensor, mean: float) -> Tensor:
    """The shares [lists] fp64, of the given mean, at which the sum of the costs is least.

    shares: from 0 to 1, ascending. costs [lists, len(shares)]: what a list of each share costs. Between them a cost is linear,
    along its lower convex hull, on which the greedy way is the best one: the steepest piece of any list first.
    """
    room = len(costs) * mean
    pieces = []
    for row, curve in enumerate(costs.tolist()):
        at = 0
        while at < len(shares) - 1:
            slopes = [(curve[end] - curve[at]) / (shares[end] - shares[at]) for end in range(at + 1, len(shares))]
            end = at + 1 + slopes.index(min(slopes))
            pieces.append((min(slopes), row, shares[end] - shares[at]))
            at = end
    found = [0.0] * len(costs)
    for _, row, width in sorted(pieces):
        step = min(width, room)
        found[row] += step
        room -= step
    return torch.tensor(found, dtype=torch.float64)


def list_factors(costs: ListCosts, target_layers: Sequence[int], keep: float) -> Tensor:
    """[len(target_layers), Hs] fp64, of mean 1: what each list gets of a budget `keep`, in terms of an equal part."""
    values = costs.values[list(target_layers)]
    return (water_fill(costs.shares, values.flatten(0, 1), keep) / keep).view(values.shape[:2])


def bounds(factors: Tensor) -> Tensor:
    """Where each list's part of the whole begins and ends, in equal parts: [L, Hs] -> [2, L, 1, Hs]."""
    ends = factors.flatten().cumsum(0)
    return torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]]), ends]).view(2, len(factors), 1, -1)


def divide(kept: Tensor, bounds: Tensor, forced: int) -> Tensor:
    """Whole numbers of tokens by list [L, B, Hs] int64, in all as many as equal lists of `kept` [B] fp64 tokens each.

    `forced`: tokens that every list holds; `bounds` [2, L, 1, Hs] divide what all have beside them.
    """
    begin, end = (bounds * (kept - forced).clamp(min=0)[:, None]).round()  # what one list loses by rounding, the next one gains
    return (end - begin + kept.clamp(max=forced)[:, None]).long()


def rank(mass: Tensor, length: int, sinks: int, recent: int) -> Tensor:
    """The order [..., length] int64 in which a list takes the cached tokens of masses [..., S]: sinks and recent ones first."""
    position = torch.arange(length, device=mass.device)
    forced = (position < sinks) | (position >= length - recent)
    return mass[..., :length].masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)


def listed(length: int, forced: int, shares: Sequence[float] = SHARES) -> list[int]:
    """Tokens of a list of each share, the forced ones among them."""
    forced = min(forced, length)
    return [forced + round(share * (length - forced)) for share in shares]


def output_errors(queries: Tensor, keys: Tensor, values: Tensor, order: Tensor, scale: float, counts: Sequence[int]) -> Tensor:
    """How far a layer's output is off where one KV head reads its first `counts` tokens: [Hkv, len(counts)] fp32.

    queries [T, Hq, D] of a round behind S cached tokens; keys and values [S + T, Hkv, D], the round's own rows last; order
    [Hkv, S], or [1, S] where heads share a list. Squared L2 error of the head's output, over the whole layer's squared norm.
    """
    t, s = len(queries), order.shape[1]
    heads = keys.shape[1]
    q = queries.float().transpose(0, 1).reshape(heads, -1, queries.shape[2]) * scale  # [Hkv, g T, D]
    own = torch.arange(s, s + t, device=order.device).expand(heads, t)
    rows = torch.cat([order.expand(heads, s), own], 1)[..., None]
    k, v = (x.float().transpose(0, 1).gather(1, rows.expand(-1, -1, x.shape[2])) for x in (keys, values))
    logits = q @ k.transpose(1, 2)  # [Hkv, g T, S + T]
    behind = torch.ones(t, t, dtype=torch.bool, device=order.device).triu(1)
    logits.view(heads, -1, t, s + t)[..., s:].masked_fill_(behind, -torch.inf)
    weights = logits.softmax(-1)
    dense, errors = weights @ v, []
    out, mass, start = weights[..., s:] @ v[:, s:], weights[..., s:].sum(-1, keepdim=True), 0
    for stop in counts:
        out = out + weights[..., start:stop] @ v[:, start:stop]
        mass = mass + weights[..., start:stop].sum(-1, keepdim=True)
        errors.append((out / mass - dense).square().sum((1, 2)))
        start = stop
    return torch.stack(errors, 1) / dense.square().sum()
