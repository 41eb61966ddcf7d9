"""What rounds cost on this device: measured when an engine first runs, over caches of two lengths.

    seconds of a stage   =   a + b rows + (c + d rows) S       exact at two numbers of rows and two of cached tokens S

Weights and launches are in a, keys and values in d, what a kernel loses on few rows in b and c: no figure of any machine is
built in. Rounds of fewer drafted tokens than the measured ones are estimated: drafting is K or K + 1 equal steps, and
verification grows evenly from that of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import median

from outrider.decoding.choice import PLAIN, Choice
from outrider.decoding.confirmation import WIDTH
from outrider.decoding.prefill import LATE, ProgressCallback, late_widths
from outrider.decoding.rehearsal import rehearse, rehearse_confirmation, rehearse_reading
from outrider.decoding.rounds import RoundKind
from outrider.decoding.runner import Runner
from outrider.models.attention import ROUND

WARM, TIMED = 2, 3  # rehearsals of a kind: the first is as it is, the second is captured; and those that count
CONFIRMED = ROUND, WIDTH  # tokens of the confirmations that are measured
CAPTURED = 2 * WIDTH  # and of one that is captured beside them
COLD = 2  # reading some tokens once in a while takes so many times as long as over and over, which is how it is measured
LEAST = 1024  # cached tokens of the shorter caches, where there is room

KindOf = Callable[[Choice, int, bool], RoundKind]  # of a choice, a number of rows, and whether they are long enough for lists


@dataclass(frozen=True, slots=True)
class Plane:
    """Seconds by rows and cached tokens, through one, two or four measured corners."""

    corners: Mapping[tuple[int, int], float]  # (rows, cached tokens) -> seconds

    def at(self, rows: float, cached: float) -> float:
        """Seconds at so many rows of so many cached tokens each; more of either is never less."""
        few, many = min(r for r, _ in self.corners), max(r for r, _ in self.corners)
        return _line(few, self._along(few, cached), many, self._along(many, cached), rows)

    def _along(self, rows: int, cached: float) -> float:
        (short, low), *rest = sorted((s, seconds) for (r, s), seconds in self.corners.items() if r == rows)
        return _line(short, low, *rest[-1], cached) if rest else low


def _line(x0: float, y0: float, x1: float, y1: float, x: float) -> float:
    """Through two points; level where it would fall, and never below half of the lower one."""
    if x0 == x1 or y1 <= y0:
        return max(y0, y1)
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), y0 / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of all that an engine may choose to do."""

    rounds: Mapping[str, Mapping[str, Plane]]  # by mode (exact counts as sparse), by stage; of K drafted tokens
    k: int  # this K
    steps: Mapping[str, int] = field(default_factory=dict)  # of the draft in such a round, by mode, where they are not K + 1
    tail: int = 0  # tokens that the draft proposes for a confirmation
    confirmations: Mapping[int, Plane] = field(default_factory=dict)  # by tokens of each row; empty: nothing is confirmed
    reading: Mapping[int, Plane] = field(default_factory=dict)  # by tokens that the draft reads at a time, one row
    rows: int = 1  # the largest batch that was measured
    cached: int = 0  # and the longest caches

    def round(self, choice: Choice, rows: int, cached: float) -> float:
        """Seconds of a round of so many rows of so many cached tokens each."""
        stages = self.rounds["sparse" if choice.mode == "exact" else choice.mode]
        found = {stage: plane.at(rows, cached) for stage, plane in stages.items()}
        if choice.k not in (0, self.k):
            share = choice.k / self.k
            steps = self._steps(choice.mode)
            found["propose"] *= (steps - self.k + choice.k) / steps
            dense, alone = (self.rounds[mode]["verify"].at(rows, cached) for mode in ("dense", "plain"))
            found["verify"] *= 1 - (1 - share) * max(1 - alone / dense, 0.0)
        return sum(found.values())

    def confirm(self, tokens: int, rows: int, cached: float) -> float:
        """Seconds of a confirmation of so many tokens of every row, drafted ones among them."""
        drafting = self.rounds["sparse"]["propose"].at(rows, cached) * self.tail / self._steps("sparse")
        least = self.round(PLAIN, rows, cached) + drafting
        width = min((width for width in self.confirmations if tokens <= width), default=max(self.confirmations))
        return least + max(self.confirmations[width].at(rows, cached) - least, 0.0) * tokens / width

    def read(self, tokens: int, cached: float) -> float:
        """Seconds in which the draft reads the last `tokens` of a row's `cached` ones; one takes as long as the fewest."""
        if not self.reading or not tokens:
            return 0.0
        few, chunk = min(self.reading), max(self.reading)
        least, most = (self.reading[width].at(1, cached - tokens / 2) for width in (few, chunk))
        chunks, rest = divmod(tokens, chunk)
        return chunks * most + (COLD * _line(few, least, chunk, most, max(rest, few)) if rest else 0.0)

    def _steps(self, mode: str) -> int:
        return self.steps.get("sparse" if mode == "exact" else mode, self.k + 1)


