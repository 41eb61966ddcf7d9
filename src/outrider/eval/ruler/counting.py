"""Words that occur more often than the others: common-words and frequent-words extraction (RULER, section 3)."""

from __future__ import annotations

import random
import string

from outrider.eval.ruler.draw import Draw
from outrider.eval.ruler.sample import Plan, Question

COMMON = 10  # words to be found in the list
OFTEN, SELDOM = 30, 3  # times that a common word and any other one are listed
SHORT = 4096  # tokens; below this many a list has room for less:
OFTEN_IF_SHORT, SELDOM_IF_SHORT = 10, 1
COMMON_TOKENS = 120
COMMON_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most "
    "often.\n"
)
COMMON_QUESTION = (
    f"\nQuestion: What are the {COMMON} most common words in the above list? "
    f"Answer: The top {COMMON} words that appear most often in the list are:"
)

FREQUENT = 3  # words to be found in the coded text
EXPONENT, ZETA = 2.0, 1.6449340668482264  # of the Zipf distribution, and what its weights k ** -2 add up to
LETTERS = 6  # of a coded word
LEAST = 80  # words of a coded text; from here on the third word to be found always leads the next
FREQUENT_TOKENS = 50
DOTS = "...."  # in place of the most frequent word
FREQUENT_OPENING = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. "
)
FREQUENT_QUESTION = (
    f"\nQuestion: Do not provide any explanation. Please ignore the dots '{DOTS}'. What are the three most frequently appeared "
    "words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:"
)


def common_words(draw: Draw) -> Plan:
    """A numbered list in which ten words stand ten times as often as the others; its length is the number of these others.

    Words are the book's own, but for those that the question says. RULER shows an example before it asks; here there is none.
    """
    vocabulary = [word for word in draw.book.vocabulary if word not in COMMON_QUESTION]
    draw.rng.shuffle(vocabulary)
    common, others = vocabulary[:COMMON], vocabulary[COMMON:]
    often, seldom = (OFTEN, SELDOM) if draw.context >= SHORT else (OFTEN_IF_SHORT, SELDOM_IF_SHORT)
    seed = draw.rng.random()

    def build(size: int) -> str:
        words = common * often + others[:size] * seldom
        random.Random(seed).shuffle(words)
        return COMMON_OPENING + " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))

    return Plan(
        build=build,
        least=1,
        most=len(others),
        questions=(Question(text=COMMON_QUESTION, expected=tuple(common)),),
        new_tokens=COMMON_TOKENS,
    )


def frequent_words(draw: Draw) -> Plan:
    """A text of coded words whose counts follow Zipf's law; the most frequent is dots, the next three are asked for."""
    kinds = int((draw.context / ZETA) ** (1 / EXPONENT)) + FREQUENT + 2  # no text of this context has more
    words: list[str] = [DOTS]
    while len(words) < kinds:
        word = "".join(draw.rng.choices(string.ascii_lowercase, k=LETTERS))
        if word not in words:
            words.append(word)
    seed = draw.rng.random()

    def build(size: int) -> str:
        coded = [word for rank, word in enumerate(words, start=1) for _ in range(int(size * rank**-EXPONENT / ZETA))]
        random.Random(seed).shuffle(coded)
        return FREQUENT_OPENING + " ".join(coded)

    return Plan(
        build=build,
        least=LEAST,
        most=2 * draw.context,
        questions=(Question(text=FREQUENT_QUESTION, expected=tuple(words[1 : FREQUENT + 1])),),
        new_tokens=FREQUENT_TOKENS,
    )
