"""A round, or a confirmation, on its way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.decoding.audits import landed
from outrider.decoding.guard import Audit
from outrider.decoding.rounds import Outcome, RowOutcome
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import StageClock
from outrider.types import Selection


class Landings:
    """Where outcomes arrive on the host, pinned memory beside a GPU."""

    def __init__(self, slots: int, k: int, width: int, *, pinned: bool) -> None:
        """Of rounds with `k` drafted tokens and of confirmations of up to `width` tokens."""

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, pin_memory=pinned)

        self._rounds = [numbers(slots * (k + 5)) for _ in range(2)]  # in turn, as inputs
        self.confirmation = numbers(slots * (width + 4))
        self.audits = numbers(slots, k + 4)  # one will do: behind an audited round nothing is launched before they are read

    def next_round(self) -> Tensor:
        self._rounds.reverse()
        return self._rounds[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A round under way, or a confirmation, whose numbers have its own width."""

    sequences: list[Sequence]  # by row
    rows: int  # of the batch, idle ones counted in
    confirms: bool
    fresh: bool  # something was built or captured meanwhile: its time says nothing
    selection: Selection | None  # its lists; those of a captured round are overwritten by the next
    touched: list[float]  # bytes that a rival has read in order to choose, by row
    clock: StageClock
    numbers: Tensor  # on the host, once `arrived`
    audits: Tensor | None  # its figures, on the host once `arrived`; None: nobody was to be audited
    arrived: torch.cuda.Event | None

    @classmethod
    def of(
        cls,
        running: list[Sequence],
        outcome: Outcome,
        landings: Landings,
        clock: StageClock,
        *,
        fresh: bool,
        confirms: bool = False,
        touched: list[float] | None = None,
        figures: Tensor | None = None,
    ) -> Flight:
        """Let an outcome be on its way to its landing, and the `figures` of audits."""
        audits = None if figures is None else landings.audits[: len(figures)].copy_(figures, non_blocking=True)
        landing = landings.confirmation if confirms else landings.next_round()
        numbers = landing[: outcome.numbers.numel()].view_as(outcome.numbers).copy_(outcome.numbers, non_blocking=True)
        arrived = None
        if outcome.numbers.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return cls(
            sequences=list(running),
            rows=len(numbers),
            confirms=confirms,
            fresh=fresh,
            selection=outcome.selection,
            touched=touched or [0.0] * len(running),
            clock=clock,
            numbers=numbers,
            audits=audits,
            arrived=arrived,
        )

    def land(self) -> tuple[list[RowOutcome], list[Audit | None]]:
        """The outcome by row, and what audits have found; waits for the round."""
        if self.arrived is not None:
            self.arrived.synchronize()
        rows = len(self.sequences)
        audits = landed(rows, self.audits)
        return [RowOutcome.of(row) for row in self.numbers[:rows].tolist()], audits
