"""Errors raised to users: each names the option, what came and what is allowed.

Every error also inherits the standard exception it refines, so `except ValueError` keeps working.
"""

from __future__ import annotations


class OutriderError(Exception):
    """Base of everything Outrider raises on purpose; the command line turns it into exit code 2."""


class OptionError(OutriderError, ValueError):
    """An option has a value outside what is allowed."""

    def __init__(self, option: str, got: object, allowed: str) -> None:
        super().__init__(f"{option}: got {got!r}; allowed: {allowed}")
        self.option = option


class PromptError(OutriderError, ValueError):
    """A prompt or text cannot be read or does not fit."""


class ModelError(OutriderError, ValueError):
    """A checkpoint cannot be loaded, or its attention cannot be routed through Outrider."""


class EngineError(OutriderError, RuntimeError):
    """An engine cannot be used any more."""


class RankError(EngineError):
    """One of the processes that hold a model together has ended, or does not answer."""


class PairError(OutriderError, ValueError):
    """Draft and target do not belong together (different vocabularies, wrong alignment)."""


class AlignmentError(OutriderError, ValueError):
    """An alignment file is unreadable or was made for other models."""


class ResultsError(OutriderError, ValueError):
    """A results file cannot be read, or results do not belong together."""


class SweepError(OutriderError, ValueError):
    """The plan or the result folder of a sweep cannot be used."""
