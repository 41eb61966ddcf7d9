"""A round on its way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.decoding.audits import landed
from outrider.decoding.guard import Audit
from outrider.decoding.rounds import RowOutcome
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import StageClock
from outrider.types import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A round under way."""

    sequences: list[Sequence]  # by row
    rows: int  # of the batch, idle ones counted in
    fresh: bool  # something was built or captured meanwhile: its time says nothing
    selection: Selection | None  # its lists; those of a captured round are overwritten by the next
    touched: list[float]  # bytes that a rival has read in order to choose, by row
    clock: StageClock
    numbers: Tensor  # on the host, once `arrived`
    audits: Tensor | None  # its figures, on the host once `arrived`; None: nobody was to be audited
    arrived: torch.cuda.Event | None

    def land(self) -> tuple[list[RowOutcome], list[Audit | None]]:
        """The outcome by row, and what audits have found; waits for the round."""
        if self.arrived is not None:
            self.arrived.synchronize()
        rows = len(self.sequences)
        audits = landed(rows, self.audits)
        return [RowOutcome.of(row) for row in self.numbers[:rows].tolist()], audits


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """What has come of a confirmation."""

    outcomes: list[RowOutcome]  # by row
    fresh: bool  # see Flight
    seconds: dict[str, float]  # by stage
