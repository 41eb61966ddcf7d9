"""Result rows: one JSON line for every case and backend; a new run replaces the line of the same case and backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from outrider.bench import results

STREAM = "stream of K"  # bytes of the keys over the streaming rate: computed, so no peer to be compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Times in microseconds, 10^9 bytes, shares of the streaming rate; `ratio` above 1: faster than the best peer."""

    id: str
    backend: str
    us: float
    us_min: float
    us_chained: float | None  # one of 8 calls on 8 input sets in one graph; None: not measured
    gb: float
    gb_s: float
    stream_fraction: float
    key_fraction: float | None  # attention_mass: of the key bytes alone
    tflop_s: float | None = None  # chunk_attention: 10^12 operations a second
    peers: dict[str, float]
    peers_chained: dict[str, float]
    ratio: float | None  # best peer / us
    error: float
    conditions: dict[str, Any] = field(default_factory=dict)


def best_peer(peers: dict[str, float]) -> tuple[str, float] | None:
    """Name and time of the fastest that was measured."""
    measured = {name: us for name, us in peers.items() if name != STREAM}
    return min(measured.items(), key=lambda item: item[1]) if measured else None


def replace_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in place of the lines of their case and backend, or behind all others; the file changes in one step."""
    results.replace_rows(path, (asdict(row) for row in rows), key=("id", "backend"))
