"""How close an answer comes to its references: token F1 and ROUGE-L, each against the best reference, in [0, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"[^\W_]+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words shared with a reference, normalised as for SQuAD (Rajpurkar et al. 2016): small letters, without
    punctuation and articles. Order does not matter, repetitions count."""
    return _best(answer, references, _squad_words, _shared)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure (Lin 2004): F1 of the longest common subsequence of words; small letters, without punctuation."""
    return _best(answer, references, _words, _common_subsequence)


Words = list[str]


def _best(
    answer: str, references: Sequence[str], words: Callable[[str], Words], overlap: Callable[[Words, Words], int]
) -> float:
    given = words(answer)
    return max(_f1(given, wanted, overlap(given, wanted)) for wanted in map(words, references))


def _f1(given: Words, wanted: Words, overlap: int) -> float:
    """2PR / (P + R) with P = overlap / len(given), R = overlap / len(wanted); two empty texts are equal."""
    return 2 * overlap / (len(given) + len(wanted)) if given or wanted else 1.0


def _squad_words(text: str) -> Words:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _words(text: str) -> Words:
    return _WORDS.findall(text.lower())


def _shared(a: Words, b: Words) -> int:
    return (Counter(a) & Counter(b)).total()


def _common_subsequence(a: Words, b: Words) -> int:
    """Length of the longest common subsequence, row by row of the dynamic programme."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]
