"""The method `double-sparsity`: Double Sparsity (Yang et al., arXiv 2408.07092)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from outrider.errors import OptionError
from outrider.guidance.rivals.base import Rival
from outrider.guidance.rivals.labels import coded, coded_bytes
from outrider.ops import TokenLists, attention_mass

DENSE_LAYERS = 2  # first layers of the model that read everything, as in the published code


class DoubleSparsity(Rival):
    """Per query head, the tokens whose logits are highest by a few channels: those that weigh most, found offline.

    As published: channels are ranked once per model by mean |q * k| on a text (`decoding/channels.py`); a label cache holds a
    quarter of them in 4 bits for every key, a sixteenth of a 16-bit key; the best tokens by these channels are attended to,
    with no sinks and no recent window. Chosen here: query heads that share a KV head share its label cache (the published code
    has one for each query head); logits are turned into mass before they are averaged over a round's queries; query labels
    are not coded. `touched` is the label cache: its codes, and two numbers of 16 bits a row.
    """

    share: ClassVar[float] = 1 / 4  # of the channels
    bits: ClassVar[int | None] = 4  # of a label; None: as cached

    def __post_init__(self) -> None:
        if self.target.channels is None:
            raise OptionError("channels", None, "a file made by `outrider calibrate --channels` for this target")

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists | None:
        if layer < DENSE_LAYERS:
            return None
        return self.top(self.guessed(layer, queries, keys, lengths), lengths)

    def guessed(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """Softmax mass by the labels, mean over the queries [B, Hq, S]."""
        assert self.target.channels is not None
        heads, width = self.target.kv_heads, max(1, round(self.target.head_dim * self.share))
        channels = self.target.channels[layer, :, :width].to(keys.device)  # [Hkv, r]
        labels = keys.float().gather(-1, channels.expand(*keys.shape[:2], -1, -1))  # [B, S, Hkv, r]
        grouped = queries.float().unflatten(2, (heads, -1))  # [B, T, Hkv, G, D]
        asked = grouped.gather(-1, channels[:, None].expand(*grouped.shape[:-1], -1)).flatten(2, 3)
        row = width * self.target.value_bytes if self.bits is None else coded_bytes(width, self.bits)
        self.touched = self.touched + lengths.double() * heads * row
        labels = labels if self.bits is None else coded(labels, self.bits)
        return attention_mass(asked, labels, lengths, scale=self.target.scales[layer])
