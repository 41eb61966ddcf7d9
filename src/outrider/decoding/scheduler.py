"""Which sequence runs in which slot. Sees no tensor."""

from __future__ import annotations

from collections import deque

from outrider.decoding.sequence import Sequence


class Scheduler:
    """Running sequences fill slots 0 .. n - 1 without gaps and waiting ones refill them, first come first served."""

    def __init__(self, sequences: list[Sequence], slots: int) -> None:
        self.waiting = deque(sequences)
        self.running: list[Sequence] = []
        self.slots = slots

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> list[tuple[int, Sequence]]:
        """Move waiting sequences into free slots; returns the (slot, sequence) pairs that now need a prefill."""
        admitted = []
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.popleft())
            admitted.append((len(self.running) - 1, self.running[-1]))
        return admitted

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
