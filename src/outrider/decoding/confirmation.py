"""Confirm: one dense forward of the target over the tentative tokens that sparse rounds have brought.

    caches before   [ confirmed 0 .. C )[ C .. C + n )      written over lists: the last confirmed token and all n tentative
                                                            ones but the last, which is pending
    dense forward                       [ last, x_1 .. x_n ]   writes these rows anew; says p_1 .. p_n, and p_n+1 behind them
    caches after    [ 0 .. C + a + 1 )                      a tentative tokens passed; what follows them is drawn, and pending

Tentative token x_i was drawn from q_i, what the sparse target made of the tokens before it. To the dense target it is what a
drafted token is to a round, so the same test decides: speculative sampling, with the sparse target in the draft's place. That
the outcome follows the dense target's distribution is shown in docs/exactness.md. It takes rounds whose lists are settled by
the tokens before them: so the draft, whose tokens choose the lists, must not draw them, but proposes its most probable ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.config import MAX_EXACT_EVERY, EngineConfig
from outrider.decoding.drafting import DraftLists
from outrider.decoding.rounds import Inputs, Judge, RowOutcome, accept
from outrider.decoding.sampling import Sampling, distributions
from outrider.decoding.sequence import Sequence
from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.types import DraftTrace

WIDTH = 32  # on a GPU the tokens of a forward are filled up to a multiple: kernels meet few widths, all of a prompt's kind


def most_tentative(config: EngineConfig) -> int:
    """Tokens that a row may have to confirm at a time: a round begins with one too few, and may bring K + 1."""
    return (config.exact_every or MAX_EXACT_EVERY) + config.draft_tokens


def spare_rows(config: EngineConfig) -> int:
    """Rows that a cache has beyond those of its sequences, which a forward that confirms may write on."""
    return most_tentative(config) + 1 + WIDTH if config.confirms else 0


class SparseLogits:
    """What the sparse target said where tentative tokens were drawn, until these are confirmed.

        logits  [slots, W, V] in the target's dtype    of the token that follows position p of a row, at place p mod W

    They lie by position, so nothing is to be done when tokens are confirmed or rolled back. W has room for the most that a row
    may have to confirm, and for a round begun before that was known.
    """

    def __init__(self, target: ModelSpec, slots: int, width: int) -> None:
        self.logits = torch.zeros(slots, width, target.vocabulary, dtype=target.dtype, device=target.device)

    @staticmethod
    def width(config: EngineConfig) -> int:
        """W for an engine."""
        return most_tentative(config) + config.draft_tokens + 2

    def rows(self, start: int, stop: int) -> SparseLogits:
        """Those of rows start .. stop - 1, sharing storage with these."""
        part = object.__new__(SparseLogits)
        part.logits = self.logits[start:stop]
        return part

    def keep(self, lengths: Tensor, logits: Tensor) -> None:
        """A round's logits [B, T, V] behind `lengths` [B] cached tokens. Waits for nothing."""
        rows, places = torch.arange(len(lengths), device=lengths.device), self._places(lengths, logits.shape[1])
        self.logits[rows[:, None], places] = logits.to(self.logits.dtype)

    def of(self, lengths: Tensor, count: int) -> Tensor:
        """The logits [B, count, V] of the tokens that follow positions lengths .. lengths + count - 1."""
        rows = torch.arange(len(lengths), device=lengths.device)
        return self.logits[rows[:, None], self._places(lengths, count)]

    def move(self, source: int, target: int) -> None:
        """Copy those of row `source` over those of row `target`."""
        self.logits[target] = self.logits[source]

    def _places(self, lengths: Tensor, count: int) -> Tensor:
        return (lengths[:, None] + torch.arange(count, device=lengths.device)) % self.logits.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a runner that lie side by side, with what a confirmation changes there. All share storage with the runner's."""

    models: list[LanguageModel]  # target and draft
    caches: list[KVCache]
    pending: Tensor  # [B] int64
    lists: DraftLists | None  # None: the draft reads densely
    logits: SparseLogits | None  # None: all rows are greedy

    def row(self, number: int) -> tuple[list[KVCache], Tensor, SparseLogits | None]:
        """Caches, pending token and kept logits of one of them."""
        one = number, number + 1
        logits = None if self.logits is None else self.logits.rows(*one)
        return [cache.rows(*one) for cache in self.caches], self.pending[slice(*one)], logits


