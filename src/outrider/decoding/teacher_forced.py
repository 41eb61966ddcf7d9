"""Decode-like reading: a dense prefix, then given tokens in rounds, through the same stages as generation.

Every round feeds K + 1 given tokens to the draft, scores and selects as the engine does, and runs the target over the same
tokens with the lists; a rival chooses inside that forward instead, without the draft. What the sparse target writes into its
cache stays there for the next rounds, as in generation. Documents of one length are read as one batch, B rows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from outrider.decoding.guides import Drafted, FromDraft, InTarget, begin
from outrider.decoding.prefill import ProgressCallback, prefill
from outrider.decoding.statistics import Listed, ReadCounter, Reads
from outrider.guidance.rivals import Rival
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel
from outrider.models.cache import aligned
from outrider.types import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenRound:
    """The target's predictions behind the tokens of one round, and what it read for them."""

    logits: Tensor  # [B, T, V] fp32: row i predicts the token behind the round's i-th
    cached: int  # tokens in the caches before the round
    reads: tuple[Reads, ...]  # by document
    lists: Selection | None  # where recorded: what the target read; None: everything
    queries: tuple[Tensor, ...]  # where recorded: of the target, by layer [B, T, Hq, D]; else empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The target's predictions behind one document, and what it read for them."""

    logits: Tensor  # [n, V] fp32: row i predicts the token behind the i-th given one
    kept_fraction: float
    kv_read_fraction: float
    seconds: float  # its share of the batch's


class TeacherForced:
    """A pair with a batch of documents cached in both models; `bits` are those of the keys that are scored (None: as cached).

    Without a draft every round is dense.
    """

    def __init__(
        self,
        pair: tuple[LanguageModel, LanguageModel | None],
        capacity: int,
        draft_tokens: int,
        bits: int | None = None,
        batch: int = 1,
    ) -> None:
        self.target, self.draft = pair
        self.t, self.bits = draft_tokens + 1, bits
        self.models = tuple(model for model in pair if model is not None)
        self.caches = tuple(model.new_cache(batch, aligned(capacity + self.t)) for model in self.models)

    def read(self, documents: list[list[int]], chunk: int, progress: ProgressCallback | None = None) -> None:
        """Cache documents, all of as many tokens, densely in both models, in place of what was there."""
        tokens = torch.tensor(documents, dtype=torch.int64)
        for model, cache in zip(self.models, self.caches, strict=True):
            cache.truncate(0)
            prefill(model, cache, tokens, chunk, progress)
        self._documents = tokens
        self._drafted = Drafted(self.draft or self.target, self.caches[-1])
        self._begun: dict[int, Rival] = {}  # rivals that have seen it, by identity

    def dense_twin(self) -> TeacherForced:
        """The target alone over a copy of its cache: dense rounds can be read there while this one's are sparse."""
        twin = copy.copy(self)
        twin.draft, twin.models, twin.caches = None, self.models[:1], (copy.deepcopy(self.caches[0]),)
        return twin

    def run(self, tokens: list[list[int]], selector: Selector | Rival | None, min_context: int = 0) -> list[Run]:
        """Predict behind each of `tokens`, as many behind every document; the caches come back as they were."""
        started = time.perf_counter()
        rounds = list(self.rounds(tokens, selector, min_context))
        logits = torch.cat([one.logits for one in rounds], dim=1)
        seconds, cached = time.perf_counter() - started, sum(one.cached for one in rounds)
        runs = []
        for row, reads in enumerate(zip(*(one.reads for one in rounds), strict=True)):
            read, dense = sum(one.bytes_read for one in reads), sum(one.bytes_dense for one in reads)
            runs.append(
                Run(
                    logits=logits[row],
                    kept_fraction=sum(one.listed for one in reads) / max(cached, 1),
                    kv_read_fraction=read / max(dense, 1),
                    seconds=seconds / len(tokens),
                )
            )
        return runs

    def rounds(
        self,
        tokens: list[list[int]],
        selector: Selector | Rival | None,
        min_context: int = 0,
        t: int | None = None,
        *,
        record: bool = False,
    ) -> Iterator[GivenRound]:
        """`run`, round by round, so that nobody need hold all logits; `t` tokens a round, K + 1 unless given. With `record`
        rounds bring their lists and queries along.

        With a `selector` rounds behind at least `min_context` tokens are sparse. The caches come back as they were once the
        last round has been taken.
        """
        target_cache, draft = self.caches[0], self.draft or self.target
        prefix = target_cache.lengths.clone()
        layers = selector.draft_layers if selector is not None and not isinstance(selector, Rival) else ()
        width, specs = t or self.t, (self.target.spec, draft.spec)
        counter = ReadCounter(*specs, layers, self.bits)
        guide, touched = self._guide(selector), [0.0] * len(tokens)
        try:
            for part in torch.tensor(tokens, dtype=torch.int64).split(width, dim=1):
                lengths = target_cache.lengths.clone()
                cached, lists = int(lengths[0]), None
                if guide is not None:
                    lists = guide.lists(part, lengths, cached, sparse=cached >= max(min_context, 1))
                output = self.target.forward(part, target_cache, selection=lists, record_queries=record)
                selection = lists.made if lists is not None else None
                found: list[tuple[Any, ...]] = [()] * len(tokens)
                if selection is not None:
                    listed = Listed.of(selection, self.target.spec, target_cache.capacity)
                    found = [(listed.layers, *one) for one in torch.stack([listed.tokens, listed.rows], 1).tolist()]
                reads = [counter.of(cached, part.shape[1], *one) for one in found]
                if guide is not None:
                    before, touched = touched, guide.touched(len(tokens))
                    more = [round(b - a) for a, b in zip(before, touched, strict=True)]
                    reads = [replace(one, bytes_read=one.bytes_read + x) for one, x in zip(reads, more, strict=True)]
                for cache in self.caches:
                    cache.advance(part.shape[1])
                yield GivenRound(
                    logits=output.logits.float(),
                    cached=cached,
                    reads=tuple(reads),
                    lists=selection if record else None,
                    queries=output.queries,
                )
        finally:
            for cache in self.caches:
                cache.truncate(prefix)

    def _guide(self, selector: Selector | Rival | None) -> FromDraft | InTarget | None:
        if selector is None:
            return None
        if isinstance(selector, Rival):
            if id(selector) not in self._begun:
                self._begun[id(selector)] = begin(selector, self.target, self.caches[0], self._documents)
            return InTarget(copy.deepcopy(self._begun[id(selector)]), self.target, self.caches[0])
        return FromDraft(selector, self._drafted, self.bits)
