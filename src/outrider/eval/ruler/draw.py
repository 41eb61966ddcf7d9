"""What a family makes a sample from."""

from __future__ import annotations

import random
from dataclasses import dataclass

from outrider.eval.book import Book


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """A piece of a book with needles in it."""

    book: Book
    start: int  # first word
    needles: list[tuple[float, str]]  # depth as a share of the piece's words, text; ascending

    @property
    def most(self) -> int:
        """Words from `start` to the end of the book."""
        return len(self.book.words) - self.start

    def text(self, words: int) -> str:
        """The piece, so many words of the book long."""
        return self.book.planted(self.start, words, self.needles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One sample's share of chance."""

    rng: random.Random
    book: Book
    style: str  # of the needles: "facts" or "ruler"
    context: int
    depth: float  # in (0, 1): of the sample's needle; of several, of each one in its part of the text

    def hide(self, statements: list[str]) -> Hidden:
        """The statements in this order, one in each of as many equal parts of a piece of the book.

        The piece begins anywhere with a context of words behind it, at the first word where the book has no more than that.
        """
        start = self.rng.randrange(max(1, len(self.book.words) - self.context + 1))
        depths = [(part + self.depth) / len(statements) for part in range(len(statements))]
        return Hidden(book=self.book, start=start, needles=list(zip(depths, statements, strict=True)))
