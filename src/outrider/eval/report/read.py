"""Results files into rows, diagnostics and traces. Whatever is wrong is named by file, line and field."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider.errors import ResultsError
from outrider.eval.diagnose.rows import DIAGNOSES, Diagnosis
from outrider.eval.json_lines import FieldError, parse, records
from outrider.eval.report.trace import Trace
from outrider.eval.rows import Row

ROW_TASKS = ("perplexity", "facts", "ruler", "qa")
TASKS = (*ROW_TASKS, *DIAGNOSES, "trace")
SWEEP, SWEEP_VERSION = "sweep.json", 1
ALLOWED = "files of JSON lines that `outrider eval` or `generate --trace` wrote, or a folder that `outrider eval sweep` made"


@dataclass(kw_only=True)
class Results:
    """All that the files hold, in their order."""

    files: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    diagnostics: list[Diagnosis] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)


def read_results(paths: list[Path]) -> Results:
    """Read files of JSON lines, and the rows of sweep folders.

    Raises ResultsError for what cannot be read, a line that is malformed or of an unknown task, two results of the same case
    that differ, results of several pairs of models, and for files that hold nothing.
    """
    results = Results()
    models: dict[str, tuple[str, Any]] = {}  # "target", "draft": where the model was named first, and how
    seen: dict[tuple[Any, ...], tuple[str, Row]] = {}
    for path in (file for given in paths for file in _files(given)):
        results.files.append(str(path))
        for where, record in records(path, ALLOWED):
            line = _line(where, record)
            _check_models(models, where, line.conditions)
            if isinstance(line, Row):
                if _is_new(seen, where, line):
                    results.rows.append(line)
            elif isinstance(line, Trace):
                results.traces.append(line)
            else:
                results.diagnostics.append(line)
    if not (results.rows or results.diagnostics or results.traces):
        raise ResultsError(f"{', '.join(map(str, paths))}: nothing to draw, no lines; allowed: {ALLOWED}")
    return results


def _files(path: Path) -> list[Path]:
    """The files of JSON lines that `path` stands for."""
    if not path.is_dir():
        return [path]
    stamp = path / SWEEP
    if not stamp.exists():
        raise ResultsError(f"{path}: a folder without {SWEEP}; allowed: {ALLOWED}")
    try:
        sweep = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{stamp}: cannot be read ({error}); allowed: {ALLOWED}") from error
    version = sweep.get("version") if isinstance(sweep, dict) else None
    if version != SWEEP_VERSION:
        raise ResultsError(f"{stamp}, field version: got {version!r}; allowed: {SWEEP_VERSION}, which this version reads")
    found = sorted((path / "rows").glob("*.jsonl"))
    if not found:
        raise ResultsError(f"{path}: nothing to draw, no rows yet; allowed: a sweep of which at least one point is done")
    return found


def _line(where: str, record: dict[str, Any]) -> Row | Diagnosis | Trace:
    task = record.get("task")
    if task not in TASKS:
        raise ResultsError(f"{where}, field task: got {task!r}; allowed: {', '.join(TASKS)}")
    kind: type[Row | Diagnosis | Trace] = Row if task in ROW_TASKS else DIAGNOSES.get(task, Trace)
    try:
        return parse(kind, record, open_ended=kind is not Row)
    except FieldError as error:
        raise ResultsError(f"{where}, {error}") from error


def _check_models(models: dict[str, tuple[str, Any]], where: str, conditions: dict[str, Any]) -> None:
    if "target" not in conditions:
        raise ResultsError(f"{where}, field conditions: got no target; allowed: the models that were measured")
    for role in ("target", "draft"):
        if role not in conditions:
            continue
        first, known = models.setdefault(role, (where, conditions[role]))
        if conditions[role] != known:
            both = f"{known!r} ({first}) and {conditions[role]!r} ({where})"
            raise ResultsError(f"{role}: got {both}; allowed: one pair of models in a report")


def _is_new(seen: dict[tuple[Any, ...], tuple[str, Row]], where: str, row: Row) -> bool:
    """False for a row that says again what another one says; a case with two results is refused."""
    case = (row.task, row.part, row.text, row.method, row.keep, row.top_p, row.context, variant_of(row))
    first, known = seen.setdefault(case, (where, row))
    if known is row:
        return True
    for name in ("ppl", "ppl_dense", "agreement", "recalled", "asked", "f1", "rouge_l"):
        if getattr(known, name) != getattr(row, name):
            raise ResultsError(
                f"{where}, field {name}: got {getattr(row, name)!r} where {first} has {getattr(known, name)!r}; "
                "allowed: one result for each text, method, budget and conditions"
            )
    return False


# conditions that make two curves of one method, and what lines said before they were recorded
VARIANT = {"map": None, "draft_tokens": None, "dtype": None, "kv_dtype": "auto", "score_keys": "exact", "device": None}


def variant_of(row: Row) -> tuple[Any, ...]:
    """The values of `VARIANT` of a row."""
    return tuple(row.conditions.get(name, before) for name, before in VARIANT.items())
