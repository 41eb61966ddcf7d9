"""What rounds, confirmations and audits leave in a sequence's statistics."""

from __future__ import annotations

from outrider.decoding.choice import Choice
from outrider.decoding.guard import WINDOW, Audit
from outrider.decoding.guidance import Guidance
from outrider.decoding.rounds import RowOutcome
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import ReadCounter, Statistics
from outrider.models import ModelSpec


class Records:
    """Counts what was done for each sequence, before its tokens are emitted, and the bytes that this has read."""

    def __init__(self, target: ModelSpec, draft: ModelSpec, guidance: Guidance | None) -> None:
        layers, bits = (guidance.layers, guidance.bits) if guidance is not None else ((), None)
        self._reads = ReadCounter(target, draft, layers, bits)

    def round(
        self,
        sequence: Sequence,
        outcome: RowOutcome,
        choice: Choice,
        layers: tuple[int, ...],
        touched: float,
        spent: dict[str, float],
    ) -> None:
        """A round of this choice: `layers` of the target had lists, a rival `touched` so many bytes, its share took so long."""
        statistics, length, accepted = sequence.statistics, sequence.cached, len(outcome.tokens) - 1
        reads = self._reads.of(length, choice.k + 1, layers, outcome.listed_tokens, outcome.listed_rows)
        statistics.rounds += 1
        statistics.chosen[choice.name] = statistics.chosen.get(choice.name, 0) + 1
        statistics.drafted += choice.k
        statistics.accepted += accepted
        for position in range(accepted):
            statistics.accepted_at[position] += 1
        statistics.listed += reads.listed
        statistics.cached += length
        statistics.bytes_read += reads.bytes_read + round(touched)
        statistics.bytes_dense += reads.bytes_dense
        _spend(statistics, spent)

    def confirmation(self, sequence: Sequence, outcome: RowOutcome, tail: int, spent: dict[str, float]) -> None:
        """A dense forward over the tentative tokens that the sequence holds, and the `tail` of drafted ones."""
        statistics, held = sequence.statistics, len(sequence.tentative)
        passed = min(len(outcome.tokens) - 1, held)
        statistics.confirmations += 1
        statistics.confirmed += passed
        statistics.rolled_back += held - passed
        statistics.drafted_on += len(outcome.tokens) - 1 - passed
        statistics.bytes_read += self._reads.dense(sequence.cached - held, held + 1 + tail)
        _spend(statistics, spent)

    def audit(self, sequence: Sequence, audit: Audit, cached: int) -> None:
        """The dense rows of a round behind `cached` tokens, and what it takes to look for the mass of their attention."""
        sequence.statistics.bytes_read += self._reads.audit(cached, len(audit.differences), audit.kept / WINDOW)

    def reread(self, sequence: Sequence, spent: dict[str, float]) -> None:
        """All generated tokens were read once more."""
        sequence.statistics.bytes_read += self._reads.dense(len(sequence.prompt) - 1, len(sequence.tokens))
        _spend(sequence.statistics, spent)


def _spend(statistics: Statistics, spent: dict[str, float]) -> None:
    for stage, seconds in spent.items():
        statistics.seconds[stage] += seconds
