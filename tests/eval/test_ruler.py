"""RULER's families: samples fit, repeat, and can be solved from their text alone by a plain program."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import OptionError, PromptError
from outrider.eval.book import Book, longest_that_fits
from outrider.eval.ruler.families import FAMILIES, STYLES, check_ruler, make_samples
from outrider.eval.ruler.needles import ADJECTIVES, NEEDLES, NOUNS
from outrider.eval.ruler.sample import Question, Sample

NEEDLE_FAMILIES = ("single", "multi-key", "multi-value", "multi-query")
STATEMENTS = {  # what states a value, in the style of the needles
    "facts": r"\[The ([a-z ]+ of [A-Z][a-z]+ [A-Z][a-z]+) is (\d{6})\.\]",
    "ruler": r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.",
}


@pytest.fixture(scope="module")
def novel(book) -> Book:
    return Book(book)


def count(text: str) -> int:
    """Words, marks and spaces."""
    return len(re.findall(r"\w+|[^\w\s]|\s", text))


def solve(family: str, style: str, prompt: str) -> list[str]:
    """What a reader who never slips would answer."""
    if family == "variable-tracking":
        [value] = re.findall(r"assigned the value (\d+) in the text above", prompt)
        held: dict[str, str] = {}
        for name, source in re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)$", prompt, re.MULTILINE):
            held[name] = held.get(source, source)
        return [name for name, found in held.items() if found == value]
    if family == "common-words":
        counts = Counter(re.findall(r"\b\d+\. ([a-z]+)", prompt)).most_common(11)
        assert counts[9][1] > counts[10][1]
        return [word for word, _ in counts[:10]]
    if family == "frequent-words":
        text = prompt.split("Find the three most frequently appeared coded words. ")[1].split("\n")[0]
        counts = Counter(word for word in text.split() if word != "....").most_common(4)
        assert counts[2][1] > counts[3][1]
        return [word for word, _ in counts[:3]]
    stated = re.findall(STATEMENTS[style], prompt)
    assert len(set(stated)) == len(stated) == (1 if family == "single" else NEEDLES), "every needle once"
    if style == "facts":
        [asked] = re.findall(r"\[Question: what is the (.+)\? Answer:$", prompt)
        keys = [asked]
    else:
        [asked] = re.findall(r"mentioned in the provided text\? The special magic numbers? for (.+) mentioned", prompt)
        keys = re.findall(r"[a-z]+-[a-z]+", asked)
    return [value for key, value in stated if key in keys]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), context=st.integers(1200, 5000), samples=st.integers(1, 3))
def test_samples_fit_repeat_and_can_be_solved(novel, family, style, seed, context, samples):
    options = {"context": context, "samples": samples, "style": style, "seed": seed}
    made = make_samples("book", novel, family, count, **options)
    assert made == make_samples("book", novel, family, count, **options)
    assert len({sample.text for sample in made}) == samples == len(made)
    for sample in made:
        lengths = [count(prompt) + sample.new_tokens for prompt in sample.prompts]
        assert context - 60 < max(lengths) <= context, "as long as it can be"
        for prompt, question in zip(sample.prompts, sample.questions, strict=True):
            assert sorted(solve(family, style, prompt)) == sorted(question.expected)
            assert not any(expected in question.text for expected in question.expected)
        answers = [" " + " and ".join(question.expected) for question in sample.questions]
        assert sample.recalled(answers) == sample.asked
        assert sample.recalled(["nothing"] * len(answers)) == 0


@pytest.mark.parametrize(
    ("family", "style", "questions", "asked"),
    [
        ("single", "facts", 1, 1),
        ("multi-key", "facts", 1, 1),
        ("multi-value", "facts", NEEDLES, NEEDLES),
        ("multi-query", "facts", NEEDLES, NEEDLES),
        ("single", "ruler", 1, 1),
        ("multi-key", "ruler", 1, 1),
        ("multi-value", "ruler", 1, NEEDLES),
        ("multi-query", "ruler", 1, NEEDLES),
    ],
)
def test_needles_by_family(novel, family, style, questions, asked):
    [sample] = make_samples("book", novel, family, count, context=2000, samples=1, style=style, seed=1)
    assert (len(sample.questions), sample.asked) == (questions, asked)
    keys = {key for key, _ in re.findall(STATEMENTS[style], sample.text)}
    assert len(keys) == (1 if family == "single" or (family, style) == ("multi-value", "ruler") else NEEDLES)
    kinds, names = {key.split(" of ")[0] for key in keys}, {key.split(" of ")[-1] for key in keys}
    if style == "facts":  # of several values one person has several kinds, of several keys several people have one
        assert (len(kinds) == 1) == (family in ("single", "multi-key"))
        assert (len(names) == 1) == (family in ("single", "multi-value"))


@pytest.mark.parametrize("style", STYLES)
def test_depths_are_spread_evenly(novel, style):
    made = make_samples("book", novel, "single", count, context=6000, samples=10, style=style, seed=3)
    for number, sample in enumerate(made):
        [match] = re.finditer(STATEMENTS[style], sample.text)
        assert match.start() / len(sample.text) == pytest.approx((number + 0.5) / 10, abs=0.06)  # the next sentence end
    [several] = make_samples("book", novel, "multi-query", count, context=6000, samples=1, style=style, seed=3)
    places = [match.start() / len(several.text) for match in re.finditer(STATEMENTS[style], several.text)]
    assert places == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=0.06)


def test_assignments_stand_in_order(novel):
    [sample] = make_samples("book", novel, "variable-tracking", count, context=3000, samples=1, style="ruler", seed=5)
    names = re.findall(r"VAR ([A-Z]{5}) = ", sample.text)
    assert tuple(names) == sample.questions[0].expected and len(names) == 5


def test_what_is_drawn_depends_on_seed_text_and_number(novel):
    def one(name: str = "book", **changed) -> list[Sample]:
        options = {"context": 1500, "samples": 2, "style": "facts", "seed": 0} | changed
        return make_samples(name, novel, "single", count, **options)

    first = one()
    for other in (one(seed=1), one("another"), one(context=1501)):
        assert {s.questions for s in other}.isdisjoint({s.questions for s in first})
    assert first[0].questions != first[1].questions


def test_recall_of_facts_is_exact_and_of_others_anywhere():
    sample = {"text": "", "questions": (Question(text="", expected=("402913",)),), "new_tokens": 8}
    answers = {" 402913.]": (1, 1), "402913": (1, 1), " is 402913": (0, 1), " 402912": (0, 0), "": (0, 0)}
    for answer, (exact, anywhere) in answers.items():
        assert Sample(**sample, exact=True).recalled([answer]) == exact
        assert Sample(**sample, exact=False).recalled([answer]) == anywhere
    words = Sample(text="", questions=(Question(text="", expected=("river", "stone", "hat")),), new_tokens=8, exact=False)
    assert words.recalled(["1. River 2. stone"]) == 2


def test_planted_keeps_words_and_order():
    book = Book('One two. Three four?" Five six seven eight nine ten')
    assert book.planted(0, 10, [(0.5, "[A] "), (0.5, "[B] "), (1.0, "[C]")]) == (
        'One two. Three four?" [A] [B] [C]Five six seven eight nine ten'
    )
    assert book.planted(4, 3, [(0.5, "[A] ")]) == "Five six [A] seven"  # no sentence ends there
    assert book.planted(2, 2, []) == 'Three four?"'
    assert Book("a b. c").planted(0, 3, [(1.0, "[A]")]) == "a b. [A]c"
    assert Book("a b c").planted(0, 3, [(1.0, "[A]")]) == "a b c [A]"
    assert [Book("a b  c d").without_middle(n) for n in range(5)] == ["", "a", "a d", "a b  d", "a b  c d"]
    assert Book("It had been there, in the hall; NOT Here a hall").vocabulary == ["been", "hall", "there"]


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=30), room=st.integers(0, 60))
def test_longest_that_fits(lengths, room):
    totals = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert longest_that_fits(lambda n: totals[n] <= room, 0, len(lengths)) == max(n for n, t in enumerate(totals) if t <= room)


def test_key_words_are_distinct():
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) and all(word.isalpha() and word.islower() for word in words)


def test_what_cannot_be_made_is_refused(novel):
    options = {"samples": 1, "style": "facts", "seed": 0}
    for family in FAMILIES:
        with pytest.raises(OptionError, match=f"context: got 50; allowed: at least .* for family {family}"):
            make_samples("book", novel, family, count, context=50, **options)
    with pytest.raises(PromptError, match=r"text tale: fills .* tokens of family single; allowed: at least 3000"):
        make_samples("tale", Book("Once upon a time. " * 20), "single", count, context=3000, **options)
    with pytest.raises(PromptError, match="text tale: has too few words for family common-words; allowed: a longer text"):
        make_samples("tale", Book("Once upon some time. " * 20), "common-words", count, context=3000, **options)
    for family in NEEDLE_FAMILIES:
        with pytest.raises(PromptError, match=f"text blank: has too few words for family {family}"):
            make_samples("blank", Book("\n"), family, count, context=3000, **options)


@pytest.mark.parametrize(
    ("families", "style", "samples", "says"),
    [
        (["single", "haystack"], "facts", 1, "family: got 'haystack'; allowed: single, multi-key, .*, frequent-words"),
        ([], "facts", 1, "family: got"),
        (["single"], "poem", 1, "style: got 'poem'; allowed: facts, ruler"),
        (["single"], "facts", 0, "samples: got 0; allowed: a whole number >= 1"),
    ],
)
def test_bad_options(families, style, samples, says):
    with pytest.raises(OptionError, match=says):
        check_ruler(families, style, samples)
