"""A weight matrix times few rows, with the norm before it and the activation or residual behind it."""

from outrider.ops.fused_linear.api import MAX_ROWS, fused_linear

__all__ = ["MAX_ROWS", "fused_linear"]
