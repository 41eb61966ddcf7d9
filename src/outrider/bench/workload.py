"""What an engine runs on: a pair of models, prompts, and how the tokens of a prompt and of a round come about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from outrider.bench.floors import Weights
from outrider.models import LanguageModel
from outrider.types import Alignment

DTYPES = {"cuda": "bfloat16", "cpu": "float32"}  # that models run in, by device


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One case, ready to run."""

    name: str
    target: LanguageModel
    draft: LanguageModel
    weights: tuple[Weights, Weights]  # of target and draft
    alignment: Alignment | None
    prompts: list[list[int]]  # of equal length
    rates: tuple[float, ...] | None = None  # of a scripted verifier; None: real acceptance
    agreement: float | None = None  # of tentative tokens with a scripted dense target; None: real
    seams: dict[str, Any] = field(default_factory=dict)  # what `Engine` takes in place of its own

    @property
    def context(self) -> int:
        return len(self.prompts[0])

    @property
    def batch(self) -> int:
        return len(self.prompts)
