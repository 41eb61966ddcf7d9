"""The method `twilight`: Twilight (Lin et al., arXiv 2502.02770) over Quest."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from outrider.guidance.rivals.labels import coded, coded_bytes
from outrider.guidance.rivals.quest import DENSE_LAYERS, Quest
from outrider.ops import TokenLists, attention_mass

BASE = 1 / 4  # share of the tokens that the base selector may pass on
BITS = 4
LEAST = 1e-30


class Twilight(Quest):
    """Per query head, of the pages that Quest would read, the fewest tokens that hold a share of the attention, guessed from
    keys in 4 bits.

    As published: a base selector with a generous budget, here Quest, names candidates; their keys in 4 bits, each with a range
    of its own, give estimated weights; the smallest set whose weights reach `budget.top_p` is attended to, exactly; the first
    two layers are dense. Chosen here: the base passes on a quarter of the tokens; weights are normalised over the candidates
    for each query, then averaged over the round's; a share of 1 keeps every token, as for every method. `touched` is the bounds
    of Quest and the coded keys of the candidates, those of query heads that share a KV head once.
    """

    budgeted: ClassVar[str] = "top_p"

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists | None:
        if layer < DENSE_LAYERS:
            return None
        return self.top(self.estimated(layer, queries, keys, lengths), lengths)

    def estimated(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """Weights of the candidates, 0 elsewhere [B, Hq, S]."""
        candidates = self.pages(queries, keys, lengths, (lengths * BASE).ceil().long())
        marks = self.marks(candidates, keys.shape[1])  # [B, Hq, S]
        read = marks.unflatten(1, (self.target.kv_heads, -1)).any(2).sum((1, 2))
        self.touched = self.touched + read.double() * coded_bytes(self.target.head_dim, BITS)
        guessed = coded(keys.float(), BITS)
        mass = attention_mass(queries.float(), guessed, lengths, scale=self.target.scales[layer], reduce="none")
        mass = mass * marks[:, None]  # [B, T, Hq, S]
        return (mass / mass.sum(-1, keepdim=True).clamp(min=LEAST)).mean(1)
