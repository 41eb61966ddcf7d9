"""Results files into rows, diagnostics and traces. Whatever is wrong is named by file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from outrider.errors import ResultsError
from outrider.eval.report.lines import DIAGNOSTICS, Diagnostic, FieldError, Trace
from outrider.eval.rows import Row

ROW_TASKS = ("perplexity", "facts", "ruler", "qa")
TASKS = (*ROW_TASKS, *DIAGNOSTICS, "trace")
SWEEP, SWEEP_VERSION = "sweep.json", 1
ALLOWED = "files of JSON lines that `outrider eval` or `generate --trace` wrote, or a folder that `outrider eval sweep` made"

Kind = TypeVar("Kind")


@dataclass(kw_only=True)
class Results:
    """All that the files hold, in their order."""

    files: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
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
        for where, record in _records(path):
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


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror}); allowed: {ALLOWED}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path}: not UTF-8 (at offset {error.start}); allowed: {ALLOWED}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResultsError(f"{where}: not JSON ({error}); allowed: one object a line") from error
        if not isinstance(record, dict):
            raise ResultsError(f"{where}: got {type(record).__name__}; allowed: one JSON object a line")
        yield where, record


def _line(where: str, record: dict[str, Any]) -> Row | Diagnostic | Trace:
    task = record.get("task")
    if task not in TASKS:
        raise ResultsError(f"{where}, field task: got {task!r}; allowed: {', '.join(TASKS)}")
    kind: type[Row | Diagnostic | Trace] = Row if task in ROW_TASKS else DIAGNOSTICS.get(task, Trace)
    try:
        return _parse(kind, record, open_ended=kind is not Row)
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


def _parse(kind: type[Kind], record: dict[str, Any], prefix: str = "", *, open_ended: bool) -> Kind:
    """A dataclass from a JSON object, every field of the type that it declares; `open_ended` lets other fields pass.

    Raises FieldError.
    """
    own = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name in record:
        if name not in own and not open_ended:
            raise FieldError(prefix + name, "an unknown field", ", ".join(own))
    values, hints = {}, get_type_hints(kind)
    for name, one in own.items():
        if name in record:
            values[name] = _typed(prefix + name, record[name], hints[name])
        elif one.default is MISSING and one.default_factory is MISSING:
            raise FieldError(prefix + name, "nothing", _said(hints[name]))
    return kind(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value`, once it is certain that it is what `hint` says; numbers are finite."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return _parse(hint, value, f"{name}, ", open_ended=True)
    if origin in (Union, UnionType):
        kinds = [kind for kind in inner if get_origin(kind) is None and _is(value, kind)]
        containers = [kind for kind in inner if get_origin(kind) is not None and isinstance(value, get_origin(kind))]
        if kinds or containers:
            return _typed(name, value, (kinds or containers)[0])
    elif origin is list and isinstance(value, list):
        return [_typed(name, item, inner[0]) for item in value]
    elif origin is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(_typed(name, item, kind) for item, kind in zip(value, inner, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: _typed(f"{name}.{key}", item, inner[1]) for key, item in value.items()}
    elif origin is None and _is(value, hint):
        return value
    raise FieldError(name, value, _said(hint))


def _is(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if kind is type(None):
        return value is None
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _said(hint: Any) -> str:
    """How an error says a type."""
    if is_dataclass(hint):
        return "an object"
    names = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false", type(None): "null"}
    if hint in names:
        return names[hint]
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_said(one) for one in inner)
    return "an object" if origin is dict else f"a list of {_said(inner[0])}"
