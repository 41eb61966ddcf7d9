"""Softmax mass that each block of a prompt's chunk puts on every token before it."""

from outrider.ops.block_mass.api import block_mass

__all__ = ["block_mass"]
