"""The method `dustin`: Dustin (arXiv 2606.24957), as far as it is guided by the draft."""

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
    query_mean,
    score_rows,
    stand_in,
    top_k,
    top_p,
)
from outrider.ops import token_select
from outrider.types import Alignment, DraftScores, Selection, Shares, UnlistedFit


@dataclass(frozen=True, kw_only=True, eq=False)
class Dustin:
    """One list for all layers and heads of the target: sinks, recent tokens, then those with the most draft attention.

    As published: one index set serves the whole target; the first and last cached tokens (of the budget; 4 and 16 in the
    paper) are in it and count towards its size; draft scores come from a few heads chosen offline, over all queries
    of the round.

    Left out: the target's attention of the last accepted token, which fills a part of the published list behind the draft's.
    This is the paper's draft-only ablation (-0.71% over its 16 tasks, where the hybrid has -0.59%).

    Not found in what is published, and chosen here:
    - the heads: the paper searches "semantic retrieval heads" in three layers of the draft; ours are all that the alignment
      names for any layer of the target, each once, and their masses are averaged;
    - the budget: the paper's is a fixed number of tokens (512); ours a share of the context, equal for all methods;
    - `top_p` is not part of the method; if asked for, it applies to the same scores.
    """

    default_map: ClassVar[str] = "joint+divergence"
    per_query: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    alignment: Alignment  # on the device of the scores
    budget: Budget
    target_layers: tuple[int, ...]  # target layers with full attention, ascending
    kv_heads: int  # of the target; unused, one list serves all heads
    draft_heads: int  # query heads of the draft
    backend: str = "auto"
    scored: tuple[int, ...] = ()  # draft layers that are scored anyway
    unlisted: UnlistedFit | None = None  # of the target layers and of `part`
    part: tuple[int, int] = (0, 1)  # of the target's heads; unused, lists are shared by all heads
    draft_layers: tuple[int, ...] = field(init=False)
    rows: Tensor = field(init=False, repr=False)  # [1, 1, G] int64: the score rows that are averaged

    def __post_init__(self) -> None:
        sources = layer_sources(self.alignment, self.target_layers, self.draft_heads)
        draft_layers, rows = score_rows(sources, self.draft_heads, self.scored)
        object.__setattr__(self, "draft_layers", draft_layers)
        object.__setattr__(self, "rows", rows.unique().view(1, 1, -1))

    def entries(self, size: int, share: float | None = None) -> int:
        return longest_list(self.budget, size, self.budget.sinks + self.budget.recent, share=share)

    def select(self, scores: DraftScores, shares: Shares | None = None) -> Selection:
        check_layers(scores, self.draft_layers)
        budget = self.budget
        lists = token_select(
            query_mean(scores),
            scores.lengths,
            self.rows,
            top_k=top_k(budget, scores.lengths, shares),
            top_p=top_p(budget, scores.lengths, shares),
            sinks=budget.sinks,
            recent=budget.recent,
            width=list_width(budget, scores.mass.shape[-1], budget.sinks + budget.recent, scores.lengths.device, shares=shares),
            backend=self.backend,
        )
        count = len(self.target_layers)
        return Selection(
            layers=self.target_layers,
            indices=lists.indices.expand(count, -1, -1, -1),
            counts=lists.counts.expand(count, -1, -1),
            lengths=scores.lengths,
            unlisted=stand_in(self.unlisted, scores, self.rows, lists, self.backend),
        )
