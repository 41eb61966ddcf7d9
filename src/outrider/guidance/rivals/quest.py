"""The method `quest`: Quest (Tang et al., arXiv 2406.10774)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.guidance.rivals.base import Rival
from outrider.guidance.selectors.base import top_k
from outrider.ops import TokenLists

PAGE = 16  # tokens, as published
DENSE_LAYERS = 2  # first layers of the model that read everything, as published


class Quest(Rival):
    """Per query head, the pages of 16 tokens whose keys may reach the highest logits, by the bounds of their channels.

    As published: a page keeps the smallest and the largest value of each channel of its keys; its score is the sum over
    channels of the larger product with the query; the first two layers are dense. Chosen here: a round's queries share pages,
    by the mean of their scores; the last page, which is not full, is always read. `touched` is the bounds, two numbers a
    channel and page.
    """

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists | None:
        if layer < DENSE_LAYERS:
            return None
        kept = top_k(self.budget, lengths)
        assert kept is not None
        return self.pages(queries, keys, lengths, kept)

    def pages(self, queries: Tensor, keys: Tensor, lengths: Tensor, kept: Tensor) -> TokenLists:
        """Per query head the tokens of as many pages as hold `kept` [B] of them."""
        size = -(-int(lengths.max()) // PAGE) * PAGE
        rows = pad(keys[:, :size], (0, 0, 0, 0, 0, max(size - keys.shape[1], 0))).float()
        past = torch.arange(size, device=keys.device) < lengths[:, None]  # [B, S]
        pages = rows.masked_fill(~past[..., None, None], torch.nan).unflatten(1, (-1, PAGE))
        low = pages.nan_to_num(torch.inf).amin(2).nan_to_num(posinf=0.0)  # [B, pages, Hkv, D]
        high = pages.nan_to_num(-torch.inf).amax(2).nan_to_num(neginf=0.0)
        self.touched = self.touched + 2 * (lengths / PAGE).ceil().double() * self.target.row_bytes
        q = queries.float().unflatten(2, (self.target.kv_heads, -1))  # [B, T, Hkv, G, D]
        bound = torch.einsum("btkgd,bpkd->btkgp", q.clamp(min=0), high) + torch.einsum("btkgd,bpkd->btkgp", q.clamp(max=0), low)
        scores = bound.mean(1).flatten(1, 2)  # [B, Hq, pages]
        used = (lengths / PAGE).ceil().long()
        chosen = self.top(_positive(scores), used, kept=(kept / PAGE).ceil().long(), recent=1)
        return _tokens(chosen, lengths)


def _positive(scores: Tensor) -> Tensor:
    """In the same order, above 0."""
    return scores - scores.amin(-1, keepdim=True) + 1


def _tokens(pages: TokenLists, lengths: Tensor) -> TokenLists:
    """The tokens of listed pages [B, H, P]."""
    slots = torch.arange(PAGE, device=lengths.device)
    tokens = (pages.indices[..., None] * PAGE + slots).flatten(-2)  # [B, H, P * 16]
    listed = (pages.indices >= 0).repeat_interleave(PAGE, -1) & (tokens < lengths[:, None, None])
    return TokenLists(tokens.masked_fill(~listed, -1).int(), listed.sum(-1).int())
