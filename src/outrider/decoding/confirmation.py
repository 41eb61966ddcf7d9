"""Confirm: one dense forward of the target over the tentative tokens that sparse rounds have brought.

    caches before   [ confirmed 0 .. C )[ C .. C + n )      written over lists: the last confirmed token and all n tentative
                                                            ones but the last, which is pending
    the draft                           [ x_n ] d_1 .. d_K     proposes behind them
    dense forward                       [ last, x_1 .. x_n, d_1 .. d_K ]   writes these rows anew; says what follows each
    caches after    [ 0 .. C + a + 1 )                      a of these tokens passed; what follows them is drawn, and pending

Tentative token x_i is what the sparse target chose by the noise of its position (see `noise`). What the dense target chooses by
the same noise stands, so x_i passes where that is x_i: the text is the one that the dense target alone would have drawn,
whatever the sparse rounds proposed. The test is that of a round, with the sparse target as the draft. Drafted tokens d_i have
been chosen by the same noise, and pass by the same test. See docs/exactness.md.

All rows of a batch take part as soon as one is due. One that has no tentative token gets its next one from the dense target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outrider.config import MAX_EXACT_EVERY, EngineConfig
from outrider.decoding.drafting import DraftLists, propose
from outrider.decoding.rounds import Inputs, Judge, Outcome, RoundKind, accept
from outrider.decoding.sequence import Sequence
from outrider.models import KVCache, LanguageModel
from outrider.models.attention import ROUND
from outrider.types import DraftTrace

WIDTH = 32  # on a GPU tokens are filled up to `ROUND`, whose attention is faster, or a multiple: few shapes to capture
FILLER = -1  # equal to no token, so it never passes


def most_tentative(config: EngineConfig) -> int:
    """Tokens that a row may have to confirm at a time: a round begins with one too few, and may bring K + 1."""
    return (config.exact_every or MAX_EXACT_EVERY) + config.draft_tokens


def spare_rows(config: EngineConfig) -> int:
    """Rows that a cache has beyond those of its sequences, which a forward that confirms may write on."""
    return most_tentative(config) + config.draft_tokens + 1 + WIDTH if config.confirms else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What is to be confirmed, on the device."""

    confirmed: Tensor  # [B] int64: C, cached tokens that stand
    counts: Tensor  # [B] int64: n, tentative tokens
    behind: Tensor  # [B] bool: rows whose tokens the draft has not read; its cache of these stays as it is
    tokens: Tensor  # [B, W] int64: last confirmed token, tentative ones, FILLER


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationKind:
    """What decides the shapes of a confirmation."""

    round: RoundKind
    width: int  # W
    listed: bool  # the draft reads lists


class BlockBuffer:
    """The tentative tokens of up to `slots` sequences, on host and device."""

    COUNTS = 3  # confirmed, tentative, behind; tokens follow

    def __init__(self, slots: int, most: int, k: int, device: torch.device) -> None:
        """Of up to `most` tokens a sequence, with room for `k` drafted ones behind them."""
        self._fills_up, self._k = device.type == "cuda", k
        self.width = self._padded(most + 1)  # the largest W
        shape = slots, self.COUNTS + self.width
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(shape, dtype=torch.int64, device=device)

    def load(self, running: list[Sequence], rows: int, behind: set[int]) -> int:
        """Put what the sequences hold into the first rows, some of them `behind`; returns W."""
        width = self._padded(1 + max([len(sequence.tentative) for sequence in running], default=0))
        self._host[:rows] = FILLER
        self._host[:rows, : self.COUNTS + 1] = 0  # idle rows read one token behind none
        for row, sequence in enumerate(running):
            count, tokens = len(sequence.tentative), sequence.unconfirmed
            numbers = [sequence.cached - count, count, row in behind, *tokens]
            self._host[row, : len(numbers)] = torch.tensor(numbers)
        self._device[:rows].copy_(self._host[:rows], non_blocking=True)
        return width

    def load_nothing(self, rows: int, cached: int, tokens: int) -> int:
        """Put rows without a sequence there, `tokens` to be read behind `cached` ones; returns W."""
        width = self._padded(max(tokens - self._k, 1))
        self._host[:rows] = 0
        self._host[:rows, 0] = cached
        self._device[:rows].copy_(self._host[:rows], non_blocking=True)
        return width

    def _padded(self, tokens: int) -> int:
        width = tokens + self._k
        if not self._fills_up:
            return width
        return ROUND if width <= ROUND else -(-width // WIDTH) * WIDTH

    def unpack(self, rows: int, width: int) -> Block:
        """The first rows; waits for nothing."""
        held = self._device[:rows, : self.COUNTS + width]
        return Block(confirmed=held[:, 0], counts=held[:, 1], behind=held[:, 2] > 0, tokens=held[:, self.COUNTS :])


def confirm(
    models: list[LanguageModel],
    caches: list[KVCache],
    block: Block,
    inputs: Inputs,
    lists: DraftLists | None,
    stop: int,
    judge: Judge,
    *,
    listed: bool,
) -> Outcome:
    """Judge the tentative tokens of all rows, and K drafted ones behind them, by the dense target; bring both caches to what
    passed. Waits for nothing.

    No row has more than `stop` tokens with all W behind what is confirmed. The draft reads `lists` where it is `listed`.
    `models` and `caches` are the target's, then the draft's. The noise of `inputs` begins behind the confirmed tokens. In the
    outcome all W - 1 tokens behind the first count as drafted, of which none that is filler is accepted.
    """
    (target, draft), (cache, draft_cache) = models, caches
    read = draft_cache.lengths.clone()
    drafted = _go_on(draft, draft_cache, block, inputs, lists if listed else None, target.spec.vocabulary)
    target.ranks.same(drafted)
    places = block.counts[:, None] + 1 + torch.arange(drafted.shape[1], device=drafted.device)
    tokens = block.tokens.scatter(1, places, drafted)
    cache.truncate(block.confirmed)
    logits = target.forward(tokens.clamp(min=0), cache, stop=stop).logits
    trace = DraftTrace(tokens=tokens[:, 1:], probs=None, queries=(), tentative=block.counts)
    outcome = accept(trace, logits, inputs, None, target, [cache], judge)
    draft_cache.truncate(torch.where(block.behind, read, cache.lengths))
    if lists is not None:
        lists.truncate(cache.lengths)
    return outcome


def _go_on(
    draft: LanguageModel, cache: KVCache, block: Block, inputs: Inputs, lists: DraftLists | None, vocabulary: int
) -> Tensor:
    """What the draft proposes behind the last tentative token of each row, [B, K]. Its cache has all of them then, should they
    all pass."""
    lengths = torch.where(block.behind, cache.lengths, block.confirmed + block.counts)
    cache.truncate(lengths)
    if lists is not None:
        lists.truncate(lengths)
    last = block.tokens.gather(1, block.counts[:, None])[:, 0]
    noise = None if inputs.noise is None else replace(inputs.noise, first=lengths + 1)
    return propose(draft, cache, last, inputs.sampling, inputs.draft_uniforms, vocabulary, lists, noise).tokens
