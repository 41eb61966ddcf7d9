"""Token F1 and ROUGE-L: hand-computed examples, and what must hold for any two texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.eval.scores import rouge_l, token_f1

SCORES = (token_f1, rouge_l)
VOCABULARY = ("king", "queen", "river", "stone", "three", "golden", "hairs", "went", "home")
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "rouge"),
    [
        # F1: king went home | king went away: 2 shared of 3 and 3. ROUGE-L keeps both articles: 3 of 4 and 4
        ("The king went home.", "the King went away", 2 / 3, 3 / 4),
        # 1 shared, of 3 words in the answer and 1 in the reference: 2 * 1 / 4
        ("a giant stone bridge", "bridge", 2 * 1 / 4, 2 * 1 / 5),
        ("three golden hairs", "golden hairs three", 1.0, 2 / 3),  # order: only two words stand in the same one
        ("river river", "river", 2 * 1 / 3, 2 * 1 / 3),  # a word is shared as often as both have it
        ("stone", "river", 0.0, 0.0),
        ("", "river", 0.0, 0.0),
        ("an owl", "the owl!", 1.0, 2 * 1 / 4),
        ("don't", "dont", 1.0, 0.0),  # SQuAD drops punctuation, ROUGE splits at it
    ],
)
def test_by_hand(answer, reference, f1, rouge):
    assert token_f1(answer, [reference]) == pytest.approx(f1)
    assert rouge_l(answer, [reference]) == pytest.approx(rouge)


def test_the_best_reference_counts():
    assert token_f1("three hairs", ["a stone", "three golden hairs", "river"]) == pytest.approx(2 * 2 / 5)
    assert rouge_l("three hairs", ["a stone", "three golden hairs", "river"]) == pytest.approx(2 * 2 / 5)


@given(a=WORDS, b=WORDS)
def test_bounds_symmetry_and_identity(a, b):
    for score in SCORES:
        assert 0 <= score(a, [b]) <= 1
        assert score(a, [b]) == score(b, [a])
        assert score(a, [a]) == score(a, [b, a]) == 1
        assert score(a, [a.upper() + "!"]) == 1
        if not set(a.split()) & set(b.split()) and (a or b):
            assert score(a, [b]) == 0
    assert rouge_l(a, [b]) <= token_f1(a, [b])  # a common subsequence is shared words


@given(words=st.permutations(["king", "queen", "river", "stone", "golden"]))
def test_order_matters_for_rouge_l_only(words):
    text = "king queen river stone golden"
    assert token_f1(" ".join(words), [text]) == 1
    assert (rouge_l(" ".join(words), [text]) == 1) == (words == text.split())


@given(a=st.lists(st.sampled_from("abc"), max_size=6), b=st.lists(st.sampled_from("abc"), max_size=6))
def test_longest_common_subsequence_is_that_of_the_definition(a, b):
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    expected = 2 * longest(0, 0) / (len(a) + len(b)) if a or b else 1
    assert rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(expected)
