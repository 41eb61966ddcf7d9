"""The method `spatten`: SpAtten (Wang, Zhang, Han, arXiv 2012.09852)."""

from __future__ import annotations

from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from outrider.guidance.rivals.base import Rival, Rows
from outrider.guidance.selectors.base import top_k
from outrider.ops import TokenLists

FRONT = 0.15  # of the layers
VALUES = 0.3  # of a head's tokens: those whose values it reads
HEADS = ((2 / 3, 13 / 16), (11 / 12, 10 / 16))  # behind this share of the depth, this share of the heads is left
LEAST = 1e-30


class SpAtten(Rival):
    """Tokens leave layer by layer and do not come back: those that have had the least attention so far. Of those that are left
    a head reads the values of its most probable ones.

    As published: the importance of a token is the sum of its attention probabilities over heads, queries and the layers that
    have run; one list serves all heads; a token that is pruned is gone for all later layers; the first 15% of the layers keep
    all tokens. Behind the softmax a head reads the values of its most probable tokens alone, in every layer, without
    renormalising (local value pruning). Heads go likewise, by the magnitudes of their outputs so far: their output is zero in
    all later layers. The shares are those of the workload that the authors have published for GPT-2 medium (24 layers, 16
    heads): values of 30% of the tokens; 13 heads from layer 16 on, 10 from layer 22.

    Pruning heads is off unless a subclass sets `heads = HEADS`: it ruins the built-in target, which was not tuned for it, and,
    as groups of heads share their keys, spares next to nothing (docs/results.md has the figures).

    Not found there, and chosen here: behind the front the kept share of tokens falls linearly from 1.5 to 0.5 of the budget; a
    round's queries share what they prune; the round's own tokens are always read; where the budget keeps every token, no head
    and no value is pruned either. The paper's models have one query head to each KV head: here query heads are pruned, so that
    keys are spared only where a whole group is gone, and values that no head of the group wants. Progressive quantisation is
    left out. Probabilities and outputs are by-products of attention, so nothing more is touched.
    """

    values: ClassVar[float] = VALUES
    heads: ClassVar[tuple[tuple[float, float], ...]] = ()

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists | None:
        place, count = self.target.layers.index(layer), len(self.target.layers)
        wanted = top_k(self.budget, lengths)
        assert wanted is not None
        if place == 0:
            size, device = keys.shape[1], keys.device
            self._importance = torch.zeros(len(lengths), 1, size, device=device)
            self._left = (torch.arange(size, device=device) < lengths[:, None])[:, None]  # [B, 1, S]
            self._worth = torch.zeros(len(lengths), self.target.query_heads, device=device)
            self._alive = torch.ones_like(self._worth, dtype=torch.bool)
            self._prunes = (wanted < lengths)[:, None]  # [B, 1]
        dense = ceil(FRONT * count)
        if place < dense:
            return None
        falls = 1.5 - (place - dense) / max(count - dense - 1, 1)
        kept = torch.where(wanted < lengths, (wanted * falls).ceil().long(), lengths)
        lists = self.top((self._importance + LEAST) * self._left, lengths, kept=kept)
        self._left = self.marks(lists, keys.shape[1])
        return lists

    def attended(self, layer: int, queries: Tensor, keys: Rows, values: Rows, lengths: Tensor, output: Tensor) -> Tensor:
        self._prune_heads(self.target.layers.index(layer) / len(self.target.layers) + 0.5 / len(self.target.layers))
        weights = self._probabilities(layer, queries, keys(layer), lengths) * self._alive[:, :, None, None]  # [B, Hq, T, S]
        self._importance += weights.sum((1, 2))[:, None]
        left = self._left.sum(-1)[:, 0]  # [B]
        fewest = torch.where(self._prunes[:, 0], (self.values * left).ceil().long(), left)
        read = self.marks(self.top(weights.sum(2), lengths, kept=fewest), weights.shape[-1]) & self._left  # [B, Hq, S]
        own = torch.arange(weights.shape[-1], device=weights.device) >= lengths.view(-1, 1, 1)  # the round's tokens
        weights = (weights * (read | own)[:, :, None]).unflatten(1, (self.target.kv_heads, -1))
        rows = _present(values(layer), lengths, queries.shape[1])
        pruned = torch.einsum("bkgts,bskd->btkgd", weights, rows).flatten(2, 3).to(output.dtype)
        self._worth += pruned.float().abs().sum((1, 3))
        alive = self._alive.unflatten(1, (self.target.kv_heads, -1))  # [B, Hkv, G]
        wanted = (read.unflatten(1, (self.target.kv_heads, -1)) & alive[..., None]).any(2)  # [B, Hkv, S]
        unread = (self._left & ~wanted).sum((1, 2)) + (self._left & ~alive.any(-1)[..., None]).sum((1, 2))  # values, and keys
        self.spared = self.spared + unread.double() * (self.target.row_bytes // self.target.kv_heads)
        return torch.where(self._prunes[..., None, None], pruned, output)

    def _prune_heads(self, depth: float) -> None:
        """Leave the heads of the largest outputs so far, as many as the depth, a share of the layers, has room for."""
        heads = self._worth.shape[1]
        count = max(1, round(next((left for behind, left in reversed(self.heads) if depth >= behind - 1e-6), 1.0) * heads))
        if count < heads:
            best = (self._worth + LEAST).masked_fill(~self._alive, 0).topk(count).indices
            self._alive = torch.zeros_like(self._alive).scatter_(1, best, True) | ~self._prunes

    def _probabilities(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """Softmax over the tokens that are left and the round's own, up to each query [B, Hq, T, S]."""
        t, position = queries.shape[1], torch.arange(keys.shape[1], device=keys.device)
        last = lengths[:, None] + torch.arange(t, device=keys.device)  # [B, T]: a query's own position
        own = (position >= lengths[:, None, None]) & (position <= last[..., None])  # [B, T, S]
        grouped = queries.float().unflatten(2, (self.target.kv_heads, -1)) * self.target.scales[layer]  # [B, T, Hkv, G, D]
        logits = torch.einsum("btkgd,bskd->bkgts", grouped, _present(keys, lengths, t)).flatten(1, 2)
        return logits.masked_fill(~(self._left | own)[:, None], -torch.inf).softmax(-1)


def _present(rows: Tensor, lengths: Tensor, t: int) -> Tensor:
    """Keys or values [B, S, Hkv, D] in fp32, 0 behind the round's `t` tokens, where anything may stand."""
    behind = torch.arange(rows.shape[1], device=rows.device) >= lengths[:, None] + t
    return rows.float().masked_fill(behind[..., None, None], 0)
