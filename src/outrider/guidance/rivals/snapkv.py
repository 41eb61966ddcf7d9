"""The method `snapkv`: SnapKV (Li et al., arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from outrider.guidance.rivals.base import Rival
from outrider.ops import TokenLists

KERNEL = 5  # tokens that scores are averaged over, as in the published code


class SnapKV(Rival):
    """Once, behind the prompt: per KV head the tokens that its last 32 queries look at, smoothed over 5 neighbours; then these
    for good, the window itself, and all that follows.

    As published, but for: lists per KV head, from the sum over its query heads (the paper's models have one query head to
    each), and average pooling, which the code offers beside maximum pooling. What a growing text adds is kept on top of the
    budget, which is a share of the prompt.
    """

    window = 32

    def begin(self, keys: Callable[[int], Tensor], lengths: Tensor) -> None:
        self._prompt = lengths.clone()
        self._lists: dict[int, TokenLists] = {}

    def observe(self, queries: tuple[Tensor, ...], keys: Callable[[int], Tensor], start: int) -> None:
        before, recent = torch.full_like(self._prompt, start), queries[0].shape[1]
        for layer in self.target.layers:
            mass = self.by_kv_head(self.mass(layer, queries[layer], keys(layer), before))
            smooth = avg_pool1d(mass, KERNEL, stride=1, padding=KERNEL // 2)
            self._lists[layer] = self.top(smooth, self._prompt, recent=recent)

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists:
        first = self._lists[layer]
        since = lengths - self._prompt  # [B]
        extra = torch.arange(int(since.max()), device=lengths.device)
        width = first.indices.shape[-1] + len(extra)
        place = torch.arange(width, device=lengths.device) - first.counts[..., None]  # behind the first list: 0, 1, ..
        later = (self._prompt.view(-1, 1, 1) + place).masked_fill(place >= since.view(-1, 1, 1), -1)
        indices = torch.where(place < 0, pad(first.indices, (0, len(extra)), value=-1), later)
        return TokenLists(indices.int(), (first.counts + since[:, None]).int())
