"""SpAtten part by part: what pruning heads, and values, does beside pruning tokens."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

from outrider.config import Budget
from outrider.eval.perplexity import evaluate
from outrider.eval.rows import Case, Row, Text
from outrider.guidance.rivals import RIVALS, Rival
from outrider.guidance.rivals.spatten import HEADS, VALUES, SpAtten
from outrider.models import LanguageModel


def part(values: float, heads: tuple[tuple[float, float], ...]) -> type[Rival]:
    """The method with these shares of values and heads."""
    return type("Part", (SpAtten,), {"values": values, "heads": heads})


PARTS = {
    "tokens": part(1.0, ()),
    "tokens and heads": part(1.0, HEADS),
    "tokens and values": part(VALUES, ()),
    "tokens, heads and values": part(VALUES, HEADS),
}


def compare(
    pair: tuple[LanguageModel, LanguageModel], texts: list[Text], keeps: list[float], context: int, scored: int
) -> Iterator[Row]:
    """Rows of task perplexity for every text, budget and part."""
    cases = [Case(method=name, budget=Budget(keep=keep)) for keep in keeps for name in PARTS]
    with patch.dict(RIVALS, PARTS):
        rows = evaluate(pair, None, texts, cases, context=context, scored_tokens=scored)
    return rows
