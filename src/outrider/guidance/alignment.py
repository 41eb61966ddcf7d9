"""Alignments on disk: which draft heads each target head follows, for which pair of models, measured on what.

A file is JSON, one line per target layer, so that it can be read and compared by eye. `sources` is
`[Lt][Hs][G][2]`: target layer, list-owning head, merged draft heads, (draft layer, draft query head). A target layer that
has no lists (sliding-window attention, never calibrated) has (-1, -1) everywhere. What stands for the tokens that lists leave
out is the same mean values for all (`unlisted_values`, `[Lt][Hkv][D]`), and by map and method the weights of their shares
(`unlisted_weights`, `[Lt][Hq]`); `costs`, where a map has them, are what lists of the shares `cost_shares` cost,
`[Lt][Hs][shares]` (`budgets.py`). Files of version 1 may have neither.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.errors import AlignmentError
from outrider.guidance.files import ModelIdentity, Reader, write
from outrider.types import Alignment, ListCosts, UnlistedFit

FORMAT = "outrider-alignment"
VERSION = 2
VERSIONS = (1, VERSION)  # that can be read


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
        **_values(file),
        "maps": {name: _entry(entry) for name, entry in file.maps.items()},
    }


def _values(file: AlignmentFile) -> dict[str, Any]:
    """The mean values, which all fits share."""
    fits = [fit for entry in file.maps.values() for fit in entry.alignment.unlisted.values()]
    return {"unlisted_values": _rounded(fits[0].values)} if fits else {}


def _entry(entry: AlignmentMap) -> dict[str, Any]:
    fits = entry.alignment.unlisted
    weights = {"unlisted_weights": {method: _rounded(fit.weights) for method, fit in fits.items()}} if fits else {}
    return {"quality": entry.quality, **weights, "sources": entry.alignment.sources.tolist()} | _costs(entry.alignment)


def _costs(alignment: Alignment) -> dict[str, Any]:
    if alignment.costs is None:
        return {}
    return {"cost_shares": list(alignment.costs.shares), "costs": _rounded(alignment.costs.values)}


def _rounded(x: Tensor) -> list[Any]:
    """Nested lists of numbers with five digits, which read back as what they were rounded to."""
    if x.dim() > 1:
        return [_rounded(row) for row in x]
    return [float(f"{value:.5g}") for value in x.tolist()]


class _Reader(Reader):
    """Turns one file into an AlignmentFile."""

    def file(self) -> AlignmentFile:
        document = self.document(FORMAT, VERSIONS)
        maps, values = self.get(document, "maps"), None
        if "unlisted_values" in document:
            values = self._numbers(document, "unlisted_values", "[layers][KV heads][head dim]", 3).float()
        if not isinstance(maps, dict) or not maps:
            self.fail(f"maps: got {maps!r}; allowed: an object with at least one map")
        return AlignmentFile(
            target=self.identity(document, "target"),
            draft=self.identity(document, "draft"),
            maps={name: self._map(name, entry, values) for name, entry in maps.items()},
            **{name: self.typed(document, name, kind) for name, kind in _FIELDS.items()},
        )

    def _map(self, name: str, entry: Any, values: Tensor | None) -> AlignmentMap:
        where = f"maps.{name}."
        layer_map, plus, head_map = name.partition("+")
        if not (layer_map and plus and head_map):
            self.fail(f"maps: got the name {name!r}; allowed: layer_map+head_map")
        if not isinstance(entry, dict):
            self.fail(f"maps.{name}: got {entry!r}; allowed: an object")
        quality = self.typed(entry, "quality", dict, where)
        quality = {key: self.typed(quality, key, float, f"{where}quality.") for key in quality}
        sources = self._sources(entry, where)
        fits = {} if values is None else self._fits(entry, where, values, len(sources))
        alignment = Alignment(sources=sources, costs=self._list_costs(entry, where, sources), unlisted=fits)
        return AlignmentMap(layer_map, head_map, alignment, quality)

    def _fits(self, entry: dict[str, Any], where: str, values: Tensor, layers: int) -> dict[str, UnlistedFit]:
        if len(values) != layers:
            self.fail(f"unlisted_values: got {len(values)} layers; allowed: {layers}, as {where}sources")
        found = self.typed(entry, "unlisted_weights", dict, where)
        where, fits = f"{where}unlisted_weights.", {}
        for method in found:
            weights = self._numbers(found, method, "[layers][query heads]", 2, where).float()
            if len(weights) != layers or weights.shape[1] % values.shape[1] or (weights < 0).any():
                allowed = f"numbers >= 0, of {layers} layers, each of a multiple of {values.shape[1]} heads"
                self.fail(
                    f"{where}{method}: got {list(weights.shape)} numbers from {float(weights.min()):g} on; allowed: {allowed}"
                )
            fits[method] = UnlistedFit(values=values, weights=weights)
        return fits

    def _numbers(self, entry: dict[str, Any], name: str, shape: str, dims: int, where: str = "") -> Tensor:
        try:
            tensor = torch.tensor(self.get(entry, name, where), dtype=torch.float64)
        except (ValueError, TypeError, RuntimeError, OverflowError):
            tensor = torch.empty(0)
        if tensor.dim() != dims or tensor.numel() == 0 or not tensor.isfinite().all():
            self.fail(f"{where}{name}: malformed; allowed: finite numbers {shape}, every layer alike")
        return tensor

    def _list_costs(self, entry: dict[str, Any], where: str, sources: Tensor) -> ListCosts | None:
        if "costs" not in entry:
            return None
        shares = self._numbers(entry, "cost_shares", "from 0 to 1, ascending", 1, where)
        values = self._numbers(entry, "costs", f"[{len(sources)} layers][heads][{len(shares)} shares]", 3, where)
        if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or (shares.diff() <= 0).any():
            self.fail(f"{where}cost_shares: malformed; allowed: numbers from 0 to 1, ascending")
        if values.shape[0] != len(sources) or values.shape[2] != len(shares) or (values < 0).any():
            self.fail(f"{where}costs: malformed; allowed: numbers >= 0, [{len(sources)} layers][heads][{len(shares)} shares]")
        return ListCosts(shares=tuple(shares.tolist()), values=values)

    def _sources(self, entry: dict[str, Any], where: str) -> Tensor:
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
        return tensor
