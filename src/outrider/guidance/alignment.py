"""Alignments on disk: which draft heads each target head follows, for which pair of models, measured on what.

A file is JSON, one line per target layer, so that it can be read and compared by eye. `sources` is
`[Lt][Hs][G][2]`: target layer, list-owning head, merged draft heads, (draft layer, draft query head). A target layer that
has no lists (sliding-window attention, never calibrated) has (-1, -1) everywhere.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import torch

from outrider.errors import AlignmentError
from outrider.types import Alignment

FORMAT = "outrider-alignment"
VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model an alignment was made for: a name for people, a digest for the check."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} ({self.digest})"


@dataclass(frozen=True, slots=True)
class AlignmentMap:
    """One fitted alignment and how well it did on rounds it was not fitted on."""

    layer_map: str  # proportional, monotone or joint
    head_map: str  # average, jaccard or recall
    alignment: Alignment
    quality: dict[str, float]  # held-out figures, see Calibration.fit

    @property
    def name(self) -> str:
        return f"{self.layer_map}+{self.head_map}"


@dataclass(frozen=True, slots=True)
class AlignmentFile:
    """All alignments of one pair of models, with the conditions of the calibration."""

    target: ModelIdentity
    draft: ModelIdentity
    text: str  # name of the calibration text
    text_digest: str
    tokens: int  # tokens of the text that were read
    rounds: int  # rounds scored, half of them held out
    queries_per_round: int
    keep: float  # share of the tokens that recall was measured at
    maps: dict[str, AlignmentMap]  # by "layer_map+head_map"

    def map(self, name: str) -> AlignmentMap:
        """The map of that name ("joint+recall"); AlignmentError names the maps present."""
        if name not in self.maps:
            raise AlignmentError(f"alignment map: got {name!r}; allowed (present in the file): {', '.join(sorted(self.maps))}")
        return self.maps[name]


_FIELDS: dict[str, type] = {
    "text": str,
    "text_digest": str,
    "tokens": int,
    "rounds": int,
    "queries_per_round": int,
    "keep": float,
}


def save(file: AlignmentFile, path: str | os.PathLike[str]) -> None:
    """Write `file` to `path` in one step: a reader sees the old file or the new one, and a failure leaves nothing behind.

    Raises AlignmentError when the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_text(_render(_document(file)) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise AlignmentError(f"alignment file {path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, target: ModelIdentity | None, draft: ModelIdentity | None) -> AlignmentFile:
    """Read an alignment file and check that it belongs to `target` and `draft` (None: do not check that model).

    Raises AlignmentError, naming the file, what came and what is allowed, when the file is unreadable or malformed or was
    made for other models.
    """
    reader = _Reader(Path(path))
    file = reader.file()
    for role, wanted, found in (("target", target, file.target), ("draft", draft, file.draft)):
        if wanted is not None and wanted != found:
            reader.fail(f"made for the {role} {found}, but the {role} here is {wanted}; calibrate this pair or pass its file")
    return file


def _document(file: AlignmentFile) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "target": {"name": file.target.name, "digest": file.target.digest},
        "draft": {"name": file.draft.name, "digest": file.draft.digest},
        **{name: getattr(file, name) for name in _FIELDS},
        "maps": {
            name: {"quality": entry.quality, "sources": entry.alignment.sources.tolist()} for name, entry in file.maps.items()
        },
    }


def _render(value: Any, indent: str = "") -> str:
    """JSON with one line per field and per target layer."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_render(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}"
    if isinstance(value, list) and value:
        lines = [inner + json.dumps(item, separators=(",", ":")) for item in value]
        return "[\n" + ",\n".join(lines) + "\n" + indent + "]"
    return json.dumps(value, allow_nan=False)


class _Reader:
    """Turns the text of one file into an AlignmentFile; every complaint names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, complaint: str) -> NoReturn:
        raise AlignmentError(f"alignment file {self.path}: {complaint}")

    def file(self) -> AlignmentFile:
        document = self._document()
        for name, allowed in (("format", FORMAT), ("version", VERSION)):
            got = self._get(document, name)
            if got != allowed or isinstance(got, bool):
                self.fail(f"{name}: got {got!r}; allowed: {allowed!r}")
        maps = self._get(document, "maps")
        if not isinstance(maps, dict) or not maps:
            self.fail(f"maps: got {maps!r}; allowed: an object with at least one map")
        return AlignmentFile(
            target=self._identity(document, "target"),
            draft=self._identity(document, "draft"),
            maps={name: self._map(name, entry) for name, entry in maps.items()},
            **{name: self._typed(document, name, kind) for name, kind in _FIELDS.items()},
        )

    def _document(self) -> dict[str, Any]:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror or error}")
        except (ValueError, RecursionError) as error:
            self.fail(f"not JSON ({error}); allowed: a file written by `outrider calibrate`")
        if not isinstance(document, dict):
            self.fail(f"got a JSON {type(document).__name__}; allowed: a JSON object")
        return document

    def _get(self, entry: dict[str, Any], name: str, where: str = "") -> Any:
        if name not in entry:
            self.fail(f"{where}{name}: missing")
        return entry[name]

    def _typed(self, entry: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
        value: Any = self._get(entry, name, where)
        kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
        if type(value) not in kinds:
            self.fail(f"{where}{name}: got {value!r}; allowed: a {kind.__name__}")
        if kind is float and not abs(value) <= sys.float_info.max:  # not NaN, infinite or too large for a float
            self.fail(f"{where}{name}: got {value!r}; allowed: a finite number")
        return kind(value)

    def _identity(self, document: dict[str, Any], role: str) -> ModelIdentity:
        entry = self._typed(document, role, dict)
        return ModelIdentity(*(self._typed(entry, name, str, f"{role}.") for name in ("name", "digest")))

    def _map(self, name: str, entry: Any) -> AlignmentMap:
        where = f"maps.{name}."
        layer_map, plus, head_map = name.partition("+")
        if not (layer_map and plus and head_map):
            self.fail(f"maps: got the name {name!r}; allowed: layer_map+head_map")
        if not isinstance(entry, dict):
            self.fail(f"maps.{name}: got {entry!r}; allowed: an object")
        quality = self._typed(entry, "quality", dict, where)
        quality = {key: self._typed(quality, key, float, f"{where}quality.") for key in quality}
        return AlignmentMap(layer_map, head_map, self._sources(entry, where), quality)

    def _sources(self, entry: dict[str, Any], where: str) -> Alignment:
        sources = self._get(entry, "sources", where)
        try:
            tensor = torch.tensor(sources)
        except (ValueError, TypeError, RuntimeError, OverflowError):
            tensor = torch.empty(0)
        if tensor.dtype != torch.int64 or tensor.dim() != 4 or tensor.shape[-1] != 2 or tensor.numel() == 0:
            self.fail(f"{where}sources: malformed; allowed: whole numbers [layers][heads][merged][2], every layer alike")
        without_lists = (tensor == -1).flatten(1).all(1)
        if (tensor[~without_lists] < 0).any():
            self.fail(f"{where}sources: got a negative number; allowed: numbers >= 0, or -1 throughout a layer without lists")
        return Alignment(sources=tensor)
