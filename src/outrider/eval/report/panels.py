"""Rows into panels: what is compared with what, on which texts, and the mean and interval of every point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from outrider.eval.bootstrap import Interval
from outrider.eval.report.read import VARIANT, variant_of
from outrider.eval.rows import DENSE, Row, summarize


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure of quality, as rows have it."""

    name: str  # as in `Row.intervals`
    title: str
    of: Callable[[Row], float | None]
    percent: float = 1.0  # factor to percent where a figure is drawn in percent
    form: str = ".1f"
    dense: float | None = None  # what dense attention has, where that is so by definition


def _recall(row: Row) -> float | None:
    return row.recalled / row.asked if row.recalled is not None and row.asked else None


FIGURES = (
    Figure(
        name="delta_percent",
        title="Change of perplexity against dense, %",
        of=lambda row: row.delta_percent,
        form="+.2f",
        dense=0.0,
    ),
    Figure(name="recall", title="Recalled, %", of=_recall, percent=100),
    Figure(name="f1", title="Token F1, %", of=lambda row: row.f1, percent=100),
    Figure(name="rouge_l", title="ROUGE-L, %", of=lambda row: row.rouge_l, percent=100),
    Figure(name="agreement", title="Agreement with dense, %", of=lambda row: row.agreement, percent=100, dense=100.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One method and budget: the mean over texts."""

    label: str  # of the curve
    mean: Row

    @property
    def read(self) -> float:
        """Bytes read, in percent of what dense verification reads."""
        return 100 * self.mean.kv_read_fraction

    def value(self, figure: Figure) -> float | None:
        value = figure.of(self.mean)
        return None if value is None else figure.percent * value

    def interval(self, figure: Figure) -> Interval | None:
        found = self.mean.intervals.get(figure.name)
        return None if found is None else (figure.percent * found[0], figure.percent * found[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """All methods of one task, part and context."""

    task: str
    part: str | None
    context: int
    texts: list[str]  # that all points are means over; without any in common, each over its own
    left_out: list[str]  # texts that not every method was run on
    points: list[Point]

    @property
    def name(self) -> str:
        """For files and anchors."""
        return "-".join([self.task, *filter(None, [self.part]), str(self.context)])

    @property
    def title(self) -> str:
        return f"{self.task}{f', {self.part}' if self.part else ''}, {self.context:,} tokens"

    @property
    def figures(self) -> list[Figure]:
        """The figures that the task measures."""
        return [figure for figure in FIGURES if any(point.value(figure) is not None for point in self.points)]

    def curves(self, figure: Figure) -> dict[str, list[Point]]:
        """The points of every curve, those that read the least first; dense is no curve."""
        curves: dict[str, list[Point]] = {}
        for point in sorted(self.points, key=lambda point: point.read):
            if point.mean.method != DENSE and point.value(figure) is not None:
                curves.setdefault(point.label, []).append(point)
        return curves

    def dense(self, figure: Figure) -> float | None:
        """What dense attention has: measured, or by definition."""
        measured = [point.value(figure) for point in self.points if point.mean.method == DENSE]
        return next((value for value in measured if value is not None), figure.dense)


def panels(rows: list[Row]) -> list[Panel]:
    """Panels in order of first appearance. Within one, all means are over the texts that every method was run on."""
    names = _labels(rows)
    groups: dict[tuple[str, str | None, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.part, row.context), []).append(row)
    return [_panel(group, names) for group in groups.values()]


def labels(found: list[Panel]) -> list[str]:
    """The curves of all panels, in order of first appearance."""
    return list(dict.fromkeys(point.label for panel in found for point in panel.points if point.mean.method != DENSE))


def _panel(rows: list[Row], names: dict[tuple[object, ...], str]) -> Panel:
    cases: dict[tuple[object, ...], set[str]] = {}
    for row in rows:
        cases.setdefault((row.method, row.keep, row.top_p, variant_of(row)), set()).add(row.text)
    common = set.intersection(*cases.values())
    used = [row for row in rows if row.text in common or not common]
    curves: dict[str, list[Row]] = {}
    for row in used:
        curves.setdefault(names[_curve(row)], []).append(row)
    first = rows[0]
    return Panel(
        task=first.task,
        part=first.part,
        context=first.context,
        texts=sorted(common),
        left_out=sorted({row.text for row in rows} - common),
        points=[Point(label=label, mean=mean) for label, own in curves.items() for mean in summarize(own)],
    )


def _curve(row: Row) -> tuple[object, ...]:
    """What a curve has in common: method, kind of budget, conditions."""
    return row.method, row.top_p is not None, *variant_of(row)


def _labels(rows: list[Row]) -> dict[tuple[object, ...], str]:
    """What a curve is called: by its method alone where budget and conditions are those of most rows."""
    if not rows:
        return {}
    [(usual, _)] = Counter(variant_of(row) for row in rows).most_common(1)
    both = {row.method for row in rows if row.top_p is not None} & {row.method for row in rows if row.keep is not None}

    def label(row: Row) -> str:
        pairs = zip(VARIANT, variant_of(row), usual, strict=True)
        unusual = [f"{name.replace('_', ' ')} {value}" for name, value, other in pairs if value != other]
        unusual = (["top-p"] if row.top_p is not None and row.method in both else []) + unusual
        return row.method + (f" ({', '.join(unusual)})" if unusual else "")

    return {_curve(row): label(row) for row in rows}
