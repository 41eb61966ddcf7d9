"""What `outrider eval diagnose` finds out: one JSON line for each of four questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from outrider.eval.json_lines import check_field, check_matrix, check_shares

ROUNDS, TARGET = "rounds", "draft and target"  # what `Overlap.between` may be


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Figures of one (text, method, budget)."""

    task: ClassVar[str]

    text: str
    method: str
    keep: float | None
    top_p: float | None
    context: int
    conditions: dict[str, str | int]

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        conditions = found.pop("conditions")
        return {"task": self.task, **found, "conditions": conditions}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads(Diagnosis):
    """How much of the dense target's attention the lists hold."""

    task: ClassVar[str] = "heads"

    layers: list[int]  # that have lists
    recall: list[list[float]]  # by layer and query head, see ListFigures.recall

    def __post_init__(self) -> None:
        check_matrix("recall", self.layers, self.recall)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap(Diagnosis):
    """How alike lists are: each with that of the round before, or with what the dense target would have listed itself."""

    task: ClassVar[str] = "overlap"

    between: str  # ROUNDS or TARGET
    layers: list[int]
    overlap: list[list[float]]  # by layer and list: Jaccard index, mean over rounds

    def __post_init__(self) -> None:
        check_matrix("overlap", self.layers, self.overlap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance(Diagnosis):
    """How far drafts get in real generation."""

    task: ClassVar[str] = "acceptance"

    by_position: list[float]  # share of rounds in which the drafted token at positions 1 .. K, and all before, were accepted
    rounds: int

    def __post_init__(self) -> None:
        check_field("by_position", self.by_position, bool(self.by_position), "a share for each of 1 .. K")
        check_shares("by_position", self.by_position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement(Diagnosis):
    """How often the sparse target would have said something else, and what it read."""

    task: ClassVar[str] = "disagreement"

    kept_fraction: float
    kv_read_fraction: float
    disagreement: float  # share of scored tokens whose most probable token is not the dense target's
    scored_tokens: int


DIAGNOSES: dict[str, type[Diagnosis]] = {kind.task: kind for kind in (Heads, Overlap, Acceptance, Disagreement)}
