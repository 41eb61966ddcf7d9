"""The families by name, and their samples from one text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from outrider.config import check
from outrider.eval.book import Book
from outrider.eval.ruler.counting import common_words, frequent_words
from outrider.eval.ruler.draw import Draw
from outrider.eval.ruler.needles import multi_key, multi_query, multi_value, single
from outrider.eval.ruler.sample import Plan, Sample, fit
from outrider.eval.ruler.tracing import variable_tracking

FAMILIES: dict[str, Callable[[Draw], Plan]] = {
    "single": single,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
}
STYLES = ("facts", "ruler")


def check_ruler(families: Sequence[str], style: str, samples: int) -> None:
    """Raise OptionError for an unknown family or style, and for less than a sample."""
    for family in families:
        check("family", family, family in FAMILIES, ", ".join(FAMILIES))
    check("family", families, len(families) > 0, ", ".join(FAMILIES))
    check("style", style, style in STYLES, ", ".join(STYLES))
    check("samples", samples, samples >= 1, "a whole number >= 1")


def make_samples(
    name: str, book: Book, family: str, count: Callable[[str], int], *, context: int, samples: int, style: str, seed: int
) -> list[Sample]:
    """`samples` samples of at most `context` tokens, answers included, needle depths spread evenly over them.

    A sample depends on its number, family, style, context, text and seed alone. Raises like `fit`.
    """
    made = []
    for number in range(samples):
        rng = random.Random(f"{seed} {context} {style} {family} {name} {number}")
        draw = Draw(rng=rng, book=book, style=style, context=context, depth=(number + 0.5) / samples)
        made.append(fit(FAMILIES[family](draw), count, context, family, name))
    return made
