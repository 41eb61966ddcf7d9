"""What a run prints: a card of conditions, a line for every row as it comes, a table for every op in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.kernels.rows import Row

NONE = "-"


def card(conditions: Mapping[str, Any]) -> Table:
    table = Table(title="conditions", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for name, value in conditions.items():
        table.add_row(Text(name), Text(number(value) if isinstance(value, float) else str(value), overflow="fold"))
    return table


def line(row: Row) -> str:
    peers = ", ".join(f"{name} {number(us)}" for name, us in row.peers.items())
    return f"{row.id} {row.backend}: {number(row.us)} us, {row.stream_fraction:.0%} of stream; peers: {peers or NONE}"


def tables(rows: Sequence[Row], ops: Mapping[str, str]) -> list[Table]:
    """One table an op (`ops`: case -> op); times are "single call / call in a chain", in microseconds."""
    made = []
    for op in dict.fromkeys(ops[row.id] for row in rows):
        part = [row for row in rows if ops[row.id] == op]
        names = list(dict.fromkeys(name for row in part for name in [*row.peers, *row.peers_chained]))
        keys, operations = (any(getattr(row, name) is not None for row in part) for name in ("key_fraction", "tflop_s"))
        table = Table(title=f"{op}: us, single / chained", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        headers = ["case", "backend", "us", "GB", "GB/s", "of stream"]
        headers += [*["K of stream"] * keys, *["TFLOP/s"] * operations, *names, "ratio", "error"]
        for i, header in enumerate(headers):
            table.add_column(Text(header), justify="left" if i < 2 else "right", overflow="fold")
        for row in part:
            cells = [row.id.removeprefix(f"{op}-"), row.backend, times(row.us, row.us_chained), f"{row.gb:.4f}"]
            cells += [f"{row.gb_s:.0f}", f"{row.stream_fraction:.0%}", *[percent(row.key_fraction)] * keys]
            cells += [NONE if row.tflop_s is None else number(row.tflop_s)] * operations
            cells += [times(row.peers.get(name), row.peers_chained.get(name)) for name in names]
            cells += [NONE if row.ratio is None else f"{row.ratio:.2f}x", f"{row.error:.1e}"]
            table.add_row(*(Text(cell) for cell in cells))
        made.append(table)
    return made


def times(single: float | None, chained: float | None) -> str:
    """ "31.5 / 29.8", or what there is of it."""
    return " / ".join(number(us) for us in (single, chained) if us is not None) or NONE


def number(value: float) -> str:
    """Three figures or more: 5.04, 31.5, 141, 4386."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.0%}"
