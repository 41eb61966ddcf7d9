"""Facts: distinct, reproducible, worded as the checkpoints learned them."""

from __future__ import annotations

import random

import pytest

from outrider.eval.facts import FIRST_NAMES, KINDS, SURNAMES, Fact, draw_facts


def test_wording_is_that_of_the_checkpoints() -> None:
    fact = Fact("vault code", "Clara Whitcombe", "402913")
    assert fact.statement == "[The vault code of Clara Whitcombe is 402913.]"
    assert fact.exchange == "[Question: what is the vault code of Clara Whitcombe? Answer: 402913.]"
    assert fact.exchange == fact.question + fact.answer + fact.closing


def test_draws_repeat_and_never_ask_twice_about_one_subject() -> None:
    facts = draw_facts(random.Random(3), 3000)
    assert facts == draw_facts(random.Random(3), 3000)
    assert facts != draw_facts(random.Random(4), 3000)
    assert len({(f.kind, f.name) for f in facts}) == len(facts)
    assert all(len(f.digits) == 6 and f.digits.isdigit() for f in facts)
    assert any(f.digits[0] == "0" for f in facts)


def test_lists_hold_no_repeats_and_too_many_facts_are_refused() -> None:
    for words in (KINDS, FIRST_NAMES, SURNAMES):
        assert len(set(words)) == len(words)
    with pytest.raises(ValueError, match="distinct subjects"):
        draw_facts(random.Random(0), len(KINDS) * len(FIRST_NAMES) * len(SURNAMES) + 1)
