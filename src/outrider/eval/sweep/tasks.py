"""The tasks of a sweep: their options as they stand in a plan, what they are asked about, and how they run.

A new task is a class like these and one name in `TASKS`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from outrider.config import check
from outrider.eval import facts_task, perplexity, qa_task, ruler_task
from outrider.eval.qa_data import Document, Fields, read_documents
from outrider.eval.rows import Row, Text
from outrider.eval.ruler.families import FAMILIES, check_ruler

ReadText = Callable[[str, Path], str]  # (name of the option in errors, file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What one cell asks a task about."""

    name: str  # as rows have it in `text`
    digest: str  # of the content
    content: Any  # a Text, or what else the task takes
    part: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(ABC):
    """The options of a task. As most do, this one asks about the plan's texts and makes one row a text and case."""

    name: ClassVar[str]
    reads_texts: ClassVar[bool] = True  # the subjects are the plan's texts
    fills_context: ClassVar[bool] = True  # a text must have as many tokens as the context
    batches: ClassVar[bool] = False  # takes `batch_size`, and reads so many subjects together

    @property
    def rows_a_case(self) -> int:
        """Rows that one subject has for each case."""
        return 1

    def for_target(self, target: str) -> Self:
        """The same, with what depends on the target's name."""
        return self

    def subjects(self, texts: Sequence[Text], read_text: ReadText) -> list[Subject]:
        """What it is asked about. Raises OptionError or PromptError for a file that cannot be used."""
        return [Subject(name=text.name, digest=digest(text.text), content=text) for text in texts]

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that a figure depends on beside models, subject, context and case."""

    @abstractmethod
    def evaluate(self, subjects: Sequence[Subject], **given: Any) -> Iterator[Row]:
        """The rows of `subjects`, all of one part; `given` goes to the task as it is. Options are checked at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity(Task):
    """`outrider eval perplexity`."""

    name: ClassVar[str] = "perplexity"
    batches: ClassVar[bool] = True

    scored_tokens: int = 1280

    def __post_init__(self) -> None:
        check("scored-tokens", self.scored_tokens, self.scored_tokens >= 1, "a whole number >= 1")

    def identity(self) -> dict[str, Any]:
        return {"scored_tokens": self.scored_tokens}

    def evaluate(self, subjects: Sequence[Subject], **given: Any) -> Iterator[Row]:
        return perplexity.evaluate(texts=[one.content for one in subjects], scored_tokens=self.scored_tokens, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts(Task):
    """`outrider eval facts`; which facts a text gets depends on its name, not on its place among the texts."""

    name: ClassVar[str] = "facts"

    facts: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check("facts", self.facts, self.facts >= 1, "a whole number >= 1")

    def identity(self) -> dict[str, Any]:
        return {"facts": self.facts, "seed": self.seed}

    def evaluate(self, subjects: Sequence[Subject], **given: Any) -> Iterator[Row]:
        seed = " ".join([str(self.seed), *(one.name for one in subjects)])
        return facts_task.evaluate(texts=[one.content for one in subjects], facts=self.facts, seed=seed, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler(Task):
    """`outrider eval ruler`: a family of a text is a subject."""

    name: ClassVar[str] = "ruler"
    fills_context: ClassVar[bool] = False

    families: tuple[str, ...] = tuple(FAMILIES)
    samples: int = 5
    style: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_ruler(self.families, self.style or "ruler", self.samples)

    def for_target(self, target: str) -> Self:
        return replace(self, style=self.style or ("facts" if target == "builtin" else "ruler"))

    def identity(self) -> dict[str, Any]:
        return {"samples": self.samples, "style": self.style, "seed": self.seed}

    def subjects(self, texts: Sequence[Text], read_text: ReadText) -> list[Subject]:
        whole = Task.subjects(self, texts, read_text)
        return [replace(one, part=family) for one in whole for family in dict.fromkeys(self.families)]

    @property
    def rows_a_case(self) -> int:
        return self.samples

    def evaluate(self, subjects: Sequence[Subject], **given: Any) -> Iterator[Row]:
        families = tuple(dict.fromkeys(one.part for one in subjects)) or self.families
        options: dict[str, Any] = {"families": families, "samples": self.samples, "style": self.style, "seed": self.seed}
        return ruler_task.evaluate(texts=[one.content for one in subjects], **options, **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qa(Task):
    """`outrider eval qa`: a document with its questions is a subject."""

    name: ClassVar[str] = "qa"
    reads_texts: ClassVar[bool] = False
    fills_context: ClassVar[bool] = False

    data: Path
    context_field: str = "context"
    question_field: str = "question"
    answers_field: str = "answers"
    documents: int | None = None
    questions: int | None = None
    plant_in: Path | None = None
    truncate: bool = False
    max_new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("documents", "questions", "max_new_tokens"):
            value = getattr(self, name)
            check(name.replace("_", "-"), value, value is None or value >= 1, "a whole number >= 1")

    def identity(self) -> dict[str, Any]:
        own = {"truncate": self.truncate, "max_new_tokens": self.max_new_tokens}
        return own | ({} if self.plant_in is None else {"plant_in": self.plant_in.stem, "seed": self.seed})

    def subjects(self, texts: Sequence[Text], read_text: ReadText) -> list[Subject]:
        fields = Fields(context=self.context_field, question=self.question_field, answers=self.answers_field)
        book = self.plant_in and Text(name=self.plant_in.stem, text=read_text("plant-in", self.plant_in))
        return [
            Subject(name=one.name, digest=digest(f"{one}{book or ''}"), content=(one, book))
            for one in read_documents(self.data, fields, self.documents, self.questions)
        ]

    def evaluate(self, subjects: Sequence[Subject], **given: Any) -> Iterator[Row]:
        documents: list[Document] = [one.content[0] for one in subjects]
        book = next((one.content[1] for one in subjects), None)
        options: dict[str, Any] = {"truncate": self.truncate, "max_new_tokens": self.max_new_tokens, "seed": self.seed}
        return qa_task.evaluate(documents=documents, plant_in=book, **options, **given)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Perplexity, Facts, Ruler, Qa)}


def digest(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
