"""How probable given continuations are behind their contexts, read as the engine reads while it generates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from outrider.decoding.outrider import Outrider
from outrider.decoding.pair import make_rival, make_selector
from outrider.decoding.statistics import Statistics
from outrider.decoding.teacher_forced import TeacherForced
from outrider.guidance.rivals import RIVALS, Rival
from outrider.guidance.selectors import SELECTORS
from outrider.guidance.selectors.base import Selector
from outrider.models.quantized_keys import code_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """Tokens to score behind their context."""

    index: int  # by which the caller knows it
    prefix: tuple[int, ...]  # all of the context but its last token: read densely, as a prompt is
    given: list[int]  # fed in rounds: the token before each of the wanted ones
    wanted: list[int]

    @classmethod
    def of(cls, index: int, context: list[int], wanted: list[int]) -> Continuation:
        """`wanted` behind `context`; at least one token each."""
        return cls(index=index, prefix=tuple(context[:-1]), given=[context[-1], *wanted[:-1]], wanted=wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How probable a continuation is."""

    logprob: float  # natural logarithm, summed over its tokens
    is_greedy: bool  # every token of it is the most probable one
    statistics: Statistics  # a dense chunk of a continuation counts as the rounds that its tokens would make


class Scorer:
    """Scores continuations under an engine's options: in mode sparse the target reads its lists, in the others all."""

    def __init__(self, engine: Outrider) -> None:
        self.engine, self.config = engine, engine.config
        self.t = engine.config.draft_tokens + 1
        self.bits = code_bits(engine.config.score_keys, engine.draft, self.t)
        self.selector = self._make_selector()

    def score(self, continuations: list[Continuation]) -> Iterator[tuple[Continuation, Score]]:
        """Every continuation with its score, those with long contexts first; a context that several have is read once."""
        if not continuations:
            return
        self.engine.release()  # the caches here need the memory
        pair = self.engine.target, self.engine.draft if self.selector is not None else None
        capacity = max(len(one.prefix) + len(one.given) for one in continuations)
        reader = TeacherForced(pair, capacity, self.config.draft_tokens, self.bits)
        ordered = sorted(continuations, key=lambda one: (-len(one.prefix), one.prefix))
        for prefix, group in groupby(ordered, key=lambda one: one.prefix):
            reader.read([list(prefix)], self.config.prefill_chunk)
            for one in group:
                yield one, self._score(reader, one)

    def _score(self, reader: TeacherForced, one: Continuation) -> Score:
        """In rounds of K + 1 tokens where one of them is sparse, else in chunks."""
        least = max(self.config.budget.min_context, 1)
        sparse = self.selector is not None and len(one.prefix) + (len(one.given) - 1) // self.t * self.t >= least
        width = self.t if sparse else self.config.prefill_chunk
        statistics = Statistics(
            mode=self.config.mode,
            method=self.config.method if self.selector is not None else None,
            prompt_tokens=len(one.prefix) + 1,
            accepted_at=[0] * self.config.draft_tokens,
        )
        logprob, is_greedy, done = 0.0, True, 0
        for part in reader.rounds([one.given], self.selector if sparse else None, least, width):
            [logits], [reads] = part.logits, part.reads
            n = logits.shape[0]
            wanted = torch.tensor(one.wanted[done : done + n], device=logits.device)
            logprob += float(logits.log_softmax(-1).gather(-1, wanted[:, None]).sum())
            is_greedy &= bool((logits.argmax(-1) == wanted).all())
            done += n
            rounds = -(-n // self.t)
            statistics.rounds += rounds
            statistics.listed += rounds * reads.listed
            statistics.cached += rounds * part.cached
            statistics.bytes_read += rounds * reads.bytes_read
            statistics.bytes_dense += rounds * reads.bytes_dense
        return Score(logprob=logprob, is_greedy=is_greedy, statistics=statistics)

    def _make_selector(self) -> Selector | Rival | None:
        engine, config = self.engine, self.config
        if config.mode == "sparse" and config.method in RIVALS:
            return make_rival(config.method, engine.target, config.budget)
        if config.mode != "sparse" or engine.alignments is None:
            return None
        alignment = engine.alignments.map(engine.map_name or SELECTORS[config.method].default_map).alignment
        pair = engine.target, engine.draft
        return make_selector(*pair, config.method, alignment, config.budget, config.draft_tokens, self.bits)
