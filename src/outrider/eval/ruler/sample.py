"""A sample and how it is made as long as the context allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outrider.errors import OptionError, PromptError
from outrider.eval.book import longest_that_fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What follows a sample's text, and the strings that a right answer holds."""

    text: str
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A sample but for its length. `build` gives its text up to the question; a larger size gives a longer one."""

    build: Callable[[int], str]
    least: int  # smallest size that makes sense
    most: int  # largest size that the book allows
    questions: tuple[Question, ...]  # each is asked alone, behind the same text
    new_tokens: int  # that an answer may have
    exact: bool = False  # an answer begins with what is expected; else it holds it somewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Prompts that share all but their last lines."""

    text: str
    questions: tuple[Question, ...]
    new_tokens: int
    exact: bool

    @property
    def prompts(self) -> list[str]:
        return [self.text + question.text for question in self.questions]

    @property
    def asked(self) -> int:
        """Strings expected of all answers together."""
        return sum(len(question.expected) for question in self.questions)

    def recalled(self, answers: list[str]) -> int:
        """How many of them the answers give (RULER's string match, which ignores case)."""
        return sum(
            answer.lstrip().startswith(expected) if self.exact else expected.lower() in answer.lower()
            for answer, question in zip(answers, self.questions, strict=True)
            for expected in question.expected
        )


def fit(plan: Plan, count: Callable[[str], int], context: int, family: str, name: str) -> Sample:
    """The longest sample whose prompts and answers fit into `context` tokens, as `count` counts them.

    Raises OptionError when not even the shortest fits, PromptError when the text `name` cannot fill the context.
    """
    if plan.most < plan.least:
        raise PromptError(f"text {name}: has too few words for family {family}; allowed: a longer text")
    room = context - plan.new_tokens
    longest = max(plan.questions, key=lambda question: count(question.text)).text

    def length(size: int) -> int:
        return count(plan.build(size) + longest)

    low = plan.least
    shortest = max(count(plan.build(low) + question.text) for question in plan.questions)
    if shortest > room:
        raise OptionError("context", context, f"at least {shortest + plan.new_tokens} tokens for family {family}")
    high = min(plan.most, max(room, low))  # a step of size is a token or more
    if high == plan.most and length(high) <= room:
        raise PromptError(
            f"text {name}: fills {length(high) + plan.new_tokens} tokens of family {family}; allowed: at least {context} "
            "(the context asked for)"
        )
    size = longest_that_fits(lambda size: length(size) <= room, low, high)
    # which question is the longest may depend on how the tokenizer merges its beginning with the text before it
    while size > low and any(count(plan.build(size) + question.text) > room for question in plan.questions):
        size -= 1
    return Sample(text=plan.build(size), questions=plan.questions, new_tokens=plan.new_tokens, exact=plan.exact)
