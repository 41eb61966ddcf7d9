"""Outrider: the draft model rides ahead and marks the tokens worth attending to; the target model reads only those."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from outrider.config import VERSION

if TYPE_CHECKING:
    from outrider.config import Budget, EngineConfig, SamplingParams
    from outrider.decoding.outrider import Chunk, Outrider, Result, Stream
    from outrider.errors import OutriderError

_HOMES = {
    "Budget": "outrider.config",
    "Chunk": "outrider.decoding.outrider",
    "EngineConfig": "outrider.config",
    "Outrider": "outrider.decoding.outrider",
    "OutriderError": "outrider.errors",
    "Result": "outrider.decoding.outrider",
    "SamplingParams": "outrider.config",
    "Stream": "outrider.decoding.outrider",
}

__version__ = VERSION
__all__ = ["Budget", "Chunk", "EngineConfig", "Outrider", "OutriderError", "Result", "SamplingParams", "Stream"]


def __getattr__(name: str) -> object:
    """Import public names when they are first used, so that `import outrider` loads neither torch nor transformers."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'outrider' has no attribute {name!r}")
