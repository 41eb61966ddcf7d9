"""The text that needles, or whole documents, are hidden in: a book, word by word, and how much of it fits."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property

_WORD = re.compile(r"\S+\s*")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
_PLAIN = re.compile(r"\b[a-z]{4,}\b")


class Book:
    """A text as words, each with the whitespace behind it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = _WORD.findall(text)

    @cached_property
    def vocabulary(self) -> list[str]:
        """Its distinct words of four or more small letters, sorted."""
        return sorted(set(_PLAIN.findall(self.text)))

    def planted(self, start: int, count: int, needles: Sequence[tuple[float, str]]) -> str:
        """Words start .. start + count - 1 with every needle (depth in [0, 1], text) behind the sentence that ends nearest.

        A depth is a share of the words. Needles keep their order where they meet. A text without sentences takes them anywhere.
        """
        places = []
        for depth, needle in needles:
            wanted = start + round(depth * count)
            at = bisect_left(self._ends, wanted)
            near = [end for end in self._ends[max(0, at - 1) : at + 1] if start < end <= start + count]
            places.append((min(near, key=lambda end: abs(end - wanted), default=wanted), needle))
        places.sort(key=lambda place: place[0])
        parts, done = [], start
        for place, needle in places:
            parts.append("".join(self.words[done:place]))
            if place == len(self.words):
                parts.append(" ")
            parts.append(needle)
            done = place
        parts.append("".join(self.words[done : start + count]))
        return "".join(parts).strip()

    @cached_property
    def _ends(self) -> list[int]:
        """Places behind the last word of a sentence."""
        return [i for i, word in enumerate(self.words, start=1) if _SENTENCE_END.search(word.rstrip())]

    def without_middle(self, count: int) -> str:
        """The first and last words, `count` in all, the first one more where that is odd."""
        left = len(self.words) - count
        head = (count + 1) // 2
        return "".join((*self.words[:head], *self.words[head + left :])).strip()


def longest_that_fits(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest size in low .. high that fits, where larger ones fit less; `low` is known to. Bisection."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
