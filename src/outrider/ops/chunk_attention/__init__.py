"""Causal attention of a chunk of the prompt, of which each block reads its listed tokens and itself, or everything."""

from outrider.ops.chunk_attention.api import chunk_attention, kernel_obstacle

__all__ = ["chunk_attention", "kernel_obstacle"]
