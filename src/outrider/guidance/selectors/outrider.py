"""The method `outrider`: one list per KV head, every query of the round votes, sinks and recent tokens always kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from outrider.config import Budget
from outrider.guidance.selectors.base import (
    check_layers,
    layer_sources,
    list_width,
    longest_list,
    per_kv_head,
    query_mean,
    score_rows,
    stand_in,
    top_k,
    top_p,
)
from outrider.ops import token_select
from outrider.types import Alignment, DraftScores, Selection, UnlistedFit


@dataclass(frozen=True, kw_only=True, eq=False)
class Outrider:
    """Draft-guided lists per KV head.

    Goes past STS and SpecAttn in four points: draft layer and head are searched jointly; query heads that share a KV head share
    a list, from the mean of their draft heads' masses, so that no key is read twice; lists come from the mean over all
    queries of the round; `budget.sinks` first and `budget.recent` last cached tokens are always listed and count
    towards `budget.keep`.
    """

    default_map: ClassVar[str] = "joint+divergence"
    default_unlisted: ClassVar[str] = "mean"
    per_query: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    alignment: Alignment  # on the device of the scores; per query head, per KV head or shared
    budget: Budget
    target_layers: tuple[int, ...]  # target layers with full attention, ascending
    kv_heads: int  # of the target
    draft_heads: int  # query heads of the draft
    backend: str = "auto"
    scored: tuple[int, ...] = ()  # draft layers that are scored anyway
    unlisted: UnlistedFit | None = None  # of the target layers
    draft_layers: tuple[int, ...] = field(init=False)
    rows: Tensor = field(init=False, repr=False)  # [Lt, Hs, G] int64 score rows, Hs = 1 or Hkv

    def __post_init__(self) -> None:
        sources = per_kv_head(layer_sources(self.alignment, self.target_layers, self.draft_heads), self.kv_heads)
        draft_layers, rows = score_rows(sources, self.draft_heads, self.scored)
        object.__setattr__(self, "draft_layers", draft_layers)
        object.__setattr__(self, "rows", rows)

    def entries(self, size: int) -> int:
        forced = self.budget.sinks + self.budget.recent
        return len(self.target_layers) * self.rows.shape[1] * longest_list(self.budget, size, forced)

    def select(self, scores: DraftScores) -> Selection:
        check_layers(scores, self.draft_layers)
        budget = self.budget
        lists = token_select(
            query_mean(scores),
            scores.lengths,
            self.rows,
            top_k=top_k(budget, scores.lengths),
            top_p=top_p(budget, scores.lengths),
            sinks=budget.sinks,
            recent=budget.recent,
            merge="mean",
            width=list_width(budget, scores.mass.shape[-1], budget.sinks + budget.recent, scores.lengths.device),
            backend=self.backend,
        )
        return Selection(
            layers=self.target_layers,
            indices=lists.indices,
            counts=lists.counts,
            lengths=scores.lengths,
            unlisted=stand_in(self.unlisted, scores, self.rows, lists, self.backend),
        )
