"""Queries and keys of new tokens are normed and rotated, keys and values written behind the cached ones."""

from outrider.ops.rotary_append.api import rotary_append

__all__ = ["rotary_append"]
