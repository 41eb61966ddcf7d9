"""JSON files of what was learned about models: written whole or not at all, and read with every mistake named."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from outrider.errors import AlignmentError


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a file was made for: a name for people, a digest for the check."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} ({self.digest})"


def write(kind: str, document: dict[str, Any], path: Path) -> None:
    """Write `document` to `path` in one step: a reader sees the old file or the new one, and a failure leaves nothing behind.

    `kind` names the file in errors. Raises AlignmentError when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_text(_render(document) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise AlignmentError(f"{kind} file {path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _render(value: Any, indent: str = "") -> str:
    """JSON with one line per field and per layer of a model."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_render(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
    if isinstance(value, list) and value:
        lines = [inner + json.dumps(item, separators=(",", ":")) for item in value]
        return "[\n" + ",\n".join(lines) + "\n" + indent + "]"
    return json.dumps(value, allow_nan=False)


class Reader:
    """Reads one file; every complaint is an AlignmentError that names it."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind, self.path = kind, path

    def fail(self, complaint: str) -> NoReturn:
        raise AlignmentError(f"{self.kind} file {self.path}: {complaint}")

    def document(self, format_name: str, versions: tuple[int, ...]) -> dict[str, Any]:
        """The JSON object in the file, once it is known to be of this format and one of these versions."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror or error}")
        except (ValueError, RecursionError) as error:
            self.fail(f"not JSON ({error}); allowed: a file written by `outrider calibrate`")
        if not isinstance(document, dict):
            self.fail(f"got a JSON {type(document).__name__}; allowed: a JSON object")
        for name, allowed in (("format", (format_name,)), ("version", versions)):
            got = self.get(document, name)
            if got not in allowed or isinstance(got, bool):
                self.fail(f"{name}: got {got!r}; allowed: {', '.join(map(repr, allowed))}")
        return document

    def get(self, entry: dict[str, Any], name: str, where: str = "") -> Any:
        if name not in entry:
            self.fail(f"{where}{name}: missing")
        return entry[name]

    def typed(self, entry: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
        value: Any = self.get(entry, name, where)
        kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
        if type(value) not in kinds:
            self.fail(f"{where}{name}: got {value!r}; allowed: a {kind.__name__}")
        if kind is float and not abs(value) <= sys.float_info.max:  # not NaN, infinite or too large for a float
            self.fail(f"{where}{name}: got {value!r}; allowed: a finite number")
        return kind(value)

    def identity(self, document: dict[str, Any], role: str) -> ModelIdentity:
        entry = self.typed(document, role, dict)
        return ModelIdentity(*(self.typed(entry, name, str, f"{role}.") for name in ("name", "digest")))

    def check_made_for(self, role: str, wanted: ModelIdentity | None, found: ModelIdentity) -> None:
        """Fail unless `found` is the model at hand (None: any)."""
        if wanted is not None and wanted != found:
            self.fail(f"made for the {role} {found}, but the {role} here is {wanted}; calibrate this pair or pass its file")
