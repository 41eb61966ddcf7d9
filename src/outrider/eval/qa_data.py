"""Documents with questions from local files: JSON lines, or parquet where pyarrow is installed.

A field may lie deeper: "question.text" is field text of object question. Where the name of the question leads through a list,
as "questions.question" does in FairytaleQA, every item is a question, and its answers are looked for in the same item. Of
answers there may be a list; a list of texts as context is joined by blank lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.errors import OptionError, PromptError

FORMATS = ".jsonl, .json (one object a line) or .parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question and the answers that references give."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A context and all that is asked about it."""

    name: str
    context: str
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Names of a record's fields, with dots where they lie deeper."""

    context: str = "context"
    question: str = "question"
    answers: str = "answers"


def read_documents(path: Path, fields: Fields, documents: int | None = None, questions: int | None = None) -> list[Document]:
    """The first `documents` of a file with the first `questions` of each; records with the same context are one document.

    The whole file is checked. Raises PromptError, naming file, line (row) and field, for a record that cannot be used,
    OptionError for another kind of file and where pyarrow is missing.
    """
    contexts: dict[str, tuple[int, list[Asked]]] = {}
    for number, record in _records(path):
        where = f"--data {path}, {'row' if path.suffix == '.parquet' else 'line'} {number}"
        context, asked = _document(record, fields, where)
        contexts.setdefault(context, (number, []))[1].extend(asked)
    if not contexts:
        raise PromptError(f"--data {path}: no records; allowed: {FORMATS}")
    return [
        Document(name=f"{path.stem} {number}", context=context, asked=tuple(asked[:questions]))
        for context, (number, asked) in list(contexts.items())[:documents]
    ]


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Every record with its line or row, from 1."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), start=1)
        return
    if path.suffix not in (".jsonl", ".json"):
        raise OptionError("data", str(path), FORMATS)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parsed(line, f"--data {path}, line {number}")
    except OSError as error:
        raise PromptError(f"--data {path}: cannot be read ({error.strerror}); allowed: {FORMATS}") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not UTF-8 (byte {error.start}); allowed: a JSON object") from error
    except json.JSONDecodeError as error:
        raise PromptError(f"{where}: not JSON ({error.msg}, column {error.colno}); allowed: a JSON object") from error


def _parquet(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise OptionError("data", str(path), "a .jsonl file, or .parquet with pip install 'outrider[parquet]'") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # of pyarrow's errors these two are the bases
        raise PromptError(f"--data {path}: cannot be read ({error}); allowed: {FORMATS}") from error


def _document(record: Any, fields: Fields, where: str) -> tuple[str, list[Asked]]:
    context = "\n\n".join(_texts(record, fields.context, f"{where}, field {fields.context}"))
    shared, question, answers = _shared(fields.question, fields.answers)
    items = _walk(record, shared, f"{where}, field {fields.question}") if shared else [record]
    asked = []
    for item in items:
        found = _texts(item, question, f"{where}, field {fields.question}")
        if len(found) != 1:
            raise PromptError(f"{where}, field {fields.question}: got {len(found)} texts; allowed: one question")
        references = _texts(item, answers, f"{where}, field {fields.answers}")
        asked.append(Asked(question=found[0], answers=tuple(dict.fromkeys(references))))
    if not asked:
        raise PromptError(f"{where}, field {fields.question}: got no question; allowed: at least one")
    return context, asked


def _shared(question: str, answers: str) -> tuple[str, str, str]:
    """What two dotted names begin with in common, and what is left of each."""
    a, b, n = question.split("."), answers.split("."), 0
    while n < min(len(a), len(b)) - 1 and a[n] == b[n]:
        n += 1
    return ".".join(a[:n]), ".".join(a[n:]), ".".join(b[n:])


def _texts(item: Any, name: str, where: str) -> list[str]:
    """The text, or the texts, under a dotted name; at least one, none of them blank."""
    found = _walk(item, name, where)
    for text in found:
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{where}: got {_short(text)}; allowed: text")
    if not found:
        raise PromptError(f"{where}: got an empty list; allowed: text")
    return [text.strip() for text in found]


def _walk(item: Any, name: str, where: str) -> list[Any]:
    """All values under a dotted name, lists on the way and at the end taken apart."""
    found = [item]
    for part in name.split("."):
        entered: list[Any] = []
        for value in found:
            if not isinstance(value, dict):
                raise PromptError(f"{where}: got {_short(value)} where {part!r} should be; allowed: an object")
            if part not in value:
                raise PromptError(f"{where}: missing; allowed: one of {', '.join(map(repr, value)) or 'no fields at all'}")
            entered += value[part] if isinstance(value[part], list) else [value[part]]
        found = entered
    return found


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
