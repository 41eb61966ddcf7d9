"""The quality guard of mode sparse, on the host: is a sequence's text still the dense target's, and what if not?

Every `guard_every` rounds of a sequence the dense target reads a round's tokens, too (`audits.py`). Two things are watched:

    disagreement     at each of the T positions the total variation distance d of the two distributions that a token would be
                     drawn from, in greedy decoding 0 or 1; its mean shall be `guard_tolerance` at most
    recalled mass    the share of the dense target's attention to cached tokens that is to listed ones; as many tokens drawn at
                     random hold their own share s of it, all hold 1, and lists shall hold sqrt(s), half way, at least

The second is needed since text that has gone astray agrees with itself: behind "and and and" the dense target says "and", too.

A few positions say little, so each sequence gathers evidence by betting (Waudby-Smith and Ramdas, arXiv 2010.09686):

    a stake w of the capital on "it is more than m"     capital *= 1 - w + w d / m

Whatever the distribution of d: where its mean, given all that came before, is m at most, the capital is not expected to grow.
An alarm is a capital of `ALARM`. Begun anew behind audits that have left it below 1 (Shin, Ramdas and Rinaldo, arXiv
2203.03532) it sees what goes wrong late, too, and false alarms are `ALARM` audits apart on average, at least. How often they
are where positions are alike: docs/exactness.md.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import sqrt

from outrider.config import Budget, EngineConfig
from outrider.decoding.sequence import Sequence

ALARM = 1000.0
STAKES = 1 / 8, 1 / 4, 1 / 2  # a third of the capital each: small ones see little failures, large ones great ones soon
CALM = 20.0  # capital on "less than half the tolerance" at which a sequence may read less again
POOR = 0.05  # share of audits that may find too little mass on the lists
WINDOW = 4  # audits that a recalled mass is averaged over: as many as it takes to see all layers
WARY = 10.0  # so many times as much is wanted after each return that was followed by an alarm


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What one audit has found of one sequence."""

    differences: list[float]  # [T] disagreement by position, in 0 .. 1
    recalled: float  # share of the dense target's attention to cached tokens that is to listed ones, in some layers
    kept: float  # share of the cached tokens that is listed


class Evidence:
    """That the mean of numbers in 0 .. 1 is above a bound."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._capital = [1.0] * len(STAKES)

    def add(self, numbers: list[float]) -> float:
        """The capital behind one more audit, which has found these."""
        for at, stake in enumerate(STAKES):
            capital = max(self._capital[at], 1.0)
            for number in numbers:
                capital *= 1 - stake + stake * number / self._bound
            self._capital[at] = capital
        return sum(self._capital) / len(STAKES)


class Calm:
    """Evidence that the mean of numbers in 0 .. 1 is below a bound, by half of the largest stake there is."""

    def __init__(self, bound: float) -> None:
        self._bound, self._capital = bound, 1.0

    def add(self, numbers: list[float]) -> float:
        """The capital behind one more audit, which has found these."""
        self._capital = max(self._capital, 1.0)
        for number in numbers:
            self._capital *= 1 + 0.5 * (self._bound - number) / (1 - self._bound)
        return self._capital


def levels(budget: Budget) -> tuple[float, ...]:
    """The shares a guard may let lists keep: the budget's, twice as much (of a top-k budget), everything."""
    share = budget.keep or budget.top_p or 1.0
    doubled = (2 * share,) if budget.keep is not None and 2 * share < 1 else ()
    return (share, *doubled, 1.0) if share < 1 else (1.0,)


class Guard:
    """One sequence's: how much its lists keep, by its own audits alone, so that neighbours do not change its text."""

    def __init__(self, every: int, tolerance: float, shares: tuple[float, ...]) -> None:
        self._every, self._tolerance, self._shares = every, tolerance, shares
        self._level, self._wanted = 0, CALM
        self._returned = False
        self._restart()

    @property
    def share(self) -> float | None:
        """What lists keep now; None: as the budget says; 1: everything, for good."""
        return self._shares[self._level] if self._level else None

    @property
    def reads_all(self) -> bool:
        return self._level == len(self._shares) - 1

    def is_due(self, round_: int) -> bool:
        """The sequence's `round_`-th round, counted from 1, is to be audited. Who reads everything has nothing to audit."""
        return not self.reads_all and round_ % self._every == 0

    def add(self, audit: Audit) -> int:
        """The change of level that an audit brings: 1 up, -1 down, 0, and always 0 with tolerance 1."""
        if self._tolerance == 1:
            return 0
        self._recalled.append(audit.recalled)
        poor = sum(self._recalled) / len(self._recalled) < sqrt(audit.kept)
        alarm = max(self._differs.add(audit.differences), self._misses.add([float(poor)]))
        if alarm >= ALARM:
            self._wanted *= WARY if self._returned else 1
            return self._move(1)
        if self._calm.add(audit.differences) >= self._wanted and self._level and not poor:
            self._returned = True
            return self._move(-1)
        return 0

    def _move(self, by: int) -> int:
        self._level += by
        self._restart()
        return by

    def _restart(self) -> None:
        self._differs, self._misses = Evidence(self._tolerance), Evidence(POOR)
        self._calm = Calm(self._tolerance / 2)
        self._recalled: deque[float] = deque(maxlen=WINDOW)


def turn_of(sequence: Sequence) -> int:
    """Which layers the next audit of a sequence looks at, of `WINDOW` parts: its own audits alone decide."""
    return sequence.statistics.audits % WINDOW


class Guards:
    """The guards of a run; none in other modes, or where nobody has asked for them."""

    def __init__(self, sequences: list[Sequence], config: EngineConfig) -> None:
        self._guards: dict[int, Guard] = {}
        self._least = config.budget.min_context  # a shorter sequence reads everything
        if config.guards and config.guard_every is not None:
            every, tolerance, shares = config.guard_every, config.guard_tolerance, levels(config.budget)
            self._guards = {sequence.index: Guard(every, tolerance, shares) for sequence in sequences}

    def due(self, running: list[Sequence], under_way: int) -> list[bool]:
        """By row, whether its next round is to be audited; so many rounds are under way."""
        return [
            (guard := self._guards.get(sequence.index)) is not None and guard.is_due(sequence.statistics.rounds + under_way + 1)
            for sequence in running
        ]

    def heed(self, sequence: Sequence, audit: Audit) -> bool:
        """Record an audit of the round that `sequence` has just had; True where it is to read everything from now on."""
        guard, statistics = self._guards[sequence.index], sequence.statistics
        statistics.audits += 1
        statistics.audited_positions += len(audit.differences)
        statistics.differed += sum(audit.differences)
        statistics.recalled += audit.recalled
        change = guard.add(audit)
        statistics.budget_raised += change > 0
        statistics.budget_lowered += change < 0
        sequence.share = guard.share
        if not (change and guard.reads_all) or sequence.finish_reason is not None:
            return False
        statistics.fallbacks, statistics.fell_back_at = 1, len(sequence.tokens)
        return True
