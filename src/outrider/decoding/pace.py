"""When tentative tokens are confirmed: how many a row gathers before a dense forward."""

from __future__ import annotations

from outrider.config import MAX_EXACT_EVERY, EngineConfig
from outrider.decoding.confirmation import tail
from outrider.decoding.sequence import Sequence
from outrider.models.attention import ROUND

NARROW, WIDE = 1.6, 1.75  # a confirmation, of `ROUND` tokens or more, is as long as so many sparse rounds; until measured
PRIOR = 15.0, 0.5  # tokens that passed and that did not, as if they had been seen
MEMORY = 0.95  # what was seen before a round or a confirmation counts so much behind it


class Pace:
    """N for one row, from what became of its tentative tokens: how many more of them pass, where all before them did.

    Where a token passes with probability a, and a round brings m tokens, N tentative tokens bring

        (1 - a^(N + 1)) / (1 - a) + a^N d           tokens that stand: tentative ones, one recovered or bonus token, and where
                                                    all pass d of those that the draft has proposed behind them,
        N / m + c                                   rounds: sparse ones, and a confirmation that costs c = `narrow` where it
                                                    has at most `ROUND` tokens for sure, else `wide`

    and N is where the quotient is largest. It is flat there, so c need not be known well. All of this is the row's own.
    """

    def __init__(self, fixed: int | None, k: int) -> None:
        """`fixed` is N where it is given, `k` are the drafted tokens of a round."""
        self.narrow, self.wide = NARROW, WIDE
        self._fixed = fixed
        # N - 1 tokens are too few, and a round brings K + 1; with the last confirmed one and more drafted ones it is read
        self._fits = ROUND - k - 1 - tail(k)
        self._every: int | None = None  # N until the next confirmation, once asked for
        self._passed = self._rejected = 0.0
        self._tokens, self._rounds = 2.0, 1.0  # that sparse rounds brought: m
        self._drafted_on = self._whole = 0.0  # drafted tokens that passed behind blocks that passed whole, and these: d

    @property
    def agreement(self) -> float:
        """The share a of tentative tokens that pass, of those behind none that did not; in (0, 1)."""
        passed, rejected = self._passed + PRIOR[0], self._rejected + PRIOR[1]
        return passed / (passed + rejected)

    @property
    def tokens(self) -> float:
        """What a sparse round brings on average: m."""
        return self._tokens / self._rounds

    @property
    def every(self) -> int:
        """N, in 1 .. MAX_EXACT_EVERY; stays as it is until the next confirmation."""
        if self._fixed is not None:
            return self._fixed
        if self._every is None:
            m = self.tokens
            stand = [self.stand(n, m - 1) for n in range(1, MAX_EXACT_EVERY + 1)]
            costs = [n / m + (self.narrow if n <= self._fits else self.wide) for n in range(1, MAX_EXACT_EVERY + 1)]
            worth = [tokens / rounds for tokens, rounds in zip(stand, costs, strict=True)]
            self._every = 1 + worth.index(max(worth))
        return self._every

    def stand(self, count: float, expected: float) -> float:
        """Tokens that stand of so many tentative ones, and behind them; d is `expected` until it was seen."""
        a = self.agreement
        drafted_on = (self._drafted_on + expected) / (self._whole + 1)
        return (1 - a ** (count + 1)) / (1 - a) + a**count * drafted_on

    def brought(self, tokens: int) -> None:
        """A sparse round has brought so many tokens."""
        self._tokens = MEMORY * self._tokens + tokens
        self._rounds = MEMORY * self._rounds + 1

    def confirmed(self, passed: int, of: int) -> None:
        """So many of a block's tokens have passed, of which so many were tentative, and those behind them drafted."""
        self._passed = MEMORY * self._passed + min(passed, of)
        self._rejected = MEMORY * self._rejected + (passed < of)
        if passed >= of:
            self._drafted_on = MEMORY * self._drafted_on + passed - of
            self._whole = MEMORY * self._whole + 1
        self._every = None


class Confirmations:
    """Which tokens of a run are tentative, and when rows are to be confirmed. Every row has a pace of its own."""

    def __init__(self, sequences: list[Sequence], config: EngineConfig) -> None:
        k, self._fixed = config.draft_tokens, config.exact_every is not None
        self._paces = {sequence.index: Pace(config.exact_every, k) for sequence in sequences if config.confirms}
        # a shorter sequence reads everything in its rounds, whatever its neighbours do
        self._least = max(config.budget.min_context, 1) if config.confirms else None

    def pace(self, sequence: Sequence) -> Pace:
        return self._paces[sequence.index]

    def holds(self, sequence: Sequence) -> bool:
        """What a round brings behind the tokens that this sequence has cached is tentative."""
        return self._least is not None and sequence.cached >= self._least

    def are_due(self, running: list[Sequence]) -> bool:
        """Some row is to be confirmed now. All then are: they share the target's weights, and stay in step."""
        return any(sequence.tentative and self._is_due(sequence, 0) for sequence in running)

    def are_due_behind(self, running: list[Sequence], most: int) -> bool | None:
        """Some row is to be confirmed behind the round under way, which brings up to `most` tokens; None: that depends on them.

        Where N follows the pace, what a round brings on average will do. Not counted is a token that would end a text: a round
        too many changes nothing.
        """
        holding = [sequence for sequence in running if self.holds(sequence)]
        if self._fixed:
            surely, perhaps = (any(self._is_due(sequence, more) for sequence in holding) for more in (1, most))
            return None if perhaps and not surely else surely
        return any(self._is_due(sequence, self.pace(sequence).tokens) for sequence in holding)

    def _is_due(self, sequence: Sequence, more: float) -> bool:
        """With so many more tokens. A fixed N is reached; one that follows the pace is what a row comes nearest to."""
        pace = self.pace(sequence)
        nearest = 0 if self._fixed else pace.tokens / 2
        return sequence.closing or len(sequence.tentative) + more + nearest >= pace.every
