"""Softmax mass that a round's queries put on every cached key."""

from outrider.ops.attention_mass.api import attention_mass

__all__ = ["attention_mass"]
