"""Propose: the draft runs ahead and keeps the queries of the round; it may attend to lists of its own."""

from __future__ import annotations

from dataclasses import dataclass

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
    *,
    behind: Behind | None = None,
    scored: bool = True,
) -> DraftTrace:
    """Draft K tokens behind the pending ones.

    `pending` [B] int64 and `uniforms` [B, K], random numbers, lie on the draft's device. A draft whose logits are wider or
    narrower (padded embeddings) than the target's `vocabulary` is cut or padded to it. With `lists` of the same rows the draft
    attends to these, without to its whole cache. With `noise` it chooses by that, and no distributions are kept.

    Where the round is `scored`, the draft takes K + 1 steps: the last one proposes nothing, but leaves the key of the last
    drafted token in the cache and its query in the trace, which has queries then. Else K steps do, and a cache that lacks one
    token where all pass: rounds `behind` such ones begin with a step of two tokens. `cache` is advanced by what was read.
    """
    k, own = uniforms.shape[1], draft.spec.vocabulary
    read, lacking = (pending[:, None], None) if behind is None else behind.read(pending, cache.lengths)
    tokens, probs, queries = [], [], []
    steps = k + 1 if scored else k
    selections = lists.steps(cache.lengths, steps, lacking) if lists is not None else [None] * steps
    for step, selection in enumerate(selections):
        if own < vocabulary:  # the target may emit padding that a narrower draft does not have
            read = read.clamp(max=own - 1)
        output = draft.forward(read, cache, selection=selection, record_queries=scored, logits=step < k)
        cache.advance(1 if step or lacking is None else 1 + lacking)
        queries.append(output.queries)
        if step < k:
            logits = output.logits[..., :vocabulary]
            if not step and lacking is not None:
                logits = logits.gather(1, lacking[:, None, None].expand(-1, 1, logits.shape[-1]))
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
            read = token[:, None]
    return DraftTrace(
        tokens=torch.stack(tokens, dim=1),
        probs=torch.stack(probs, dim=1) if probs else None,
        queries=_by_layer(queries, lacking) if scored else (),
    )


@dataclass(frozen=True, slots=True)
class Behind:
    """What the target's cache holds; the draft's may lack the last token of it, in some rows."""

    previous: Tensor  # [B] int64: that token; of no meaning where nothing is cached
    lengths: Tensor  # [B]: cached tokens of the target

    def read(self, pending: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
        """What the first step of a draft with so many cached tokens [B] reads, and how many it lacks, 0 or 1 [B].

        That are two tokens [B, 2]: the one that is lacking and the pending one, or this and filler, whose row the next step
        writes over.
        """
        lacking = self.lengths - cached
        return torch.stack([torch.where(lacking > 0, self.previous, pending), pending], dim=1), lacking


def _by_layer(queries: list[tuple[Tensor, ...]], lacking: Tensor | None) -> tuple[Tensor, ...]:
    """By step and layer [B, 1, Hq, D] -> by layer [B, T, Hq, D], where heads are alike in one copy. A first step of two tokens
    has the round's query at `lacking` [B], 0 or 1."""
    if len({step.shape for step in queries[0]}) > 1:
        layers = tuple(torch.cat(layer, dim=1) for layer in zip(*queries, strict=True))
        return layers if lacking is None else tuple(_without_filler(layer, lacking) for layer in layers)
    every = torch.cat([step for layer in zip(*queries, strict=True) for step in layer], dim=1)  # [B, L * T, Hq, D]
    by_layer = every.unflatten(1, (len(queries[0]), -1))
    return (by_layer if lacking is None else _without_filler(by_layer, lacking)).unbind(1)


def _without_filler(queries: Tensor, lacking: Tensor) -> Tensor:
    """[B, .., 1 + T, Hq, D] -> [B, .., T, Hq, D]: of the first two the one at `lacking` [B]."""
    place = torch.arange(1, queries.shape[-3], device=queries.device).expand(len(queries), -1).clone()  # [B, T]
    place[:, 0] = lacking
    shape = *queries.shape[:-3], place.shape[1], *queries.shape[-2:]
    return queries.gather(-3, place.view(len(queries), *[1] * (queries.ndim - 4), -1, 1, 1).expand(shape))


class DraftLists:
    """What the draft attends to while it drafts: the tokens its last round's queries looked at, and all that came after.

        entries of a list   [ chosen at length S0, ascending ][ S0, S0 + 1, .. S0 + 2K + 1 ]
                              count of them                     what was accepted since, and the round's own tokens

    A step at length S takes the first `count + S - S0` entries. The lists stay in place from round to round, for CUDA graphs;
    rows are those of the cache. Where the draft proposes a `tail` of tokens before they are replaced, to be confirmed, as many
    positions and one more follow.
    """

    def __init__(self, draft: ModelSpec, budget: Budget, slots: int, capacity: int, draft_tokens: int, tail: int = 0) -> None:
        self.layers = draft.full_layers
        self.budget = budget
        self._capacity = capacity
        self._room = 2 * (draft_tokens + 1) + (tail + 1 if tail else 0)
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

    def steps(self, lengths: Tensor, steps: int, lacking: Tensor | None = None) -> list[Selection]:
        """The lists of so many steps of one token, the first of them behind `lengths` [B] cached ones, and of as many more as
        are `lacking` [B].

        Idle rows, whose lists are of a sequence that has left, get empty ones.
        """
        before = lengths + torch.arange(steps, device=lengths.device)[:, None]  # [steps, B]
        if lacking is not None:
            before[1:] += lacking
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
