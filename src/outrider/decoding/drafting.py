"""Propose: the draft runs ahead and keeps the queries of the round; it may attend to lists of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.config import Budget
from outrider.decoding.noise import Noise
from outrider.decoding.sampling import Sampling, distributions, draw, greedy
from outrider.guidance.selectors.base import longest_list
from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.types import DraftTrace, Selection


def propose(
    draft: LanguageModel,
    cache: KVCache,
    pending: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    vocabulary: int,
    lists: DraftLists | None = None,
    noise: Noise | None = None,
) -> DraftTrace:
    """Draft K tokens behind the pending ones.

    `pending` [B] int64 and `uniforms` [B, K], random numbers, lie on the draft's device. A draft whose logits are wider or
    narrower (padded embeddings) than the target's `vocabulary` is cut or padded to it. The draft takes K + 1 steps: the last
    one proposes nothing, but leaves the key of the last drafted token in the cache and its query in the trace. Advances `cache`
    by K + 1. With `lists` of the same rows the draft attends to these, without to its whole cache. With `noise` it chooses by
    that, and no distributions are kept.
    """
    k, own = uniforms.shape[1], draft.spec.vocabulary
    token, tokens, probs, queries = pending, [], [], []
    selections = lists.steps(cache.lengths, k + 1) if lists is not None else [None] * (k + 1)
    for step, selection in enumerate(selections):
        if own < vocabulary:  # the target may emit padding that a narrower draft does not have
            token = token.clamp(max=own - 1)
        output = draft.forward(token[:, None], cache, selection=selection, record_queries=True, logits=step < k)
        cache.advance(1)
        queries.append(output.queries)
        if step < k:
            logits = output.logits[..., :vocabulary]
            if own < vocabulary:
                logits = pad(logits, (0, vocabulary - own), value=float("-inf"))
            if sampling.greedy:
                token = greedy(logits)[:, 0]
            elif noise is not None:
                token = noise.choose(distributions(logits, sampling), step)[:, 0]
            else:
                probs.append(distributions(logits, sampling)[:, 0])
                token = draw(probs[-1], uniforms[:, step])
            tokens.append(token)
    return DraftTrace(
        tokens=torch.stack(tokens, dim=1),
        probs=torch.stack(probs, dim=1) if probs else None,
        queries=_by_layer(queries),
    )


def _by_layer(queries: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """By step and layer [B, 1, Hq, D] -> by layer [B, T, Hq, D], where heads are alike in one copy."""
    if len({step.shape for step in queries[0]}) > 1:
        return tuple(torch.cat(layer, dim=1) for layer in zip(*queries, strict=True))
    every = torch.cat([step for layer in zip(*queries, strict=True) for step in layer], dim=1)  # [B, L * T, Hq, D]
    return every.unflatten(1, (-1, len(queries))).unbind(1)


class DraftLists:
    """What the draft attends to while it drafts: the tokens its last round's queries looked at, and all that came after.

        entries of a list   [ chosen at length S0, ascending ][ S0, S0 + 1, .. S0 + 2K + 1 ]
                              count of them                     what was accepted since, and the round's own tokens

    A step at length S takes the first `count + S - S0` entries. The lists stay in place from round to round, for CUDA graphs;
    rows are those of the cache. Where the draft proposes once more before they are replaced, to be confirmed, K + 1 positions
    more follow.
    """

    def __init__(
        self, draft: ModelSpec, budget: Budget, slots: int, capacity: int, draft_tokens: int, *, confirms: bool = False
    ) -> None:
        self.layers = draft.full_layers
        self.budget = budget
        self._capacity = capacity
        self._room = (3 if confirms else 2) * (draft_tokens + 1)
        device = draft.device
        chosen = longest_list(budget, capacity, budget.sinks + budget.recent)
        heads = draft.full_shape.kv_heads
        shape = len(self.layers), slots, heads
        self.indices = torch.zeros(*shape, min(chosen + self._room, capacity), dtype=torch.int32, device=device)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)  # S0

    def rows(self, start: int, stop: int) -> DraftLists:
        """Lists of rows start .. stop - 1, sharing storage with these."""
        part = object.__new__(DraftLists)
        part.layers, part.budget, part._capacity, part._room = self.layers, self.budget, self._capacity, self._room
        part.indices, part.counts = self.indices[:, start:stop], self.counts[:, start:stop]
        part.lengths = self.lengths[start:stop]
        return part

    def steps(self, lengths: Tensor, steps: int) -> list[Selection]:
        """The lists of so many steps of one token, the first of them behind `lengths` [B] cached ones.

        Idle rows, whose lists are of a sequence that has left, get empty ones.
        """
        before = lengths + torch.arange(steps, device=lengths.device)[:, None]  # [steps, B]
        grown = (before - self.lengths).to(torch.int32)[:, None, :, None]
        counts = torch.where((grown >= 0) & (grown <= self._room), self.counts + grown, 0)  # [steps, L, B, H]
        return [
            Selection(layers=self.layers, indices=self.indices, counts=own, lengths=cached)
            for own, cached in zip(counts, before, strict=True)
        ]

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies at and past `lengths` [B] of rows that are shorter now: lists end there, and go on from there."""
        place = torch.arange(self.indices.shape[-1], device=lengths.device)
        before = (self.indices < lengths[:, None, None]) & (place < self.counts[..., None])  # lists ascend
        self.counts.copy_(torch.where((lengths < self.lengths)[:, None], before.sum(-1), self.counts))
        self.lengths.copy_(torch.minimum(self.lengths, lengths))
        self._list_what_follows()

    def replace(self, selection: Selection) -> None:
        """Lists newly chosen; `selection.lengths` is what was cached when their queries began to run."""
        self.indices[..., : selection.indices.shape[-1]] = selection.indices
        self.counts.copy_(selection.counts)
        self.lengths.copy_(selection.lengths)
        self._list_what_follows()

    def _list_what_follows(self) -> None:
        """Behind the chosen tokens every position from S0 on."""
        later = torch.arange(self._room, device=self.lengths.device)
        positions = (self.lengths[:, None] + later).clamp(max=self._capacity - 1)  # [B, room]
        places = (self.counts[..., None] + later).clamp(max=self.indices.shape[-1] - 1)  # [L, B, H, room]
        self.indices.scatter_(-1, places, positions[None, :, None].expand_as(places).to(torch.int32))

    def begin(self, lengths: Tensor) -> None:
        """Lists of sinks and recent tokens alone, for rows of which no round was scored yet. `lengths` [B] are cached."""
        sinks, width = self.budget.sinks, min(self.budget.sinks + self.budget.recent, self.indices.shape[-1])
        place = torch.arange(width, device=lengths.device)
        # behind the sinks the last tokens, those after the sinks in a context that has fewer
        recent = place + (lengths[:, None] - width).clamp(min=0)
        indices = torch.where(place < sinks, place, recent).to(torch.int32)  # [B, width]
        counts = lengths.clamp(max=width).to(torch.int32)
        shape = self.counts.shape
        self.replace(
            Selection(
                layers=self.layers,
                indices=indices[None, :, None].expand(*shape, width),
                counts=counts[None, :, None].expand(shape),
                lengths=lengths,
            )
        )

    def move(self, source: int, target: int) -> None:
        """Copy the lists of row `source` over those of row `target`."""
        for stored in (self.indices, self.counts):
            stored[:, target] = stored[:, source]
        self.lengths[target] = self.lengths[source]
