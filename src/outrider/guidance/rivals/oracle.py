"""The method `oracle`: the target's own attention says what to keep. It reads all keys to find out: a bound, not a method."""

from __future__ import annotations

from torch import Tensor

from outrider.guidance.rivals.base import Rival
from outrider.ops import TokenLists


class Oracle(Rival):
    """Per KV head, the tokens with the most softmax mass of the layer's own queries, summed over the group."""

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists:
        self.touched = self.touched + lengths.double() * self.target.row_bytes
        return self.top(self.by_kv_head(self.mass(layer, queries, keys, lengths)), lengths)
