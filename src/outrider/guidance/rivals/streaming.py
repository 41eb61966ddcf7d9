"""The method `streaming`: StreamingLLM (Xiao et al., arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.guidance.rivals.base import Rival
from outrider.guidance.selectors.base import top_k
from outrider.ops import TokenLists

SINKS = 4  # as published


class Streaming(Rival):
    """The first four tokens and as many of the last ones as the budget has room for, in all layers; nothing is scored.

    Not as published: positions stay what they are (the paper counts them within the cache), since the rows of a cache that
    keeps everything are encoded already.
    """

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists:
        kept = top_k(self.budget, lengths)
        assert kept is not None
        place = torch.arange(int(kept.max()), device=lengths.device)
        behind = lengths[:, None] - kept[:, None]  # how far the recent tokens' places are from their positions
        indices = torch.where(place < SINKS, place, place + behind).masked_fill(place >= kept[:, None], -1)
        return TokenLists(indices[:, None].int(), kept[:, None].int())
