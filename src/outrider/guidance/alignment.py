"""Alignments on disk: which draft heads each target head follows, for which pair of models, measured on what.

A file is JSON, one line per target layer, so that it can be read and compared by eye. `sources` is
`[Lt][Hs][G][2]`: target layer, list-owning head, merged draft heads, (draft layer, draft query head). A target layer that
has no lists (sliding-window attention, never calibrated) has (-1, -1) everywhere.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from outrider.errors import AlignmentError
from outrider.guidance.files import ModelIdentity, Reader, write
from outrider.types import Alignment

FORMAT = "outrider-alignment"
VERSION = 1


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
    write("alignment", _document(file), Path(path))


def load(path: str | os.PathLike[str], *, target: ModelIdentity | None, draft: ModelIdentity | None) -> AlignmentFile:
    """Read an alignment file and check that it belongs to `target` and `draft` (None: do not check that model).

    Raises AlignmentError, naming the file, what came and what is allowed, when the file is unreadable or malformed or was
    made for other models.
    """
    reader = _Reader("alignment", Path(path))
    file = reader.file()
    reader.check_made_for("target", target, file.target)
    reader.check_made_for("draft", draft, file.draft)
    return file


def _document(file: AlignmentFile) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "target": asdict(file.target),
        "draft": asdict(file.draft),
        **{name: getattr(file, name) for name in _FIELDS},
        "maps": {
            name: {"quality": entry.quality, "sources": entry.alignment.sources.tolist()} for name, entry in file.maps.items()
        },
    }


class _Reader(Reader):
    """Turns one file into an AlignmentFile."""

    def file(self) -> AlignmentFile:
        document = self.document(FORMAT, VERSION)
        maps = self.get(document, "maps")
        if not isinstance(maps, dict) or not maps:
            self.fail(f"maps: got {maps!r}; allowed: an object with at least one map")
        return AlignmentFile(
            target=self.identity(document, "target"),
            draft=self.identity(document, "draft"),
            maps={name: self._map(name, entry) for name, entry in maps.items()},
            **{name: self.typed(document, name, kind) for name, kind in _FIELDS.items()},
        )

    def _map(self, name: str, entry: Any) -> AlignmentMap:
        where = f"maps.{name}."
        layer_map, plus, head_map = name.partition("+")
        if not (layer_map and plus and head_map):
            self.fail(f"maps: got the name {name!r}; allowed: layer_map+head_map")
        if not isinstance(entry, dict):
            self.fail(f"maps.{name}: got {entry!r}; allowed: an object")
        quality = self.typed(entry, "quality", dict, where)
        quality = {key: self.typed(quality, key, float, f"{where}quality.") for key in quality}
        return AlignmentMap(layer_map, head_map, self._sources(entry, where), quality)

    def _sources(self, entry: dict[str, Any], where: str) -> Alignment:
        sources = self.get(entry, "sources", where)
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
