"""The method `spatten`: cascade token pruning of SpAtten (Wang, Zhang, Han, arXiv 2012.09852)."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from outrider.guidance.rivals.base import Rival
from outrider.guidance.selectors.base import top_k
from outrider.ops import TokenLists

FRONT = 0.15  # of the layers
LEAST = 1e-30


class SpAtten(Rival):
    """Tokens leave layer by layer and do not come back: those that have had the least attention so far, in all heads.

    As published: the importance of a token is the sum of its attention probabilities over heads, queries and the layers that
    have run; one list serves all heads; a token that is pruned is gone for all later layers; the first 15% of the layers are
    dense. Chosen here: behind them the kept share falls linearly from 1.5 to 0.5 of the budget. Probabilities are a by-product
    of attention, so nothing more is touched. Head pruning, local value pruning and progressive quantisation are left out.
    """

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists | None:
        place, count = self.target.layers.index(layer), len(self.target.layers)
        dense = ceil(FRONT * count)
        if place == 0:
            self._importance = torch.zeros(len(lengths), 1, keys.shape[1], device=keys.device)
            self._left = torch.ones_like(self._importance, dtype=torch.bool)
        lists = None
        if place >= dense:
            falls = 1.5 - (place - dense) / max(count - dense - 1, 1)
            wanted = top_k(self.budget, lengths)
            assert wanted is not None
            kept = torch.where(wanted < lengths, (wanted * falls).ceil().long(), lengths)
            lists = self.top((self._importance + LEAST) * self._left, lengths, kept=kept)
            self._left = self.marks(lists, keys.shape[1])
        probabilities = self.mass(layer, queries, keys, lengths) * self._left  # of all tokens; those that are left share them
        self._importance += (probabilities / probabilities.sum(-1, keepdim=True).clamp(min=LEAST)).sum(1, keepdim=True)
        return lists
