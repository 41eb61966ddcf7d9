"""Confirm: one dense forward of the target over the tentative tokens that sparse rounds have brought.

    caches before   [ confirmed 0 .. C )[ C .. C + n )      written over lists: the last confirmed token and all n tentative
                                                            ones but the last, which is pending
    the draft                           [ x_n ] d_1 .. d_t     proposes behind them
    dense forward                       [ last, x_1 .. x_n, d_1 .. d_t ]   writes these rows anew; says what follows each
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
from outrider.models import KVCache, LanguageModel
from outrider.models.attention import ROUND
from outrider.types import DraftTrace

WIDTH = 32  # on a GPU tokens are filled up to `ROUND` or a multiple of this: few shapes to capture, and kernels are as fast
FILLER = -1  # equal to no token, so it never passes


def tail(k: int) -> int:
    """Tokens that the draft proposes behind tentative ones, where rounds draft `k`: more, since a dense forward costs more than
    a sparse one, and as much for a few tokens more."""
    return k + k // 2


def most_tentative(config: EngineConfig) -> int:
    """Tokens that a row may have to confirm at a time: one too few, and those of a round under way and of one behind it."""
    return (config.exact_every or MAX_EXACT_EVERY) + 2 * config.draft_tokens + 1


def spare_rows(config: EngineConfig) -> int:
    """Rows that a cache has beyond those of its sequences, which a forward that confirms may write on."""
    return most_tentative(config) + tail(config.draft_tokens) + 1 + WIDTH if config.confirms else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmationKind:
    """What decides the shapes of a confirmation."""

    round: RoundKind
    width: int  # W
    listed: bool  # the draft reads lists


class TentativeTokens:
    """What sparse rounds have brought each of up to `slots` sequences since it was last confirmed. Rounds put it there, on the
    device, and confirmations take it, so one can be launched before the host knows what it is to confirm."""

    def __init__(self, slots: int, most: int, tail: int, least: int, device: torch.device) -> None:
        """Of up to `most` tokens a sequence, with room for a `tail` of drafted ones behind them. What a round brings a sequence
        of less than `least` cached tokens stands."""
        self._fills_up, self.tail, self._least = device.type == "cuda", tail, least
        self.width = self.width_of(most)  # the largest W
        self._tokens = torch.zeros(slots, self.width, dtype=torch.int64, device=device)  # the last that stands, tentative ones
        self._counts = torch.zeros(slots, dtype=torch.int64, device=device)  # n, tentative ones

    def width_of(self, count: int) -> int:
        """W of a forward over up to so many tentative tokens of each row."""
        width = 1 + count + self.tail
        if not self._fills_up:
            return width
        return ROUND if width <= ROUND else -(-width // WIDTH) * WIDTH

    def clear(self, slots: int | slice) -> None:
        """Nothing is tentative there."""
        self._counts[slots] = 0

    def move(self, source: int, slot: int) -> None:
        """A sequence changes its slot."""
        for stored in (self._tokens, self._counts):
            stored[slot] = stored[source]
        self._counts[source] = 0

    def hold(self, pending: Tensor, lengths: Tensor, outcome: Outcome, active: Tensor) -> None:
        """Keep what a round has brought the first rows, behind `lengths` [B] cached tokens and the `pending` one [B]."""
        tokens, counts = self._tokens[: len(pending)], self._counts[: len(pending)]
        brought, emitted = outcome.emitted
        tokens[:, 0] = torch.where(counts == 0, pending, tokens[:, 0])
        places = counts[:, None] + 1 + torch.arange(emitted.shape[1], device=tokens.device)
        tokens.scatter_(1, places, emitted)
        counts += torch.where(lengths >= self._least, brought * active, 0)

    def take(self, rows: int, width: int, pending: Tensor) -> tuple[Tensor, Tensor]:
        """What the first rows hold, and hold no longer: how many tentative tokens [B], and [B, W] the last token that stands,
        the tentative ones and filler. Without tentative ones the last token is the `pending` one [B]."""
        tokens, counts = self._tokens[:rows, :width], self._counts[:rows]
        place = torch.arange(width, device=tokens.device)
        first = torch.where(counts == 0, pending, tokens[:, 0])
        held = torch.where(place <= counts[:, None], torch.cat([first[:, None], tokens[:, 1:]], dim=1), FILLER)
        taken = counts.clone()
        counts.zero_()
        return taken, held


def confirm(
    models: list[LanguageModel],
    caches: list[KVCache],
    counts: Tensor,
    tokens: Tensor,
    inputs: Inputs,
    lists: DraftLists | None,
    stop: int,
    judge: Judge,
    *,
    drafts: int,
    listed: bool,
) -> Outcome:
    """Judge the tentative tokens of all rows, and so many that the draft proposes behind them, by the dense target; bring both
    caches to what passed. Waits for nothing.

    `counts` [B] and `tokens` [B, W] are those that `TentativeTokens` has had. No row has more than `stop` tokens with all W
    behind what is confirmed. The draft reads `lists` where it is `listed`. `models` and `caches` are the target's, then the
    draft's. The noise of `inputs` begins behind the confirmed tokens. In the outcome all W - 1 tokens behind the first count as
    drafted, of which none that is filler is accepted.
    """
    (target, draft), (cache, draft_cache) = models, caches
    noise = None if inputs.noise is None else replace(inputs.noise, first=cache.lengths + 1)
    uniforms = inputs.draft_uniforms[:, :1].expand(-1, drafts)  # of their number alone: nothing is drawn but by the noise
    drafting = inputs.pending, inputs.sampling, uniforms, target.spec.vocabulary, lists if listed else None, noise
    drafted = propose(draft, draft_cache, *drafting, behind=inputs.behind(cache), scored=False).tokens
    target.ranks.same(drafted)
    places = counts[:, None] + 1 + torch.arange(drafted.shape[1], device=drafted.device)
    tokens = tokens.scatter(1, places, drafted)
    cache.truncate(cache.lengths - counts)
    logits = target.forward(tokens.clamp(min=0), cache, stop=stop).logits
    inputs.pending.copy_(tokens[:, 0])  # what the others follow
    trace = DraftTrace(tokens=tokens[:, 1:], probs=None, queries=(), tentative=counts)
    outcome = accept(trace, logits, inputs, None, target, caches, judge)
    if lists is not None:
        lists.truncate(cache.lengths)
    return outcome
