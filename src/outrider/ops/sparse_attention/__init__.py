"""Attention of a round's queries over listed tokens of the cache, or all, and the causal tail."""

from outrider.ops.sparse_attention.api import sparse_attention

__all__ = ["sparse_attention"]
