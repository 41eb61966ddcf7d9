"""Result files of JSON lines: a new row takes the place of the old one about the same thing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from outrider.bench.options import is_scored
from outrider.config import PREFILL_METHODS

KEY = ("case", "engine", "mode", "drafting", "scoring", "kv_dtype", "parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one engine did in one mode; what it does not measure is None or empty. A failed one says why in `error`."""

    case: str
    engine: str
    mode: str
    drafting: str | None  # what the draft reads; None where there is no draft
    scoring: str | None = None  # what scoring reads of its keys: exact, 4bit or 2bit; None where nothing is scored
    kv_dtype: str | None = None  # of keys and values in the cache: fp8; None: the models' dtype
    parallel: str | None = None  # ranks that share the models, a GPU each; None: one has all
    context: int  # tokens of a prompt
    batch: int
    tokens_per_second: float | None = None  # of all sequences together
    # kind: scripted, real or none; rates [K]: share of rounds in which token i and all before it pass; tokens_per_round;
    # of mode exact also agreement, as scripted, exact_every, and tentative and confirmed tokens per confirmation
    acceptance: dict[str, Any] = field(default_factory=dict)
    round_ms: float | None = None  # wall clock
    predicted_ms: float | None = None  # what rounds were to take, by what they cost when the engine began to run
    chosen: dict[str, int] = field(default_factory=dict)  # of mode auto: rounds by how they were run
    host_ms: float | None = None  # of round_ms, what no stage of the device accounts for
    stages: dict[str, float] = field(default_factory=dict)  # ms a round
    floors: dict[str, dict[str, float | None]] = field(default_factory=dict)  # see floors.against_floor
    kept: float | None = None  # share of the cached tokens that the target's lists held
    error: str | None = None
    conditions: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def replace_rows(path: Path, rows: Iterable[dict[str, Any]], key: tuple[str, ...] = KEY) -> None:
    """Write rows in place of the lines with the same `key`, or behind all others; the file changes in one step."""
    new = {_about(row, key): json.dumps(row) for row in rows}
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        old = json.loads(line)
        kept.append(new.pop(_about(old, key), line))
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_text("".join(line + "\n" for line in [*kept, *new.values()]), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def scoring_of(row: Mapping[str, Any]) -> str | None:
    """Field `scoring` of a row. Older lines lack it: where they were scored, it was with exact keys."""
    return row.get("scoring") or ("exact" if is_scored(row["engine"], row["mode"], row["drafting"]) else None)


def method_of(row: Mapping[str, Any]) -> str | None:
    """Field `method` of a row about prompts. Older lines lack it: sparse ones were read by our own."""
    return row["method"] if "method" in row else PREFILL_METHODS[0] if row["mode"] == "sparse" else None


def drafting_of(row: Mapping[str, Any]) -> str:
    """What the draft of a row reads, for a cell, and what is unusual: "sparse, 4bit keys, fp8, 2 ranks". Empty for a usual one
    without a draft."""
    scoring = scoring_of(row)
    scored = f"{scoring} keys" if scoring not in (None, "exact") else None
    return ", ".join(filter(None, (row["drafting"], scored, row.get("kv_dtype"), row.get("parallel"))))


def _about(row: Mapping[str, Any], key: tuple[str, ...]) -> tuple[Any, ...]:
    older = {"scoring": scoring_of, "method": method_of}
    return tuple(older[name](row) if name in older else row.get(name) for name in key)
