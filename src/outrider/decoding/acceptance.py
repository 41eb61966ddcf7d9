"""How often the draft is right: drafted tokens that pass, by position."""

from __future__ import annotations

FIRST = 0.7, 2.0  # acceptance of a token where all before it passed, and in how many rounds that seems to have been seen
MEMORY = 0.95  # what was seen of a position counts so much behind a round that tries it again
FADE = 0.99  # and behind one that does not: what is not tried any more is forgotten
KNOWN = 8.0  # rounds that the acceptance of other sequences stands for


class Acceptance:
    """How often drafted tokens pass, by position, where all before them did."""

    def __init__(self, k: int) -> None:
        self._tried, self._passed = [0.0] * k, [0.0] * k

    def add(self, drafted: int, accepted: int) -> None:
        """So many of the drafted tokens of a round have passed."""
        for at in range(len(self._tried)):
            tried = at <= accepted and at < drafted
            by = MEMORY if tried else FADE
            self._tried[at] = by * self._tried[at] + tried
            self._passed[at] = by * self._passed[at] + (tried and at < accepted)

    def fade(self) -> None:
        """A round has passed without a draft."""
        self.add(0, 0)

    def tokens(self, k: int) -> float:
        """What a forward over `k` drafted tokens is expected to emit, the recovered or bonus one counted in."""
        expected, all_pass, rate = 1.0, 1.0, FIRST[0]
        for at in range(k):
            tried, passed = (self._tried[at], self._passed[at]) if at < len(self._tried) else (0.0, 0.0)
            rate = (passed + rate * FIRST[1]) / (tried + FIRST[1])  # what is not known is as at the position before
            all_pass *= rate
            expected += all_pass
        return expected

    def handed_on(self) -> Acceptance:
        """For a new sequence: as much, with less weight."""
        made = Acceptance(len(self._tried))
        weights = [min(1.0, KNOWN / tried) if tried else 0.0 for tried in self._tried]
        made._tried = [w * x for w, x in zip(weights, self._tried, strict=True)]
        made._passed = [w * x for w, x in zip(weights, self._passed, strict=True)]
        return made
