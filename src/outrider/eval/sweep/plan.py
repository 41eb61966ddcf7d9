"""What a sweep computes: one YAML file, validated, as a frozen plan, and the cells that it falls into."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from outrider.config import DTYPES, Budget, EngineConfig, check
from outrider.eval.rows import DENSE, Case, Row, Text
from outrider.eval.sweep.document import QUICK, Node, keys_of, read_document
from outrider.eval.sweep.tasks import TASKS, ReadText, Subject, Task
from outrider.guidance.rivals import RIVALS
from outrider.guidance.selectors import SELECTORS

METHODS = (DENSE, *SELECTORS, *RIVALS)
CASES = ("methods", "keeps", "top-p")  # keys that a task may have for itself, as these:
SHARES = ("keep", "top_p")  # the fields of a budget that the last two stand for
PLACES = ("texts", "contexts")
ENGINE = EngineConfig()  # its defaults are ours
CaseKey = tuple[str, float | None, float | None]  # method, keep, top-p


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models run, and how: the options of `outrider eval` under the same names."""

    target: str = "builtin"
    draft: str | None = None
    alignment: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    draft_tokens: int = ENGINE.draft_tokens
    prefill_chunk: int = ENGINE.prefill_chunk
    batch_size: int = 1  # texts that a task may read together
    kv_dtype: str = ENGINE.kv_dtype
    score_keys: str = ENGINE.score_keys
    backend: str = ENGINE.backend

    def __post_init__(self) -> None:
        check("dtype", self.dtype, self.dtype in DTYPES, ", ".join(DTYPES))
        engine = {f.name for f in fields(EngineConfig)}
        EngineConfig(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in engine})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A task about one subject in one context: the work that its cases share is the smallest that is worth sharing."""

    task: Task
    subject: Subject
    context: int
    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(filter(None, [self.task.name, self.subject.part, self.subject.name, str(self.context)]))

    @property
    def stem(self) -> str:
        """For files: readable, and another one for each cell."""
        key = json.dumps([self.task.name, self.subject.part, self.subject.name, self.context])
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.name)[:80]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def owns(self, row: Row) -> bool:
        """The row is one of this task, part and context. What it is about shows in its text, as the task writes it."""
        return (row.task, row.part, row.context) == (self.task.name, self.subject.part, self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A task with all that it runs on."""

    task: Task
    subjects: tuple[Subject, ...]
    contexts: tuple[int, ...]
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that a sweep computes."""

    models: Models
    budget: dict[str, Any]  # what all cases have in common
    works: tuple[Work, ...]

    @property
    def cells(self) -> list[Cell]:
        """Task by task, context by context, in the order of the plan."""
        return [
            Cell(task=work.task, subject=subject, context=context, cases=work.cases)
            for work in self.works
            for context in work.contexts
            for subject in work.subjects
        ]

    @property
    def options(self) -> dict[str, Any]:
        """All but the models that a figure depends on, for comparison with what a folder was made for."""
        return {
            "budget": self.budget,
            "tasks": {
                work.task.name: work.task.identity()
                | {"maps": {case.method: case.map or "the method's own" for case in work.cases if case.method in SELECTORS}}
                for work in self.works
            },
            "texts": {one.name: one.digest for work in self.works for one in work.subjects},
        }

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the whole plan: its cells, cases, options and texts."""
        models = {f.name: str(getattr(self.models, f.name)) for f in fields(self.models)}
        cells = [[cell.stem, *map(case_key, cell.cases)] for cell in self.cells]
        return hashlib.sha256(json.dumps([models, self.options, cells]).encode()).hexdigest()[:16]


def case_key(of: Case | Row) -> CaseKey:
    """By which rows and cases find each other."""
    if isinstance(of, Row):
        return of.method, of.keep, of.top_p
    return (of.method, None, None) if of.budget is None else (of.method, of.budget.keep, of.budget.top_p)


def read_plan(file: Path, read_text: ReadText, *, quick: bool = False) -> Plan:
    """The plan of a YAML file (`docs/evaluation.md` has all keys), with `quick` its reduced version.

    Raises SweepError, naming file, key, what came and what is allowed, for anything that is wrong with it; PromptError for a
    text that cannot be read.
    """
    return _Reader(read_document(file, quick=quick), read_text).plan()


