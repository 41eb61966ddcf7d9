"""The method `tidal`: TidalDecode (Yang et al., arXiv 2410.05076)."""

from __future__ import annotations

from torch import Tensor

from outrider.guidance.rivals.base import Rival
from outrider.ops import TokenLists

DENSE_LAYERS = 2  # first layers of the model
AGAIN = 13 / 32  # of the depth, where tokens are selected a second time


class Tidal(Rival):
    """Full attention in two layers selects tokens; the layers behind each of them read these, at the same positions.

    As published: two dense layers, selection in the third and again in one layer of the middle (the paper's best is the 13th
    of 32; here the one at that share of the depth), by the layer's own attention scores. Chosen here: lists per KV head, from
    the sum over its query heads, and the mean over a round's queries. The selecting layers read all keys and values.
    """

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists | None:
        if layer < DENSE_LAYERS:
            return None
        layers = [x for x in self.target.layers if x >= DENSE_LAYERS]
        again = max(layers[0] + 1, round(AGAIN * (self.target.layers[-1] + 1)))
        if layer in (layers[0], next((x for x in layers if x >= again), None)):
            self._lists = self.top(self.by_kv_head(self.mass(layer, queries, keys, lengths)), lengths)
            return None  # this layer itself reads everything
        return self._lists
