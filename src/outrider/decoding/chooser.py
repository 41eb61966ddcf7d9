"""The cost model at work: which rounds are next, so that tokens come soonest and nobody waits longer than without a draft.

    tokens a second of     what a round brings, by the acceptance seen so far      over     what it costs (`costs`)

A choice stands for some rounds. What it has cost each sequence is kept beside what decoding alone would have cost, and what is
put at stake is bounded: where the worst outcome of a round (nothing accepted, nothing confirmed) would leave a sequence more
than `LOSS` behind, the target decodes alone, until there is room again. So a request of `HORIZON` tokens or more takes at most
3% longer than in mode plain, as far as costs are what was measured, whatever its draft is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from outrider.config import MAX_EXACT_EVERY, EngineConfig
from outrider.decoding.acceptance import Acceptance
from outrider.decoding.choice import PLAIN, Choice, widths
from outrider.decoding.costs import CONFIRMED, Costs
from outrider.decoding.pace import Confirmations
from outrider.decoding.sequence import Sequence

LOSS = 0.025  # of the time that plain decoding takes; of the 3% that are promised the rest is left to the host
HORIZON = 64  # tokens that a sequence is expected to have at least
REVIEW = 8  # rounds after which a choice is thought over
CORRECTION = 0.1  # how much of a difference between measured and predicted rounds the next prediction takes over
BETTER = 1.03  # times as many tokens a second for which it is changed


@dataclass(frozen=True, slots=True)
class Gain:
    """What a round or a confirmation has brought one sequence."""

    sequence: Sequence
    accepted: int  # drafted or tentative tokens that passed
    stands: int  # tokens emitted; tentative ones do not count


class Chooser(Protocol):
    """Who decides how rounds are run."""

    @property
    def current(self) -> Choice:
        """The last choice."""

    def choose(self, running: list[Sequence], *, listed: bool) -> Choice:
        """How the next round is run; none is under way, and no token is tentative. `listed`: it is long enough for lists."""

    def stays(self, running: list[Sequence]) -> bool:
        """The next round is of the current choice, too, whatever the one under way brings."""

    def settles(self, running: list[Sequence]) -> bool:
        """Tentative tokens are to be confirmed, though they are few: more would put too much at stake."""

    def wants_draft(self, sequence: Sequence, together: int) -> bool:
        """The draft is to read this prompt, too; so many sequences will run, this one among them."""

    def brought(self, rows: int, gains: list[Gain], seconds: float | None) -> None:
        """A round of the current choice and so many rows took so long; None: it was captured meanwhile."""

    def confirmed(self, rows: int, tokens: int, gains: list[Gain], seconds: float | None) -> None:
        """Likewise a confirmation of so many tokens a row."""


class Fixed:
    """The mode that was asked for, always. Predicts where costs are known, and chooses nothing."""

    def __init__(self, choice: Choice, costs: Costs | None) -> None:
        self._choice, self._costs = choice, costs

    @property
    def current(self) -> Choice:
        return self._choice

    def choose(self, running: list[Sequence], *, listed: bool) -> Choice:
        return self._choice

    def stays(self, running: list[Sequence]) -> bool:
        return True

    def settles(self, running: list[Sequence]) -> bool:
        return False

    def wants_draft(self, sequence: Sequence, together: int) -> bool:
        return True

    def brought(self, rows: int, gains: list[Gain], seconds: float | None) -> None:
        if self._costs is not None and gains:
            _predict(gains, self._costs.round(self._choice, rows, _cached(gains)))

    def confirmed(self, rows: int, tokens: int, gains: list[Gain], seconds: float | None) -> None:
        if self._costs is not None and gains:
            _predict(gains, self._costs.confirm(tokens, rows, _cached(gains)))


@dataclass(slots=True)
class _Account:
    """What became of one sequence's time."""

    acceptance: Acceptance
    spent: float = 0.0  # seconds of its rounds and confirmations
    alone: float = 0.0  # seconds in which the target alone would have decoded its tokens
    behind: int = 0  # tokens that its draft has not read