class _Reader:
    """Turns the document into a plan; texts are read once."""

    def __init__(self, document: Node, read_text: ReadText) -> None:
        self.document, self.read_text = document, read_text
        self.top = document.entries(["models", *PLACES, *CASES, "budget", "tasks", QUICK])
        self.texts: dict[Path, Text] = {}
        self.names: dict[str, Path] = {}

    def plan(self) -> Plan:
        models = self._models()
        budget = self._budget()
        if "tasks" not in self.top:
            self.document.fail("tasks is missing", ", ".join(TASKS))
        tasks = self.top["tasks"].entries(TASKS)
        if not tasks:
            self.top["tasks"].refuse(f"at least one of {', '.join(TASKS)}")
        works = tuple(self._work(name, node, models, budget) for name, node in tasks.items())
        return Plan(models=models, budget=budget, works=works)

    def _models(self) -> Models:
        if "models" not in self.top:
            return Models()
        node = self.top["models"]
        models: Models = node.fill(Models)
        if models.alignment is not None and not models.alignment.is_file():
            node.fail(f"alignment: no file {str(models.alignment)!r}", "a file of `outrider calibrate`")

        def folder(name: str) -> str:
            """A folder beside the plan, else the name as it is: of the hub, or "builtin"."""
            beside = node.file.parent / name
            return str(beside) if beside.is_dir() else name

        return replace(models, target=folder(models.target), draft=models.draft and folder(models.draft))

    def _budget(self) -> dict[str, Any]:
        """What the budgets of all cases have in common."""
        budget = Budget()
        if "budget" in self.top:
            self.top["budget"].entries(keys_of(Budget, *SHARES))
            budget = self.top["budget"].fill(Budget)
        return {f.name: getattr(budget, f.name) for f in fields(Budget) if f.name not in SHARES}

    def _work(self, name: str, node: Node, models: Models, budget: dict[str, Any]) -> Work:
        if node.value is None:  # "facts:" alone
            node = Node(value={}, path=node.path, file=node.file)
        shared = [*CASES, "contexts", *(["texts"] if TASKS[name].reads_texts else [])]
        entries = self.top | node.entries([*keys_of(TASKS[name]), *shared])
        made: Task = node.without(*shared).fill(TASKS[name])
        task = made.for_target(models.target)
        for key in ("contexts", "methods", *(["texts"] if task.reads_texts else [])):
            if key not in entries:
                self.document.fail(f"{key} is missing", f"{key} here or at {node.path}")
        contexts = entries["contexts"].as_type(tuple[int, ...])
        for item, context in zip(entries["contexts"].items("numbers"), contexts, strict=True):
            item.checked(lambda context=context: check("context", context, context >= 2, "a whole number >= 2"))
        texts = self._texts(entries["texts"]) if task.reads_texts else []
        return Work(
            task=task,
            contexts=tuple(dict.fromkeys(contexts)),
            cases=tuple(self._cases(entries, budget)),
            subjects=tuple(node.checked(lambda: task.subjects(texts, self.read_text))),
        )

    def _cases(self, entries: dict[str, Node], budget: dict[str, Any]) -> Iterator[Case]:
        seen = set()
        for node in entries["methods"].items("methods"):
            own = node.entries(["name", "keeps", "top-p", "map"]) if isinstance(node.value, dict) else {"name": node}
            if "name" not in own:
                node.fail("name is missing", ", ".join(METHODS))
            method = own["name"].as_type(str)
            if method not in METHODS:
                own["name"].refuse(", ".join(METHODS))
            if method in seen:
                own["name"].fail(f"{method!r} stands twice", "each method once, with all its budgets")
            seen.add(method)
            if method == DENSE:
                if len(own) > 1:
                    node.refuse("dense alone: it has no budget and no map")
                yield Case(method=DENSE)
                continue
            if "map" in own and method in RIVALS:
                own["map"].refuse(f"no map: {method} is not guided by the draft")
            alignment_map = own["map"].as_type(str) if "map" in own else None
            for given in self._budgets(node, entries | own, own, method, budget):
                yield Case(method=method, budget=given, map=alignment_map)

    def _budgets(
        self, node: Node, entries: dict[str, Node], own: dict[str, Node], method: str, common: dict[str, Any]
    ) -> list[Budget]:
        named = zip(CASES[1:], SHARES, strict=True)
        shares = [(key, name, entries[key].items("numbers")) for key, name in named if key in entries]
        if not shares:
            node.fail(f"{method!r} has no budget", "keeps or top-p, here, at the task or for the whole plan")
        made = []
        for key, name, items in shares:
            fitting = RIVALS[method].budgeted if method in RIVALS else name
            if fitting != name and (key != "keeps" or key in own):
                entries[key].refuse(f"{fitting.replace('keep', 'keeps').replace('_', '-')} with method {method}")
            if fitting != name:  # the plan's keeps are for the others
                continue
            for item in items:
                share = {name: item.as_type(float)}
                made.append(item.checked(lambda share=share: Budget(**share, **common)))
        if not made:
            node.fail(f"{method!r} has no budget", "top-p, here")
        return list(dict.fromkeys(made))

    def _texts(self, node: Node) -> list[Text]:
        found = [(item, path) for item in node.items("files") for path in self._files(item)]
        for item, path in found:
            if path not in self.texts:
                other = self.names.setdefault(path.stem, path)
                if other != path:
                    item.fail(f"two texts named {path.stem!r}: {other} and {path}", "files whose names differ")
                self.texts[path] = Text(name=path.stem, text=item.checked(lambda path=path: self.read_text("file", path)))
        return [self.texts[path] for path in dict.fromkeys(path for _, path in found)]

    def _files(self, node: Node) -> list[Path]:
        path: Path = node.as_type(Path)
        if path.exists() or not re.search(r"[*?\[]", path.name):
            return [path]
        matching = sorted(path.parent.glob(path.name))
        if not matching:
            node.fail(f"no file matches {str(path)!r}", "a file, or a pattern that files match")
        return matching
