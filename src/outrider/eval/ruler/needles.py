"""Needles in a haystack: single, multi-key, multi-value and multi-query (RULER, section 3).

Style "ruler" states and asks in RULER's words. Style "facts" does so in the one format that the built-in pair was trained on
(eval/facts.py), which has one answer a question: where several values are asked for, they are asked for one by one behind
the same text, and the values of one key are facts of several kinds about one person.
"""

from __future__ import annotations

import random
from typing import TypeVar

from outrider.eval.facts import DIGITS, FIRST_NAMES, KINDS, SURNAMES, Fact
from outrider.eval.ruler.draw import Draw
from outrider.eval.ruler.sample import Plan, Question

Item = TypeVar("Item")

NEEDLES = 4  # of the families with several
FACT_TOKENS = DIGITS + 2  # a space and the digits, a token each at most, and one that a tokenizer may put before them
RULER_TOKENS = 128

_ADJECTIVES = """
abrupt ancient bitter brave bright broken calm careful clever cold crooked curious distant dusty eager early empty faint
famous fierce gentle golden grateful hollow honest humble idle jolly lonely loud mellow modest narrow nimble obscure odd
patient placid polite proud quaint quiet rapid rustic scarce secret silent slender solemn steady stern sturdy sudden tender
tidy timid upright vague vivid weary wistful witty
"""
_NOUNS = """
acorn anchor anvil apron arrow barrel basket beacon bonnet bridge bucket candle canvas castle chimney cradle curtain
dagger ember falcon feather ferry garden goblet hammer harbor harp hatchet hedge jacket kettle ladder lantern lattice
locket mantle marble meadow mirror needle orchard paddle parcel pebble pillow plough quarry quilt ribbon saddle satchel
shovel spindle staircase stove thimble timber tunnel turnip vessel violin wagon willow
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def single(draw: Draw) -> Plan:
    """One needle, asked for."""
    return _one_of(draw, 1)


def multi_key(draw: Draw) -> Plan:
    """Several keys of one kind with a value each; one of them is asked for, the others mislead."""
    return _one_of(draw, NEEDLES)


def multi_value(draw: Draw) -> Plan:
    """One key with several values; all are asked for."""
    if draw.style == "facts":
        [name] = _names(draw.rng, 1)
        kinds = draw.rng.sample(KINDS, NEEDLES)
        return _facts(draw, _with_digits(draw.rng, [(kind, name) for kind in kinds]), NEEDLES)
    [key] = _keys(draw.rng, 1)
    return _magic(draw, [(key, value) for value in _values(draw.rng, NEEDLES)], [key])


def multi_query(draw: Draw) -> Plan:
    """Several keys with a value each; all are asked for."""
    if draw.style == "facts":
        subjects = [(draw.rng.choice(KINDS), name) for name in _names(draw.rng, NEEDLES)]
        return _facts(draw, _with_digits(draw.rng, subjects), NEEDLES)
    keys = _keys(draw.rng, NEEDLES)
    return _magic(draw, list(zip(keys, _values(draw.rng, NEEDLES), strict=True)), keys)


def _one_of(draw: Draw, needles: int) -> Plan:
    if draw.style == "facts":
        kind = draw.rng.choice(KINDS)
        return _facts(draw, _with_digits(draw.rng, [(kind, name) for name in _names(draw.rng, needles)]), 1)
    keys = _keys(draw.rng, needles)
    return _magic(draw, list(zip(keys, _values(draw.rng, needles), strict=True)), keys[:1])


def _facts(draw: Draw, facts: list[Fact], asked: int) -> Plan:
    """Plant all facts, each on a line of its own, where it has the tokens it was trained with; ask for the first `asked`."""
    hidden = draw.hide([f"\n{fact.statement}\n" for fact in _shuffled(draw.rng, facts)])
    return Plan(
        build=lambda size: f"{hidden.text(size)}\n",
        least=1,
        most=hidden.most,
        questions=tuple(Question(text=fact.question, expected=(fact.digits,)) for fact in facts[:asked]),
        new_tokens=FACT_TOKENS,
        exact=True,
    )


def _magic(draw: Draw, needles: list[tuple[str, str]], keys: list[str]) -> Plan:
    """Plant all needles (key, value), ask for those of `keys`."""
    values = tuple(value for key, value in needles if key in keys)
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if len(values) == 1:
        told, asked, number, verb = "A special magic number is", "What is", "number", "is"
    else:
        told, asked, number, verb = "Some special magic numbers are", "What are all", "numbers", "are"
    told += f" hidden within the following text. Make sure to memorize it. I will quiz you about the {number} afterwards.\n"
    wanted = f"special magic {number} for {query} mentioned in the provided text"
    statements = [f"One of the special magic numbers for {key} is: {value}. " for key, value in needles]
    hidden = draw.hide(_shuffled(draw.rng, statements))
    return Plan(
        build=lambda size: told + hidden.text(size),
        least=1,
        most=hidden.most,
        questions=(Question(text=f"\n{asked} the {wanted}? The {wanted} {verb}", expected=values),),
        new_tokens=RULER_TOKENS,
    )


def _shuffled(rng: random.Random, items: list[Item]) -> list[Item]:
    return rng.sample(items, len(items))


def _names(rng: random.Random, count: int) -> list[str]:
    drawn = rng.sample(range(len(FIRST_NAMES) * len(SURNAMES)), count)
    return [f"{FIRST_NAMES[at // len(SURNAMES)]} {SURNAMES[at % len(SURNAMES)]}" for at in drawn]


def _with_digits(rng: random.Random, subjects: list[tuple[str, str]]) -> list[Fact]:
    digits = rng.sample(range(10**DIGITS), len(subjects))
    return [Fact(kind, name, f"{number:0{DIGITS}d}") for (kind, name), number in zip(subjects, digits, strict=True)]


def _keys(rng: random.Random, count: int) -> list[str]:
    drawn = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[at // len(NOUNS)]}-{NOUNS[at % len(NOUNS)]}" for at in drawn]


def _values(rng: random.Random, count: int) -> list[str]:
    return [str(value) for value in rng.sample(range(10**6, 10**7), count)]
