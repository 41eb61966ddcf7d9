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
        landing: Tensor,
        clock: StageClock,
        *,
        fresh: bool,
        confirms: bool = False,
        touched: list[float] | None = None,
        audits: Tensor | None = None,
    ) -> Flight:
        """Let an outcome be on its way to `landing`, pinned memory on the host; `audits` are on theirs."""
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
