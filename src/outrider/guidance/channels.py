"""Which channels of a target's keys weigh most in its logits: learned once per target, kept in a file, read by what guesses
logits from few channels.

A file is JSON, one line per layer. `ranking` is `[L][Hkv][D]`: the channels of every KV head, the heaviest first; layers
without full attention have -1 throughout.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.guidance.files import ModelIdentity, Reader, write

FORMAT = "outrider-channels"
VERSION = 1
_FIELDS: dict[str, type] = {"text": str, "text_digest": str, "tokens": int}


@dataclass(frozen=True, slots=True, eq=False)
class ChannelFile:
    """The channels of one target, with the conditions of the calibration."""

    target: ModelIdentity
    text: str  # name of the calibration text
    text_digest: str
    tokens: int  # tokens of the text that were read
    ranking: Tensor  # [L, Hkv, D] int64


def ranked(weights: Tensor) -> Tensor:
    """Channels by weight, the heaviest first, of equal ones the lower: [..., D] -> [..., D] int64."""
    return weights.sort(dim=-1, descending=True, stable=True).indices


def save(file: ChannelFile, path: str | os.PathLike[str]) -> None:
    """Write `file` to `path` in one step. Raises AlignmentError when it cannot be written."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "target": asdict(file.target),
        **{name: getattr(file, name) for name in _FIELDS},
        "ranking": file.ranking.tolist(),
    }
    write("channel", document, Path(path))


def load(path: str | os.PathLike[str], *, target: ModelIdentity | None) -> ChannelFile:
    """Read a channel file and check that it belongs to `target` (None: do not check).

    Raises AlignmentError, naming the file, what came and what is allowed, when it is unreadable or malformed or was made for
    another model.
    """
    reader = Reader("channel", Path(path))
    document = reader.document(FORMAT, (VERSION,))
    file = ChannelFile(
        target=reader.identity(document, "target"),
        ranking=_ranking(reader, document),
        **{name: reader.typed(document, name, kind) for name, kind in _FIELDS.items()},
    )
    reader.check_made_for("target", target, file.target)
    return file


def _ranking(reader: Reader, document: dict[str, Any]) -> Tensor:
    try:
        ranking = torch.tensor(reader.get(document, "ranking"))
    except (ValueError, TypeError, RuntimeError, OverflowError):
        ranking = torch.empty(0)
    if ranking.dtype != torch.int64 or ranking.dim() != 3 or ranking.numel() == 0:
        reader.fail("ranking: malformed; allowed: whole numbers [layers][KV heads][channels], every layer alike")
    each = torch.arange(ranking.shape[-1]).expand_as(ranking)
    if not ((ranking.sort(-1).values == each) | (ranking == -1).flatten(1).all(1)[:, None, None]).all():
        reader.fail("ranking: some head lacks a channel; allowed: every channel once, or -1 throughout a layer")
    return ranking
