"""Which draft layers each target layer may follow, as a mask [Lt, Ld]: head maps choose among the candidates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from outrider.errors import OptionError

LAYER_MAPS = ("proportional", "monotone", "joint")


def proportional(target_layers: int, draft_layers: int) -> Tensor:
    """[Lt] int64: the draft layer at the same relative depth, floor(t * Ld / Lt) (STS, arXiv 2605.15508)."""
    return torch.arange(target_layers) * draft_layers // target_layers


def monotone(cost: Tensor) -> Tensor:
    """The non-decreasing map of least total cost (SpecAttn, arXiv 2510.27641, whose cost is the KL divergence).

    cost [Lt, Ld] -> [Lt] int64. Dynamic programming, O(Lt * Ld): the best map of the first t layers that ends at draft layer
    d costs cost[t, d] plus the cheapest map of the layers before that ends at d or earlier.
    """
    rows = cost.double().cpu()
    total, previous = rows[0], []
    for row in rows[1:]:
        best, where = total.cummin(0)  # over the draft layers up to d
        previous.append(where)
        total = row + best
    path = [int(total.argmin())]
    for where in reversed(previous):
        path.append(int(where[path[-1]]))
    return torch.tensor(path[::-1])


def candidates(layer_map: str, cost: Tensor) -> Tensor:
    """cost [Lt, Ld] (KL) -> [Lt, Ld] bool: the draft layers each target layer may follow; "joint" allows all.

    Raises OptionError for an unknown name.
    """
    target_layers, draft_layers = cost.shape
    if layer_map == "proportional":
        return one_hot(proportional(target_layers, draft_layers), draft_layers).bool()
    if layer_map == "monotone":
        return one_hot(monotone(cost), draft_layers).bool()
    if layer_map == "joint":
        return torch.ones(target_layers, draft_layers, dtype=torch.bool)
    raise OptionError("layer map", layer_map, ", ".join(LAYER_MAPS))
