"""The method `h2o`: H2O (Zhang et al., arXiv 2306.14048)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.guidance.rivals.base import Rival
from outrider.guidance.selectors.base import top_k
from outrider.ops import TokenLists

LEAST = 1e-30


class H2O(Rival):
    """Heavy hitters: per KV head, the tokens that have had the most attention so far, and as many recent ones; what is evicted
    does not come back.

    As published: half of the budget is for heavy hitters, half for recent tokens; the score of a token is the sum of its
    attention probabilities over all queries since it came, those of the prompt included; from then on attention over the kept
    tokens alone adds to it. Chosen here: lists per KV head, from the sum over its query heads (the paper's models have one
    query head to each); the prompt is read with full attention, and evicted from behind it.
    """

    window = None  # all queries of the prompt

    def begin(self, keys: Callable[[int], Tensor], lengths: Tensor) -> None:
        size = int(lengths.max())
        shape = len(lengths), self.target.kv_heads, size
        self._sums = {layer: torch.zeros(shape, device=lengths.device) for layer in self.target.layers}
        self._kept = {layer: torch.ones(shape, dtype=torch.bool, device=lengths.device) for layer in self.target.layers}

    def observe(self, queries: tuple[Tensor, ...], keys: Callable[[int], Tensor], start: int) -> None:
        for layer in self.target.layers:
            asked, cached = queries[layer].float(), keys(layer).float()  # [B, T, Hq, D], [B, start + T, Hkv, D]
            t, size = asked.shape[1], cached.shape[1]
            grouped = asked.unflatten(2, (self.target.kv_heads, -1))
            logits = torch.einsum("btkgd,bskd->bkgts", grouped, cached) * self.target.scales[layer]
            hidden = torch.arange(size, device=cached.device) > start + torch.arange(t, device=cached.device)[:, None]
            self._sums[layer][..., :size] += logits.masked_fill_(hidden, -torch.inf).softmax(-1).sum((2, 3))

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists:
        more = keys.shape[1] - self._sums[layer].shape[-1]  # what has come since
        sums, kept = pad(self._sums[layer], (0, more)), pad(self._kept[layer], (0, more), value=True)
        budget = top_k(self.budget, lengths)
        assert budget is not None
        recent = int(budget.min()) // 2
        lists = self.top((sums + LEAST) * kept, lengths, recent=recent)
        listed = self.marks(lists, keys.shape[1])
        mass = self.mass(layer, queries, keys, lengths).unflatten(1, (self.target.kv_heads, -1)) * listed[:, :, None]
        share = mass / mass.sum(-1, keepdim=True).clamp(min=LEAST)  # of the attention over what is kept
        later = torch.arange(keys.shape[1], device=keys.device) >= lengths.view(-1, 1, 1)
        self._sums[layer] = sums + queries.shape[1] * share.sum(2)
        self._kept[layer] = listed | later
        return lists
