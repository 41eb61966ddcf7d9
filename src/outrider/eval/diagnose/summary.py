"""The lines of each (method, budget) as one set of figures, means over texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outrider.eval.diagnose.rows import ROUNDS, TARGET, Acceptance, Diagnosis, Disagreement, Heads, Overlap

ByLayer = dict[int, list[float]]  # a figure by head, or by list, of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was found about a method and a budget."""

    method: str
    keep: float | None
    top_p: float | None
    kept_fraction: float
    kv_read_fraction: float
    disagreement: float
    recall: ByLayer  # empty without lists
    with_previous: ByLayer
    with_target: ByLayer
    by_position: list[float]  # empty where the method does not generate


def summarize(rows: Sequence[Diagnosis]) -> list[Summary]:
    """One for every (method, budget) whose disagreement is among the rows, in the order of first appearance."""
    cases = dict.fromkeys((row.method, row.keep, row.top_p) for row in rows if isinstance(row, Disagreement))
    return [_summary([row for row in rows if (row.method, row.keep, row.top_p) == case]) for case in cases]


def _summary(rows: list[Diagnosis]) -> Summary:
    read = [row for row in rows if isinstance(row, Disagreement)]
    overlaps = [row for row in rows if isinstance(row, Overlap)]
    return Summary(
        method=read[0].method,
        keep=read[0].keep,
        top_p=read[0].top_p,
        kept_fraction=_mean([row.kept_fraction for row in read]),
        kv_read_fraction=_mean([row.kv_read_fraction for row in read]),
        disagreement=_mean([row.disagreement for row in read]),
        recall=_by_layer((row.layers, row.recall) for row in rows if isinstance(row, Heads)),
        with_previous=_by_layer((row.layers, row.overlap) for row in overlaps if row.between == ROUNDS),
        with_target=_by_layer((row.layers, row.overlap) for row in overlaps if row.between == TARGET),
        by_position=_means([row.by_position for row in rows if isinstance(row, Acceptance)]),
    )


def _by_layer(texts: Iterable[tuple[list[int], list[list[float]]]]) -> ByLayer:
    """A text has layers and their figures; all texts of a case have the same ones."""
    gathered: dict[int, list[list[float]]] = {}
    for layers, figures in texts:
        for layer, heads in zip(layers, figures, strict=True):
            gathered.setdefault(layer, []).append(heads)
    return {layer: _means(heads) for layer, heads in gathered.items()}


def _means(lists: list[list[float]]) -> list[float]:
    """Place by place."""
    return [_mean(column) for column in zip(*lists, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
