"""The method `specattn`: SpecAttn (arXiv 2510.27641)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from outrider.config import Budget
from outrider.errors import OptionError
from outrider.guidance.selectors.base import (
    check_layers,
    layer_sources,
    list_width,
    longest_list,
    score_rows,
    stand_in,
    top_k,
    top_p,
)
from outrider.ops import token_select, union_lists
from outrider.types import Alignment, DraftScores, Selection, Shares, UnlistedFit

DENSE_LAYERS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class SpecAttn:
    """Per target layer, the union over the round's steps of the top-p tokens of one draft layer.

    As published, with `budget.top_p`: monotone layer map by KL divergence; per step, the smallest set that holds the share p of
    the draft layer's mass; the union over the steps serves every query; the first two target layers stay dense; no sinks and
    no recent window (`budget.sinks` and `budget.recent` are ignored).

    With `budget.keep`, which the paper does not define: the same layer scores, top-k of their maximum over the steps (which is
    the union of sets cut at one common threshold), in all layers, the first two too, so that the kept share is the one asked
    for and comparable with other methods.

    Not found in what is published, and chosen here:
    - scores are averaged over the draft layer's heads and one list serves all target heads: the paper has one distribution
      and one mask per layer;
    - steps are all queries of the round; the paper's last drafted token has none, ours is scored after drafting;
    - the threshold is found by our own search, not by ten linear bisection steps from 0 to the maximum, which are too coarse
      for long contexts; the set holds at least p either way.
    """

    default_map: ClassVar[str] = "monotone+average"
    per_query: ClassVar[bool] = True
    waits: ClassVar[bool] = True

    alignment: Alignment  # on the device of the scores; heads of a layer are averaged whatever their number
    budget: Budget
    target_layers: tuple[int, ...]  # target layers with full attention, ascending
    kv_heads: int  # of the target; unused, lists are shared by all heads
    draft_heads: int  # query heads of the draft
    backend: str = "auto"
    scored: tuple[int, ...] = ()  # draft layers that are scored anyway
    unlisted: UnlistedFit | None = None  # of the target layers and of `part`
    part: tuple[int, int] = (0, 1)  # of the target's heads; unused, lists are shared by all heads
    draft_layers: tuple[int, ...] = field(init=False)
    layers: tuple[int, ...] = field(init=False)  # target layers that get lists
    groups: Tensor = field(init=False, repr=False)  # [U, G] int64: distinct sets of score rows that are averaged
    sources: Tensor = field(init=False, repr=False)  # [Lt, 1, 1] int64: the group of each listed target layer
    rows: Tensor = field(init=False, repr=False)  # [Lt, 1, G] int64: the score rows of that group

    def __post_init__(self) -> None:
        layers = self.target_layers
        if self.budget.top_p is not None:
            layers = tuple(layer for layer in layers if layer >= DENSE_LAYERS)
            if not layers:
                allowed = f"some at or past {DENSE_LAYERS}, the earlier ones stay dense under top-p"
                raise OptionError("target layers", self.target_layers, allowed)
        draft_layers, rows = score_rows(layer_sources(self.alignment, layers, self.draft_heads), self.draft_heads, self.scored)
        groups, place = rows.flatten(1).unique(dim=0, return_inverse=True)
        object.__setattr__(self, "draft_layers", draft_layers)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "sources", place.view(-1, 1, 1))
        object.__setattr__(self, "rows", rows.flatten(1)[:, None])
        if self.unlisted is not None:
            values, weights = (
                x[len(self.target_layers) - len(layers) :] for x in (self.unlisted.values, self.unlisted.weights)
            )
            object.__setattr__(self, "unlisted", UnlistedFit(values=values, weights=weights))

    def entries(self, size: int, share: float | None = None) -> int:
        return len(self.layers) * longest_list(self.budget, size, 0, share=share)

    def select(self, scores: DraftScores, shares: Shares | None = None) -> Selection:
        check_layers(scores, self.draft_layers)
        steps = torch.stack([scores.mass.index_select(2, group).mean(2) for group in self.groups], dim=2)  # [B, Q, U, S]
        if self.budget.top_p is None:
            lists = token_select(
                steps.amax(1),
                scores.lengths,
                self.sources,
                top_k=top_k(self.budget, scores.lengths, shares),
                top_p=None,
                width=list_width(self.budget, scores.mass.shape[-1], 0, scores.lengths.device, shares=shares),
                backend=self.backend,
            )
        else:
            queries = steps.shape[1]
            lengths = scores.lengths.repeat_interleave(queries)
            if shares is not None:
                shares = replace(shares, kept=shares.kept.repeat_interleave(queries))
            least = top_p(self.budget, lengths, shares)
            each = token_select(steps.flatten(0, 1), lengths, self.sources, top_k=None, top_p=least, backend=self.backend)
            lists = union_lists(
                each.indices.unflatten(1, (-1, queries)), each.counts.unflatten(1, (-1, queries)), steps.shape[-1]
            )
        return Selection(
            layers=self.layers,
            indices=lists.indices,
            counts=lists.counts,
            lengths=scores.lengths,
            unlisted=stand_in(self.unlisted, scores, self.rows, lists, self.backend),
        )
