"""How much of the scored mass token lists leave out."""

from outrider.ops.unlisted_mass.api import unlisted_mass

__all__ = ["unlisted_mass"]
