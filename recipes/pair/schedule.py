"""How long a run is, when it moves to long windows and how its learning rate goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Two stages, short then long windows, at one batch size in tokens."""

    tokens: int
    batch_tokens: int = 262_144
    short: int = 8192
    long: int = 32768
    long_share: float = 0.15
    warmup: int = 50

    def __post_init__(self) -> None:
        if self.batch_tokens % self.short or self.batch_tokens % self.long:
            raise ValueError(f"batches of {self.batch_tokens} tokens hold no whole number of windows")

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return self.tokens // self.batch_tokens

    @property
    def short_steps(self) -> int:
        """Steps before the move to long windows."""
        return round(self.steps * (1 - self.long_share))

    def stages(self) -> list[tuple[int, int, int]]:
        """(window length, first step, step after the last) of each stage."""
        return [(self.short, 0, self.short_steps), (self.long, self.short_steps, self.steps)]

    def rate(self, step: int) -> float:
        """Multiple of the learning rate: linear warm-up, constant, linear to zero over the second half."""
        return min(1.0, (step + 1) / self.warmup, 2 * (self.steps - step) / self.steps)