class Fastest:
    """Chooses among modes plain, dense and exact, whose text is the same, or with `approximate` plain, dense and sparse."""

    def __init__(
        self,
        costs: Costs,
        config: EngineConfig,
        confirmations: Confirmations,
        experience: Acceptance,
        slots: int,
    ) -> None:
        """`experience` is of all sequences of an engine, and goes on being gathered."""
        self._costs, self._config, self._confirmations, self._slots = costs, config, confirmations, slots
        self._experience = experience
        self._accounts: dict[int, _Account] = {}
        self._left = 0  # rounds until the choice is thought over
        self._current = PLAIN
        self._rows = 0  # that it was made for
        modes = [mode for mode in ("dense", "sparse") if mode in costs.rounds]
        if config.confirms and "sparse" in modes:
            modes[modes.index("sparse")] = "exact"
        self._choices = [Choice(mode, width) for mode in modes for width in widths(config.draft_tokens)]
        self._listed = False  # rounds are long enough for lists
        self._drift = dict.fromkeys(("plain", *modes), 1.0)  # measured over predicted seconds

    @property
    def current(self) -> Choice:
        return self._current

    def choose(self, running: list[Sequence], *, listed: bool) -> Choice:
        if self._left > 0 and self._rows == len(running) and (self._current == PLAIN or self._fits(self._current, running)):
            return self._current
        self._listed = listed
        self._current = self._best(running)
        self._left, self._rows = REVIEW, len(running)
        self._pace(running)
        return self._current

    def stays(self, running: list[Sequence]) -> bool:
        if self._rows != len(running):
            return False
        if self._left <= 1:  # thought over while a round is under way, which need not be waited for if nothing changes
            if self._best(running) != self._current:
                return False
            self._left = REVIEW + 1
        return self._current == PLAIN or self._fits(self._current, running, rounds=2)

    def _best(self, running: list[Sequence]) -> Choice:
        """The fastest of what puts no sequence at risk; the current choice if it is about as fast."""
        rates = {PLAIN: self._rate(PLAIN, running)}
        for choice in self._choices:
            if (self._listed or choice.mode == "dense") and self._fits(choice, running):
                rates[choice] = self._rate(choice, running)
        best = max(rates, key=lambda choice: rates[choice])
        known = self._rows > 0 and self._current in rates
        return self._current if known and rates[best] <= BETTER * rates[self._current] else best

    def settles(self, running: list[Sequence]) -> bool:
        return self._current.mode == "exact" and not self._fits(self._current, running)

    def wants_draft(self, sequence: Sequence, together: int) -> bool:
        length, rows = len(sequence.prompt), self._padded(together)
        alone = self._seconds(PLAIN, rows, length)
        tokens = self._account(sequence).acceptance.tokens
        drafted = min((self._seconds(c, rows, length) / tokens(c.k) for c in self._choices if c.mode != "exact"), default=alone)
        exact = [self._exact(c, rows, length, [sequence]) for c in self._choices if c.mode == "exact"]
        drafted = min([drafted, *(1 / rate for rate in exact)])
        wanted = (alone - drafted) * sequence.params.max_new_tokens > self._costs.read(length, length)
        self._account(sequence).behind = 0 if wanted else length - 1
        return wanted

    def brought(self, rows: int, gains: list[Gain], seconds: float | None) -> None:
        if not gains:
            return
        choice, cached = self._current, _cached(gains)
        predicted = self._costs.round(choice, rows, cached)
        _predict(gains, predicted)
        if seconds is None:
            seconds = predicted
        elif predicted > 0:
            self._drift[choice.mode] += CORRECTION * (min(max(seconds / predicted, 0.5), 2.0) - self._drift[choice.mode])
        self._left -= 1
        self._book(gains, seconds, seconds if choice == PLAIN else self._seconds(PLAIN, rows, cached))
        for gain in gains:
            account = self._account(gain.sequence)
            account.behind = 0 if choice.k else account.behind + gain.stands
            for acceptance in (account.acceptance, self._experience):
                if choice.k:
                    acceptance.add(choice.k, gain.accepted)
                else:
                    acceptance.fade()

    def confirmed(self, rows: int, tokens: int, gains: list[Gain], seconds: float | None) -> None:
        if not gains:
            return
        predicted = self._costs.confirm(tokens, rows, _cached(gains))
        _predict(gains, predicted)
        self._book(gains, predicted if seconds is None else seconds, self._seconds(PLAIN, rows, _cached(gains)))

    def _book(self, gains: list[Gain], spent: float, alone: float) -> None:
        """So many seconds were spent, where a token of the target alone takes `alone`."""
        for gain in gains:
            account = self._account(gain.sequence)
            account.spent += spent
            account.alone += gain.stands * alone

    def _account(self, sequence: Sequence) -> _Account:
        """Opened when a sequence comes, with what is known by then."""
        if sequence.index not in self._accounts:
            self._accounts[sequence.index] = _Account(self._experience.handed_on())
        return self._accounts[sequence.index]

    def _seconds(self, choice: Choice, rows: int, cached: float) -> float:
        return self._drift[choice.mode] * self._costs.round(choice, rows, cached)

    def _padded(self, rows: int) -> int:
        return min(self._slots, 1 << (rows - 1).bit_length())

    def _fits(self, choice: Choice, running: list[Sequence], rounds: int = 1) -> bool:
        """So many rounds that bring one token each, or none that is confirmed, leave no sequence too far behind."""
        rows, cached = self._padded(len(running)), _mean_cached(running)
        alone = self._seconds(PLAIN, rows, cached)
        cost = rounds * self._seconds(choice, rows, cached) + self._catching_up(running)
        sure = rounds
        if choice.mode == "exact":
            tokens = 1 + max(len(sequence.tentative) for sequence in running) + rounds * (choice.k + 1) + self._costs.tail
            cost, sure = cost + self._costs.confirm(tokens, rows, cached), 1
        for sequence in running:
            account = self._account(sequence)
            allowed = LOSS * max(account.alone, alone * min(HORIZON, sequence.params.max_new_tokens))
            if account.spent - account.alone + cost - sure * alone > allowed:
                return False
        return True

    def _rate(self, choice: Choice, running: list[Sequence]) -> float:
        """Expected tokens a second of all sequences together."""
        rows, cached = self._padded(len(running)), _mean_cached(running)
        if choice.mode == "exact":
            rate = self._exact(choice, rows, cached, running)
        else:
            tokens = sum(self._account(sequence).acceptance.tokens(choice.k) for sequence in running)
            rate = tokens / self._seconds(choice, rows, cached)
        if choice.k and (late := self._catching_up(running)):
            rest = sum(max(s.params.max_new_tokens - len(s.tokens), 1) for s in running)
            rate = 1 / (1 / rate + late / rest)
        return rate

    def _exact(self, choice: Choice, rows: int, cached: float, running: list[Sequence]) -> float:
        """Of as many rounds as bring N tokens, and a confirmation, at the best N."""
        seconds, best = self._seconds(choice, rows, cached), 0.0
        paces = [self._confirmations.pace(sequence) for sequence in running]
        passes = [self._account(sequence).acceptance for sequence in running]
        brought = [acceptance.tokens(choice.k) for acceptance in passes]  # by a round
        behind = [acceptance.tokens(self._costs.tail) - 1 for acceptance in passes]  # tentative tokens that all pass
        for every in (1, 2, 4, 8, 12, 16, 24, 32, 48, MAX_EXACT_EVERY):
            rounds = max(every / max(brought), 1.0)
            cost = rounds * seconds + self._costs.confirm(every + 1 + self._costs.tail, rows, cached)
            each = zip(paces, brought, behind, strict=True)
            best = max(best, sum(pace.stand(rounds * m, d) for pace, m, d in each) / cost)
        return best

    def _pace(self, running: list[Sequence]) -> None:
        """What a confirmation costs in rounds decides how many tokens it is worth waiting for."""
        if self._current.mode == "exact":
            rows, cached = self._padded(len(running)), _mean_cached(running)
            seconds = self._seconds(self._current, rows, cached)
            for pace in map(self._confirmations.pace, running):
                pace.narrow, pace.wide = (self._costs.confirm(tokens, rows, cached) / seconds for tokens in CONFIRMED)

    def _catching_up(self, running: list[Sequence]) -> float:
        """Seconds in which the draft reads what it has not: of all rows at once where none lacks more than a chunk."""
        behind = [self._account(sequence).behind for sequence in running]
        each = [self._costs.read(tokens, sequence.cached) for tokens, sequence in zip(behind, running, strict=True)]
        return max(each) if max(behind) <= max(self._costs.reading, default=0) else sum(each)


def _mean_cached(running: list[Sequence]) -> float:
    return sum(sequence.cached for sequence in running) / len(running)


def _cached(gains: list[Gain]) -> float:
    return _mean_cached([gain.sequence for gain in gains])


def _predict(gains: list[Gain], seconds: float) -> None:
    """Count what a round or a confirmation was to take."""
    for gain in gains:
        gain.sequence.statistics.predicted_seconds += seconds / len(gains)
