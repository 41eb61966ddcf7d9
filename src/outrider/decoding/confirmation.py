"""Confirm: one dense forward of the target over the tentative tokens that sparse rounds have brought.

    caches before   [ confirmed 0 .. C )[ C .. C + n )      written over lists: the last confirmed token and all n tentative
                                                            ones but the last, which is pending
    dense forward                       [ last, x_1 .. x_n ]   writes these rows anew; says p_1 .. p_n, and p_n+1 behind them
    caches after    [ 0 .. C + a + 1 )                      a tentative tokens passed; what follows them is drawn, and pending

Tentative token x_i is what the sparse target chose by the noise of its position (see `noise`). What the dense target chooses by
the same noise stands, so x_i passes where that is x_i: the text is the one that the dense target alone would have drawn,
whatever the sparse rounds proposed. The test is that of a round, with the sparse target as the draft. See docs/exactness.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.config import MAX_EXACT_EVERY, EngineConfig
from outrider.decoding.drafting import DraftLists
from outrider.decoding.noise import Noise
from outrider.decoding.rounds import Inputs, Judge, RowOutcome, accept
from outrider.decoding.sampling import Sampling
from outrider.decoding.sequence import Sequence
from outrider.models import KVCache, LanguageModel
from outrider.types import DraftTrace

WIDTH = 32  # on a GPU the tokens of a forward are filled up to a multiple: kernels meet few widths, all of a prompt's kind


def most_tentative(config: EngineConfig) -> int:
    """Tokens that a row may have to confirm at a time: a round begins with one too few, and may bring K + 1."""
    return (config.exact_every or MAX_EXACT_EVERY) + config.draft_tokens


def spare_rows(config: EngineConfig) -> int:
    """Rows that a cache has beyond those of its sequences, which a forward that confirms may write on."""
    return most_tentative(config) + 1 + WIDTH if config.confirms else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a runner that lie side by side, with what a confirmation changes there. All share storage with the runner's."""

    models: list[LanguageModel]  # target and draft
    caches: list[KVCache]
    pending: Tensor  # [B] int64
    lists: DraftLists | None  # None: the draft reads densely

    def row(self, number: int) -> tuple[list[KVCache], Tensor]:
        """Caches and pending token of one of them."""
        one = number, number + 1
        return [cache.rows(*one) for cache in self.caches], self.pending[slice(*one)]


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
        one = slice(number, number + 1)
        caches, pending = rows.row(number)
        inputs = _inputs(sequence, pending, lengths[one] + 1)
        trace = DraftTrace(tokens=tokens[one, 1 : count + 1], probs=None, queries=())
        outcomes.append(accept(trace, logits[one, : count + 1], inputs, None, target.spec, caches, judge))
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


def _inputs(sequence: Sequence, pending: Tensor, first: Tensor) -> Inputs:
    """Of one row, whose first tentative token has position `first` [1] in its text."""
    device = pending.device
    return Inputs(
        pending=pending,
        active=torch.ones(1, dtype=torch.int64, device=device),
        draft_uniforms=torch.empty(1, 0, device=device),
        verify_uniforms=torch.empty(1, 0, device=device),
        sampling=Sampling.of([sequence.params], device),
        noise=Noise(keys=torch.tensor([sequence.key], device=device), first=first),
    )
