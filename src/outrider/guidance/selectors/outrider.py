"""The method `outrider`: one list per KV head, every query of the round votes, sinks and recent tokens always kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from outrider.config import Budget
from outrider.errors import OptionError, PairError
from outrider.guidance.budgets import bounds, divide, list_factors
from outrider.guidance.selectors.base import (
    check_layers,
    layer_sources,
    list_width,
    longest_list,
    own_part,
    per_kv_head,
    query_mean,
    score_rows,
    stand_in,
    top_k,
    top_p,
)
from outrider.ops import token_select
from outrider.types import Alignment, DraftScores, Selection, Shares, UnlistedFit


@dataclass(frozen=True, kw_only=True, eq=False)
class Outrider:
    """Draft-guided lists per KV head.

    Goes past STS and SpecAttn in four points: draft layer and head are searched jointly; query heads that share a KV head share
    a list, from the mean of their draft heads' masses, so that no key is read twice; lists come from the mean over all
    queries of the round; `budget.sinks` first and `budget.recent` last cached tokens are always listed and count
    towards `budget.keep`. Lists differ in length by layer and KV head, as calibration found best for predictions, where the
    alignment has costs (`budget.allocation`; `guidance/budgets.py`); together they have no more than equal ones would have.
    """

    default_map: ClassVar[str] = "joint+divergence"
    per_query: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    alignment: Alignment  # sources on the device of the scores; per query head, per KV head or shared
    budget: Budget
    target_layers: tuple[int, ...]  # target layers with full attention, ascending
    kv_heads: int  # of the target
    draft_heads: int  # query heads of the draft
    backend: str = "auto"
    scored: tuple[int, ...] = ()  # draft layers that are scored anyway
    unlisted: UnlistedFit | None = None  # of the target layers and of `part`
    part: tuple[int, int] = (0, 1)  # of the lists, that are made here: which one, of how many equal ones
    draft_layers: tuple[int, ...] = field(init=False)
    rows: Tensor = field(init=False, repr=False)  # [Lt, Hs, G] int64 score rows, Hs = 1 or Hkv / parts
    bounds: Tensor | None = field(init=False, repr=False)  # [2, Lt, 1, Hs] fp64: see `budgets.divide`; None: all lists alike
    longest: float = field(init=False, repr=False)  # what the longest list has, in terms of an equal part

    def __post_init__(self) -> None:
        sources = per_kv_head(layer_sources(self.alignment, self.target_layers, self.draft_heads), self.kv_heads)
        draft_layers, rows = score_rows(sources, self.draft_heads, self.scored)
        object.__setattr__(self, "draft_layers", draft_layers)
        object.__setattr__(self, "rows", own_part(rows, self.part))
        factors = self._factors(rows.shape[1])  # of all lists: what one gets depends on the others
        divided = None if factors is None else own_part(bounds(factors).to(rows.device), self.part, 3)
        object.__setattr__(self, "bounds", divided)
        object.__setattr__(self, "longest", 1.0 if factors is None else float(factors.max()))

    def _factors(self, lists: int) -> Tensor | None:
        """Of so many lists a layer.

        Raises OptionError where fitted lists are asked for and the alignment has none for these heads.
        """
        costs, keep, allocation = self.alignment.costs, self.budget.keep, self.budget.allocation
        if costs is None and allocation == "fitted":
            raise OptionError("allocation", allocation, "flat, or an alignment with budgets (of `outrider calibrate`)")
        if costs is None or keep is None or allocation == "flat":
            return None
        if costs.values.shape[1] != lists:
            raise PairError(f"alignment: has costs of {costs.values.shape[1]} lists a layer, but {lists} lists")
        return list_factors(costs, self.target_layers, keep)

    def entries(self, size: int, share: float | None = None) -> int:
        lists, forced = len(self.target_layers) * self.rows.shape[1], self.budget.sinks + self.budget.recent
        return lists * longest_list(self.budget, size, forced, self.longest, share)

    def select(self, scores: DraftScores, shares: Shares | None = None) -> Selection:
        check_layers(scores, self.draft_layers)
        budget, forced = self.budget, self.budget.sinks + self.budget.recent
        kept = top_k(budget, scores.lengths, shares)
        if budget.keep is not None and self.bounds is not None:
            keep = budget.keep if shares is None else shares.kept
            whole = scores.lengths < budget.min_context
            if shares is not None:
                whole |= shares.kept >= 1
            kept = divide(scores.lengths.double() * keep, self.bounds, forced)
            kept = kept.masked_fill(whole[:, None], scores.mass.shape[-1])
        lists = token_select(
            query_mean(scores),
            scores.lengths,
            self.rows,
            top_k=kept,
            top_p=top_p(budget, scores.lengths, shares),
            sinks=budget.sinks,
            recent=budget.recent,
            merge="mean",
            width=list_width(budget, scores.mass.shape[-1], forced, scores.lengths.device, self.longest, shares),
            backend=self.backend,
        )
        return Selection(
            layers=self.target_layers,
            indices=lists.indices,
            counts=lists.counts,
            lengths=scores.lengths,
            unlisted=stand_in(self.unlisted, scores, self.rows, lists, self.backend),
        )
