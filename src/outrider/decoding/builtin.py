"""Where the model pair that ships with Outrider lies."""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin"
PAIR_FOLDER = Path(__file__).parents[1] / "pair"
BUILTIN_ALIGNMENT = PAIR_FOLDER / "alignment.json"


def builtin_path(name: str, role: str) -> str:
    """The folder of the built-in target or draft for "builtin"; any other name as it is."""
    return str(PAIR_FOLDER / role) if name == BUILTIN else name
