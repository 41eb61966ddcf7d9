"""Estimated softmax mass that blocks of a prompt put on spans of the tokens before them."""

from outrider.ops.span_mass.api import PAGE, span_mass

__all__ = ["PAGE", "span_mass"]
