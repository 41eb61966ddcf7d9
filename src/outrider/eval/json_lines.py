"""Files of JSON lines into dataclasses: whatever is wrong is named by file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from outrider.errors import ResultsError

Kind = TypeVar("Kind")


class FieldError(ValueError):
    """A field of a line is not what it should be."""

    def __init__(self, name: str, got: Any, allowed: str) -> None:
        super().__init__(f"field {name}: got {got!r}; allowed: {allowed}")


def check_field(name: str, got: Any, ok: bool, allowed: str) -> None:
    """Raise FieldError unless `ok`."""
    if not ok:
        raise FieldError(name, got, allowed)


def check_shares(name: str, values: list[float]) -> None:
    """Raise FieldError unless all lie in 0 .. 1."""
    for value in values:
        check_field(name, value, 0 <= value <= 1, "shares in 0 .. 1")


def check_matrix(name: str, layers: list[int], values: list[list[float]]) -> None:
    """Raise FieldError unless these are shares by layer and head."""
    check_field(
        name, f"{len(values)} layers", len(values) == len(layers) > 0, f"one list for each of {len(layers)} layers, 1 or more"
    )
    widths = sorted({len(row) for row in values})
    same = len(widths) == 1 and widths[0] > 0
    check_field(name, f"lists of {widths} heads", same, "equally many heads in every layer, 1 or more")
    for row in values:
        check_shares(name, row)


def records(path: Path, allowed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line, and where it is. Raises ResultsError for one that is no object; `allowed` says what the file should be."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror}); allowed: {allowed}") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path}: not UTF-8 (at offset {error.start}); allowed: {allowed}") from error
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


def parse(kind: type[Kind], record: dict[str, Any], prefix: str = "", *, open_ended: bool = False) -> Kind:
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
        return parse(hint, value, f"{name}, ", open_ended=True)
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