def confirm(rows: Rows, sequences: list[Sequence], judge: Judge) -> list[RowOutcome]:
    """Judge the tentative tokens of `sequences`, those of the rows, by the dense target; bring both caches to what passed.

    Every sequence has some. A row's outcome has its tentative tokens as `drafted`; `tokens` are those that stand now, the last
    of them pending. Waits for the device.
    """
    (target, draft), (cache, draft_cache) = rows.models, rows.caches
    device, counts = cache.device, [len(sequence.tentative) for sequence in sequences]
    confirmed = [sequence.cached - count for sequence, count in zip(sequences, counts, strict=True)]  # C
    lengths, held = (torch.tensor(numbers, device=device) for numbers in (confirmed, counts))
    tokens = _tokens(sequences, max(counts) + 1, device)
    cache.truncate(lengths)
    logits = target.forward(tokens, cache, stop=max(confirmed) + tokens.shape[1]).logits
    _complete(rows, draft, draft_cache, lengths + held, tokens.gather(1, held[:, None]))
    outcomes = []
    for number, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        caches, pending, kept = rows.row(number)
        inputs = _inputs(sequence, pending, count + 1)
        trace = _trace(tokens[number : number + 1, 1 : count + 1], inputs.sampling, kept, lengths[number : number + 1])
        outcomes.append(accept(trace, logits[number : number + 1, : count + 1], inputs, None, target.spec, caches, judge))
    if rows.lists is not None:
        rows.lists.truncate(cache.lengths)
    return [RowOutcome.of(outcome.numbers[0].tolist()) for outcome in outcomes]


def _tokens(sequences: list[Sequence], width: int, device: torch.device) -> Tensor:
    """The last confirmed token and the tentative ones of every sequence, filled up: [B, width], or more on a GPU."""
    width = -(-width // WIDTH) * WIDTH if device.type == "cuda" else width
    rows = [sequence.unconfirmed for sequence in sequences]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def _complete(rows: Rows, draft: LanguageModel, cache: KVCache, lengths: Tensor, last: Tensor) -> None:
    """The draft reads the last tentative tokens [B, 1], behind `lengths` [B]: its cache has them all, should they all pass."""
    cache.truncate(lengths)
    lists = None
    if rows.lists is not None:
        rows.lists.truncate(lengths)
        [lists] = rows.lists.steps(lengths, 1)
    draft.forward(last.clamp(max=draft.spec.vocabulary - 1), cache, selection=lists, logits=False)
    cache.advance(1)


def _inputs(sequence: Sequence, pending: Tensor, count: int) -> Inputs:
    """Of one row and so many tokens."""
    device = pending.device
    sampling = Sampling.of([sequence.params], device)
    return Inputs(
        pending=pending,
        active=torch.ones(1, dtype=torch.int64, device=device),
        draft_uniforms=torch.empty(1, 0, device=device),
        verify_uniforms=sequence.uniforms(count)[None].to(device),
        sampling=sampling,
        drafting=sampling,
    )


def _trace(tokens: Tensor, sampling: Sampling, kept: SparseLogits | None, lengths: Tensor) -> DraftTrace:
    """The tentative tokens [1, n] of a row, with the distributions that they were drawn from."""
    probs = None
    if not sampling.greedy:
        assert kept is not None, "a run of sampled rows keeps logits"
        probs = distributions(kept.of(lengths, tokens.shape[1]), sampling)
    return DraftTrace(tokens=tokens, probs=probs, queries=())
