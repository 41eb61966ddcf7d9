"""What a method that chooses inside the target's forward over a prompt is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from outrider.types import Stage

Rows = Callable[[int], Tensor]  # of a layer, keys or values: [B, T, Hkv, D]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """B prompts of T tokens while the target reads them, each in one forward from an empty cache."""

    layers: tuple[int, ...]  # of the target, with full attention, ascending
    scales: tuple[float, ...]  # of the logits, by layer of the model
    keys: Rows  # of a layer whose attention is about to run
    values: Rows
    stage: Stage  # takes the time of what a method does
    backend: str = "auto"  # of the ops


def kept_tokens(keep: float, tokens: int) -> int:
    """How many of `tokens` the share `keep` is, rounded up."""
    return math.ceil(keep * tokens - 1e-9)  # 1e-9: 0.1 * 30 must not become 4 by rounding
