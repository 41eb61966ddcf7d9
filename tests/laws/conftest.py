"""One speculative round, stage by stage, with everything that the laws want to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.config import Budget, SamplingParams
from outrider.decoding.drafting import propose
from outrider.decoding.prefill import prefill
from outrider.decoding.sampling import Sampling
from outrider.decoding.scoring import score
from outrider.guidance.selectors import SELECTORS, Selector, build_selector
from outrider.models import KVCache, LanguageModel
from outrider.types import DraftScores, DraftTrace, Selection


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round up to the verification: both caches hold `lengths` tokens, the target's without those of the round."""

    target: LanguageModel
    draft: LanguageModel
    target_cache: KVCache
    draft_cache: KVCache
    lengths: Tensor  # [B]
    tokens: Tensor  # [B, T]: the pending and the drafted tokens
    trace: DraftTrace
    selector: Selector
    scores: DraftScores
    selection: Selection

    @classmethod
    def guided(cls, selector: Selector, **stages: Any) -> Round:
        """Score and select, as the engine does."""
        draft, cache, trace, lengths = (stages[name] for name in ("draft", "draft_cache", "trace", "lengths"))
        scores = score(draft, cache, trace.queries, lengths, selector.draft_layers, per_query=selector.per_query)
        return cls(selector=selector, scores=scores, selection=selector.select(scores), **stages)

    def select_again(self, selector: Selector) -> Round:
        """The same round under another selector."""
        kept = ("target", "draft", "target_cache", "draft_cache", "lengths", "tokens", "trace")
        return Round.guided(selector, **{name: getattr(self, name) for name in kept})

    def verify(self, selection: Selection | None) -> Tensor:
        """Logits of the target over the round's tokens [B, T, V]; the cache stays as long as it was."""
        return self.target.forward(self.tokens, self.target_cache, selection=selection).logits


@pytest.fixture(scope="session")
def make_selector(align: Callable[..., Any]) -> Callable[..., Selector]:
    """`make_selector(pair, method, alignment=None, **budget)`: with a random alignment when none is given."""

    def make(pair, method, alignment=None, **budget) -> Selector:
        target, draft = pair
        return build_selector(
            method,
            alignment=(alignment or align(*pair)).map(SELECTORS[method].default_map).alignment,
            budget=Budget(**({"sinks": 2, "recent": 4, "min_context": 8, "unlisted": "none"} | budget)),
            target_layers=target.spec.full_layers,
            kv_heads=target.spec.layers[0].kv_heads,
            draft_heads=draft.spec.layers[0].query_heads,
        )

    return make


@pytest.fixture(scope="session")
def begin_round(make_selector: Callable[..., Selector]) -> Callable[..., Round]:
    """`begin_round(pair, prompts, method="outrider", k=3, alignment=None, **budget)`: prefill, propose, score, select."""

    def begin(pair, prompts, method="outrider", k=3, alignment=None, **budget) -> Round:
        target, draft = pair
        caches = [model.new_cache(len(prompts), max(map(len, prompts)) + k + 3) for model in pair]
        for row, prompt in enumerate(prompts):
            for model, cache in zip(pair, caches, strict=True):
                prefill(model, cache.rows(row, row + 1), torch.tensor([prompt[:-1]]), 11)
        lengths = caches[0].lengths.clone()
        pending = torch.tensor([prompt[-1] for prompt in prompts])
        uniforms = torch.full((len(prompts), k), 0.5)
        trace = propose(
            draft, caches[1], pending, Sampling.of([SamplingParams()] * len(prompts)), uniforms, target.spec.vocabulary
        )
        return Round.guided(
            make_selector(pair, method, alignment, **budget),
            target=target,
            draft=draft,
            target_cache=caches[0],
            draft_cache=caches[1],
            lengths=lengths,
            tokens=torch.cat([pending[:, None], trace.tokens], dim=1),
            trace=trace,
        )

    return begin


@pytest.fixture(scope="session")
def read_rows() -> Callable[[Selection, LanguageModel], list[list[list[set[int]]]]]:
    """`read_rows(selection, target)[layer][b][kv_head]`: the cached rows that the lists name, counted naively."""

    def rows(selection: Selection, target: LanguageModel) -> list[list[list[set[int]]]]:
        found = []
        for row, layer in enumerate(selection.layers):
            kv_heads = target.spec.layers[layer].kv_heads
            owners = selection.counts.shape[2]
            found.append([[set() for _ in range(kv_heads)] for _ in range(selection.counts.shape[1])])
            for b, sequence in enumerate(found[-1]):
                for owner in range(owners):
                    listed = selection.indices[row, b, owner, : int(selection.counts[row, b, owner])].tolist()
                    readers = range(kv_heads) if owners == 1 else [owner * kv_heads // owners]
                    for head in readers:
                        sequence[head] |= set(listed)
        return found

    return rows
