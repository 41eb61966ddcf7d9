"""The project's own sweep (`evaluation.yaml`) as result lines and tables: a line a method, budget, task and context."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from outrider.eval.bootstrap import mean_interval
from outrider.eval.rows import Row, read_rows

Line = dict[str, Any]
KEY = ("task", "part", "context", "method", "keep", "top_p")
FIGURES = ("ppl", "ppl_dense", "agreement", "recalled", "asked", "kept_fraction", "kv_read_fraction")  # by text
BOUNDS = ("dense", "oracle")  # no method can be had for what they read


def collect(folder: Path) -> list[Line]:
    """The rows of a sweep's folder, those of all texts in one line; texts in alphabetical order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for file in sorted((folder / "rows").glob("*.jsonl")):
        for row in read_rows(file):
            about = {name: getattr(row, name) for name in KEY} | {"method": label(row)}
            groups.setdefault(tuple(about.values()), []).append(row)
    lines = []
    for key, rows in groups.items():
        rows.sort(key=lambda row: row.text)
        by_text = {name: [getattr(row, name) for row in rows] for name in FIGURES if getattr(rows[0], name) is not None}
        about = dict(zip(KEY, key, strict=True)) | {"texts": [row.text for row in rows], "scored_tokens": rows[0].scored_tokens}
        lines.append(about | by_text | {"conditions": rows[0].conditions})
    return lines


def label(row: Row) -> str:
    """The method, and what it does beside its default."""
    return f"{row.method}, mean value" if row.conditions.get("unlisted") == "mean" else row.method


def quality(line: Line, figure: str) -> list[float]:
    """By text, more is better: of perplexity the change in percent, negated."""
    if figure == "perplexity":
        return [100 * (1 - one / dense) for one, dense in zip(line["ppl"], line["ppl_dense"], strict=True)]
    return line[figure]


def within_band(line: Line, best: Line, figure: str) -> bool:
    """The 95% bootstrap interval of the difference from `best`, paired by text, holds 0, or `line` is better."""
    gains = [a - b for a, b in zip(quality(line, figure), quality(best, figure), strict=True)]
    interval = mean_interval(gains)
    return line is best or (interval is not None and interval[1] >= 0)


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def by_budget(lines: list[Line], figure: str) -> list[list[str]]:
    """Header, then a row a method with a column a kept share; the best of a column, and what its noise hides, in bold.

    Lines that lack a text are left out.
    """
    whole = max((len(line["ppl"]) for line in lines), default=0)
    lines = [line for line in lines if line["keep"] is not None and len(line["ppl"]) == whole]
    keeps = sorted({line["keep"] for line in lines}, reverse=True)
    cells: dict[str, dict[float, str]] = {}
    for keep in keeps:
        found = [line for line in lines if line["keep"] == keep]
        ranked = [line for line in found if line["method"] not in BOUNDS]
        best = max(ranked, key=lambda line: mean(quality(line, figure)), default=None)
        for line in found:
            shown = shown_as(figure, mean(quality(line, figure)))
            bold = figure != "kv_read_fraction" and line in ranked and best is not None and within_band(line, best, figure)
            cells.setdefault(line["method"], {})[keep] = f"**{shown}**" if bold else shown
    return [
        ["method", *(f"{100 * keep:g}%" for keep in keeps)],
        *([method, *(row.get(keep, "") for keep in keeps)] for method, row in cells.items()),
    ]


def shown_as(figure: str, value: float) -> str:
    if figure == "perplexity":
        return f"{0 - value:+.2f}%"
    return f"{100 * value:.1f}%" if figure == "kv_read_fraction" else f"{value:.3f}"


def recalled(lines: list[Line], column: str) -> list[list[str]]:
    """Header, then a row a method and budget: what was recalled of what was asked, by context or part (`column`)."""
    columns = list(dict.fromkeys(line[column] for line in lines))
    groups: dict[tuple[str, float | None, float | None], dict[Any, Line]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["keep"], line["top_p"]), {})[line[column]] = line
    rows = []
    for (method, keep, top_p), found in groups.items():
        budget = f"p = {top_p:g}" if top_p is not None else "all" if keep is None else f"{100 * keep:g}%"
        shares = [mean(line["kv_read_fraction"]) for line in found.values()]
        figures = (f"{sum(found[x]['recalled'])}/{sum(found[x]['asked'])}" if x in found else "" for x in columns)
        rows.append([method, budget, f"{100 * mean(shares):.1f}%", *figures])
    return [["method", "budget", "KV bytes read", *(f"{x:,}" if isinstance(x, int) else x for x in columns)], *rows]


def shares_of_mass(lines: list[Line]) -> list[list[str]]:
    """Header, then a row a method under a share of the attention."""
    rows = []
    for line in lines:
        if line["top_p"] is not None:
            kept, read = (f"{100 * mean(line[name]):.1f}%" for name in ("kept_fraction", "kv_read_fraction"))
            change = shown_as("perplexity", mean(quality(line, "perplexity")))
            rows.append([line["method"], f"{line['top_p']:g}", kept, read, change, f"{mean(line['agreement']):.3f}"])
    return [["method", "top-p", "kept", "KV bytes read", "perplexity", "agreement with dense"], *rows]