def measure(
    runner: Runner,
    kind_of: KindOf,
    modes: tuple[str, ...],
    batches: set[int],
    least: int,
    cached: int,
    chunk: int,
    progress: ProgressCallback,
    *,
    narrower: tuple[int, ...] = (),
) -> Costs:
    """Time rounds of these modes on an idle runner, of batches of so many rows with up to `cached` tokens; from `least` on
    there are lists. The draft reads `chunk` tokens at a time.

    Rounds of `narrower` numbers of drafted tokens, and of the batches between, are built and captured, where rounds are, but
    not timed: what runs for the first time behind a prompt would be slower than the target alone. Waits for the device. What
    the caches held is gone.
    """
    if runner.draft is not None:
        runner.caches[1].fill_with_noise()  # equal keys would make equal scores, which are no task for a selection
    longest = max(cached, 1)
    shortest = min(max(least, LEAST), longest)
    chunk = max(min(chunk, longest // 2), 1)
    corners = [(rows, length) for rows in sorted(batches) for length in sorted({shortest, longest})]
    most = runner.tentative.width
    confirmed = sorted({min(tokens, most) for tokens in CONFIRMED}) if runner.confirms and "sparse" in modes else []
    widths = sorted({min(LATE, chunk), chunk}) if runner.draft is not None else []
    done, of = 0, len(modes) + len(confirmed) + len(widths)

    def timed(once: Callable[[int, int], dict[str, float]], at: list[tuple[int, int]]) -> dict[str, Plane]:
        """By stage."""
        nonlocal done
        progress("measure rounds", done, of)
        done += 1
        found = {corner: _median(once, *corner) for corner in at}
        stages = {stage: None for times in found.values() for stage in times}
        return {stage: Plane({corner: times.get(stage, 0.0) for corner, times in found.items()}) for stage in stages}

    def choice_of(mode: str, k: int) -> Choice:
        """Sparse rounds are rehearsed as those of mode exact where their tokens will be tentative."""
        named = "exact" if mode == "sparse" and runner.confirms else mode
        return PLAIN if mode == "plain" else Choice(named, k)

    def round_of(mode: str) -> Callable[[int, int], dict[str, float]]:
        choice = choice_of(mode, runner.k)
        return lambda rows, length: rehearse(runner, kind_of(choice, rows, length >= least), length)

    def confirmation_of(tokens: int) -> Callable[[int, int], dict[str, float]]:
        choice = Choice("exact", runner.k)
        return lambda rows, length: rehearse_confirmation(runner, kind_of(choice, rows, length >= least), length, tokens)

    def reading_of(tokens: int) -> Callable[[int, int], dict[str, float]]:
        return lambda _, length: rehearse_reading(runner, length, tokens)

    rounds = {mode: timed(round_of(mode), corners) for mode in modes}
    confirmations = {tokens: timed(confirmation_of(tokens), corners)["confirm"] for tokens in confirmed}
    starts = [(1, length) for length in sorted({0, longest - chunk})]
    reading = {width: timed(reading_of(width), starts)["prefill"] for width in widths}
    if narrower and runner.stages.capture:  # at last: while the host captures, clocks of an idle GPU fall
        for rows, mode, k in product(powers(max(batches)), modes, (*narrower, runner.k)):
            for _ in range(WARM):
                rehearse(runner, kind_of(choice_of(mode, k), rows, shortest >= least), shortest)
        for width in late_widths(chunk)[1:-1]:
            rehearse_reading(runner, 0, width)
        for rows, tokens in product(powers(max(batches)), (*confirmed, min(CAPTURED, most)) if confirmed else ()):
            for _ in range(WARM):
                confirmation_of(tokens)(rows, shortest)
    runner.clear(slice(None))
    progress("measure rounds", of, of)
    return Costs(
        rounds=rounds,
        k=runner.k,
        steps={mode: runner.steps(kind_of(choice_of(mode, runner.k), 1, longest >= least)) for mode in modes},
        tail=runner.tentative.tail,
        confirmations=confirmations,
        reading=reading,
        rows=max(batches),
        cached=longest,
    )


def powers(rows: int) -> list[int]:
    """Batches that rounds have: powers of two, up to the largest."""
    return sorted({*(1 << at for at in range(rows.bit_length()) if 1 << at < rows), rows})


def _median(once: Callable[[int, int], dict[str, float]], rows: int, cached: int) -> dict[str, float]:
    for _ in range(WARM):
        once(rows, cached)
    times = [once(rows, cached) for _ in range(TIMED)]
    return {stage: median(one[stage] for one in times) for stage in times[0] if times[0][stage] > 0}
