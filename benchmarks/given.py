"""Documents cached in both models, with given tokens behind them, for studies of what the target reads.

Rounds are those of `decoding/teacher_forced.py`. What the draft makes of them is kept, and the attention of the target's layers
can be replaced.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast
from unittest.mock import patch

import torch
from torch import Tensor

from outrider.config import Budget
from outrider.decoding.pair import find_alignment, make_selector
from outrider.decoding.prefill import prefill
from outrider.decoding.scoring import score
from outrider.decoding.statistics import ReadCounter
from outrider.eval.facts import draw_facts
from outrider.eval.facts_task import Question, plant
from outrider.guidance.selectors.base import query_mean
from outrider.guidance.selectors.outrider import Outrider
from outrider.models import LanguageModel, attention
from outrider.models.cache import aligned
from outrider.types import Lists

CHUNK = 2048

Note = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A round of given tokens and what the draft made of the cache for it."""

    tokens: Tensor  # [1, T]
    length: int  # cached tokens before it
    mass: Tensor  # [L, Hkv, S] fp32, of the draft heads that a target head is aligned with; sums to what the past gets


class Reader(Lists, Protocol):
    """Attends in place of `sparse_attention`: says which layers have lists, and computes all of them."""

    def begin(self, given: Given, number: int) -> float:
        """The next round; returns the cached rows that it reads, of all layers and KV heads."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *_: Any, scale: float, **__: Any) -> Tensor:
        """Like `sparse_attention`: queries [1, T, Hq, D], keys and values [1, N, Hkv, D] -> [1, T, Hq, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A case over given tokens."""

    logits: Tensor  # [n, V]
    bytes_read: float
    bytes_dense: float


class Document:
    """A pair with a text cached, and given tokens behind it."""

    def __init__(self, pair: tuple[LanguageModel, LanguageModel], tokens: list[int], room: int, draft_tokens: int) -> None:
        self.target, self.draft = pair
        self.t = draft_tokens + 1
        self.caches = tuple(model.new_cache(1, aligned(len(tokens) + room + self.t)) for model in pair)
        for model, cache in zip(pair, self.caches, strict=True):
            prefill(model, cache, torch.tensor([tokens]), CHUNK)
        alignments = find_alignment(None, *pair)
        assert alignments is not None  # of the built-in pair
        alignment = alignments.map(Outrider.default_map).alignment
        self.selector = cast(Outrider, make_selector(*pair, "outrider", alignment, Budget(), draft_tokens))
        self.counter = ReadCounter(self.target.spec, self.draft.spec, self.selector.draft_layers)

    def rounds(self, tokens: list[int]) -> list[Given]:
        """What the draft makes of `tokens`, for all cases."""
        cache, found = self.caches[1], []
        before = cache.lengths.clone()
        for part in torch.tensor([tokens]).split(self.t, dim=1):
            lengths = cache.lengths.clone()
            queries = self.draft.forward(part, cache, record_queries=True, logits=False).queries
            scores = score(self.draft, cache, queries, lengths, self.selector.draft_layers, per_query=False)
            mass = query_mean(scores)[0][self.selector.rows].mean(2)
            found.append(Given(tokens=part, length=int(lengths), mass=mass))
            cache.advance(part.shape[1])
        cache.truncate(before)
        return found

    def run(self, rounds: list[Given], reader: Reader | None) -> Ran:
        """The target over the rounds, densely without a reader; the cache comes back as it was."""
        cache, logits, read, dense = self.caches[0], [], 0.0, 0.0
        before = cache.lengths.clone()
        for number, given in enumerate(rounds):
            if reader is None:
                logits.append(self.target.forward(given.tokens, cache).logits[0])
            else:
                rows = reader.begin(given, number)
                reads = self.counter.of(given.length, self.t, self.target.spec.full_layers, 0.0, rows)
                read, dense = read + reads.bytes_read, dense + reads.bytes_dense
                with patch.object(attention, "sparse_attention", reader.attend):
                    logits.append(self.target.forward(given.tokens, cache, selection=reader).logits[0])
            cache.advance(given.tokens.shape[1])
        cache.truncate(before)
        return Ran(logits=torch.cat(logits), bytes_read=read, bytes_dense=dense)


def prepare(
    pair: tuple[LanguageModel, LanguageModel], tokens: list[int], scored: int, facts: int, draft_tokens: int, seed: int
) -> tuple[Document, list[int], list[Question]]:
    """The document before the last `scored` of `tokens`, with facts planted in it; those last ones, and the questions."""
    rng = random.Random(seed)
    text, questions = plant(pair[0], tokens[:-scored], draw_facts(rng, facts), rng) if facts else (tokens[:-scored], [])
    following = tokens[len(text) : len(text) + scored]
    return Document(pair, text, max(scored, len(tokens) - len(text)), draft_tokens), following, questions
