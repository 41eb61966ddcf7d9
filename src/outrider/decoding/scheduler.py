"""Which sequence runs in which slot. Sees no tensor."""

from __future__ import annotations

from collections import deque

from outrider.decoding.sequence import Sequence


class Scheduler:
    """Running sequences fill slots 0 .. n - 1 without gaps; waiting ones refill them, one at a time, first come first served.

    slots    0 .. n - 1     running
             somewhere      filling: its prompt is being read, and it joins the running ones at slot n
    """

    def __init__(self, sequences: list[Sequence], slots: int) -> None:
        self.waiting = deque(sequences)
        self.filling: Sequence | None = None
        self.running: list[Sequence] = []
        self.slots = slots
        self._filling_slot = 0

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.filling)

    @property
    def together(self) -> int:
        """Sequences that will run beside each other once free slots are filled."""
        return min(self.slots, len(self.running) + (self.filling is not None) + len(self.waiting))

    def admit(self) -> tuple[int, Sequence] | None:
        """Move the next waiting sequence into a free slot, where it is `filling`; returns both.

        None where no slot is free, nobody waits, or another one is filling.
        """
        if self.filling is not None or not self.waiting or len(self.running) >= self.slots:
            return None
        self.filling, self._filling_slot = self.waiting.popleft(), len(self.running)
        return self._filling_slot, self.filling

    def join(self) -> tuple[int, int]:
        """The filling sequence runs from now on; returns the move (its slot until now, its slot), equal where it stays."""
        assert self.filling is not None
        self.running.append(self.filling)
        self.filling = None
        return self._filling_slot, len(self.running) - 1

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that does not run yet."""
        if sequence is self.filling:
            self.filling = None
        else:
            self.waiting.remove(sequence)

    def release(self) -> list[tuple[int, int]]:
        """Drop finished sequences; returns the moves (source slot, target slot), in order, that close the gaps."""
        moves = []
        for slot in reversed(range(len(self.running))):
            if self.running[slot].finish_reason is not None:
                last = len(self.running) - 1
                if slot != last:
                    moves.append((last, slot))
                    self.running[slot] = self.running[last]
                self.running.pop()
        return moves
