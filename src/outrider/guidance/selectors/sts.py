"""The method `sts`: Speculative Token Sparsity (arXiv 2605.15508), section 4."""

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
    own_part,
    query_mean,
    score_rows,
    stand_in,
    top_k,
    top_p,
)
from outrider.ops import token_select
from outrider.types import Alignment, DraftScores, Selection, Shares, UnlistedFit


@dataclass(frozen=True, kw_only=True, eq=False)
class Sts:
    """Per query head, the top-k tokens of the one draft head that overlaps most with it.

    As published: proportional layer map, Jaccard head map, one list per target query head, no sinks and no recent window of
    its own (`budget.sinks` and `budget.recent` are ignored), tokens outside the list are dropped.

    Not found in what is published, and chosen here:
    - how the lists of a round's queries become one: from the mean of their masses;
    - the budget: the paper's is a fixed number of tokens (256, 512); ours a share of the context, equal for all methods;
    - `top_p` is not part of the method; if asked for, it applies to the same scores.
    """

    default_map: ClassVar[str] = "proportional+jaccard"
    per_query: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    alignment: Alignment  # on the device of the scores; as many lists as it has heads
    budget: Budget
    target_layers: tuple[int, ...]  # target layers with full attention, ascending
    kv_heads: int  # of the target; unused, lists are per query head
    draft_heads: int  # query heads of the draft
    backend: str = "auto"
    scored: tuple[int, ...] = ()  # draft layers that are scored anyway
    unlisted: UnlistedFit | None = None  # of the target layers and of `part`
    part: tuple[int, int] = (0, 1)  # of the lists, that are made here: which one, of how many equal ones
    draft_layers: tuple[int, ...] = field(init=False)
    rows: Tensor = field(init=False, repr=False)  # [Lt, Hq / parts, 1] int64 score rows

    def __post_init__(self) -> None:
        sources = layer_sources(self.alignment, self.target_layers, self.draft_heads)
        draft_layers, rows = score_rows(sources, self.draft_heads, self.scored)
        object.__setattr__(self, "draft_layers", draft_layers)
        object.__setattr__(self, "rows", own_part(rows, self.part))

    def entries(self, size: int, share: float | None = None) -> int:
        return len(self.target_layers) * self.rows.shape[1] * longest_list(self.budget, size, 0, share=share)

    def select(self, scores: DraftScores, shares: Shares | None = None) -> Selection:
        check_layers(scores, self.draft_layers)
        lists = token_select(
            query_mean(scores),
            scores.lengths,
            self.rows,
            top_k=top_k(self.budget, scores.lengths, shares),
            top_p=top_p(self.budget, scores.lengths, shares),
            width=list_width(self.budget, scores.mass.shape[-1], 0, scores.lengths.device, shares=shares),
            backend=self.backend,
        )
        return Selection(
            layers=self.target_layers,
            indices=lists.indices,
            counts=lists.counts,
            lengths=scores.lengths,
            unlisted=stand_in(self.unlisted, scores, self.rows, lists, self.backend),
        )
