"""The result folder of a sweep: what it was made for, rows, failures, and who computes what at the moment.

sweep.json          version, models, options and digest of the plan that ran last
rows/CELL.jsonl     `Row.as_dict()`, one line a row, all of one cell
failed/CELL.json    the error that a cell ended with, until it is done
locks/CELL          locked (flock) by the process that computes the cell; the lock ends with the process, however that ends

Files are replaced in one step, by who holds the lock: a reader sees the old file or the new one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from outrider.errors import SweepError
from outrider.eval.rows import Case, Row, read_rows
from outrider.eval.sweep.plan import Cell, Plan, case_key

FORMAT, VERSION = "outrider sweep", 1
STAMP = "sweep.json"


class Store:
    """A folder of results."""

    def __init__(self, path: Path, forgiven: frozenset[str] | None = None) -> None:
        """`forgiven`: failures of former runs, whose cells are tried again; None: all that are there.

        Raises SweepError unless `path` is a sweep's folder of this version, or an empty or new one; changes nothing.
        """
        self.path = path
        self._stamp()
        self.forgiven = frozenset(failure["id"] for failure in self._failures()) if forgiven is None else forgiven

    def open(self, plan: Plan, models: dict[str, Any]) -> None:
        """Make the folder, or check that it holds results of these models and options; what is new in `plan` is added.

        Raises SweepError, and changes nothing, where they differ or a line of results is malformed.
        """
        for folder in ("rows", "failed", "locks"):
            try:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritable(error) from error
        with self._locked("sweep"):
            for file in sorted((self.path / "rows").glob("*.jsonl")):
                read_rows(file)
            stamp = {"format": FORMAT, "version": VERSION, "models": models, "options": plan.options}
            old = self._stamp()
            merged = self._merged(old or {}, stamp) | {"plan": plan.digest}
            if merged != old:
                self._replace(self.path / STAMP, json.dumps(merged, indent=2) + "\n")

    def rows(self, cell: Cell) -> list[Row]:
        """The rows of a cell that are there, the plan's cases in its order. Raises SweepError for what does not belong."""
        file = self._rows_file(cell)
        if not file.exists():
            return []
        rows = read_rows(file)
        for number, row in enumerate(rows, start=1):
            if not cell.owns(row):
                got = f"task {row.task!r}, part {row.part!r}, context {row.context}"
                raise SweepError(f"{file}, line {number}: got a row of {got}; allowed: rows of {cell.name}")
        return rows

    def missing(self, cell: Cell) -> tuple[Case, ...]:
        """The cases that have not all of their rows."""
        return missing(cell, self.rows(cell))

    def claim(self, cell: Cell) -> Claim | None:
        """Take a cell; None where a process, this one included, has it already."""
        descriptor = self._lock(cell.stem, wait=False)
        if descriptor is None:
            return None
        try:
            return Claim(self, cell, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def failure(self, cell: Cell) -> str | None:
        """The error that a cell ended with since this store was opened, in whichever process."""
        for failure in self._failures(cell.stem):
            if failure["id"] not in self.forgiven:
                return failure["error"]
        return None

    def _failures(self, stem: str = "*") -> Iterator[dict[str, Any]]:
        for file in self.path.glob(f"failed/{stem}.json"):
            try:
                yield json.loads(file.read_text(encoding="utf-8"))
            except FileNotFoundError:  # done in the meantime
                continue
            except ValueError as error:
                raise SweepError(f"{file}: not JSON ({error}); allowed: a file of this sweep") from error

    def _rows_file(self, cell: Cell) -> Path:
        return self.path / "rows" / f"{cell.stem}.jsonl"

    def _stamp(self) -> dict[str, Any] | None:
        """What sweep.json holds; None where there is neither the file nor anything else."""
        file = self.path / STAMP
        allowed = "a new or empty folder, or one that `outrider eval sweep` has made"
        try:
            stamp = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if self.path.is_dir() and {entry.name for entry in self.path.iterdir()} - {"rows", "failed", "locks"}:
                raise SweepError(f"output {self.path}: got a folder with other files in it; allowed: {allowed}") from None
            return None
        except (OSError, ValueError) as error:
            raise SweepError(f"output {file}: cannot be read ({error}); allowed: {allowed}") from error
        for name, value in (("format", FORMAT), ("version", VERSION)):
            got = stamp.get(name) if isinstance(stamp, dict) else stamp
            if got != value:
                raise SweepError(f"output {file}: {name}: got {got!r}; allowed: {value!r}")
        return stamp

    def _merged(self, old: dict[str, Any], new: dict[str, Any], path: str = "") -> dict[str, Any]:
        """`old` with what `new` adds. Raises SweepError where both have a value and these differ."""
        merged = dict(old)
        for name, value in new.items():
            where = f"{path}.{name}" if path else name
            if name not in old:
                merged[name] = value
            elif isinstance(value, dict) and isinstance(old[name], dict):
                merged[name] = self._merged(old[name], value, where)
            elif value != old[name]:
                allowed = f"{old[name]!r}, which its results were made with, or another folder"
                raise SweepError(f"output {self.path}: {where}: got {value!r}; allowed: {allowed}")
        return merged

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        descriptor = self._lock(name, wait=True)
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _lock(self, name: str, *, wait: bool) -> int | None:
        """An open file with the lock on it, which closing it ends; None where somebody has it."""
        descriptor = -1
        try:
            descriptor = os.open(self.path / "locks" / name, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise self._unwritable(error) from error
        return descriptor

    def _replace(self, file: Path, text: str) -> None:
        """Write a file in one step. Who calls holds the lock, so a temporary file that a kill left is only overwritten."""
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(temporary, file)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> SweepError:
        return SweepError(
            f"output {self.path}: cannot be written ({error.strerror}); allowed: a folder where files can be locked"
        )


class Claim:
    """A cell that this process has; nobody else computes or writes it until `release`."""

    def __init__(self, store: Store, cell: Cell, descriptor: int) -> None:
        self.store, self.cell, self._descriptor = store, cell, descriptor
        self._rows = store.rows(cell)
        self._written = len(self._rows)
        self.missing = missing(cell, self._rows)
        self.failure = store.failure(cell)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def add(self, row: Row) -> None:
        """A new row; it is written as soon as its case has all of its rows."""
        self._rows.append(row)
        whole = whole_rows(self.cell, self._rows)
        if len(whole) > self._written:
            text = "".join(json.dumps(row.as_dict()) + "\n" for row in whole)
            self.store._replace(self.store._rows_file(self.cell), text)
            self._written = len(whole)

    def fail(self, error: str) -> None:
        """Record what the cell ended with."""
        record = {"id": uuid4().hex, "cell": self.cell.name, "error": error}
        self.store._replace(self._failure_file, json.dumps(record, indent=2) + "\n")

    def finish(self) -> None:
        """The cell is done: a former failure is forgotten."""
        self._failure_file.unlink(missing_ok=True)

    def release(self) -> None:
        os.close(self._descriptor)

    @property
    def _failure_file(self) -> Path:
        return self.store.path / "failed" / f"{self.cell.stem}.json"


def missing(cell: Cell, rows: list[Row]) -> tuple[Case, ...]:
    """The cases of which `rows` lack some."""
    counts = Counter(map(case_key, rows))
    return tuple(case for case in cell.cases if counts[case_key(case)] < cell.task.rows_a_case)


def whole_rows(cell: Cell, rows: list[Row]) -> list[Row]:
    """The rows of cases that have all."""
    counts = Counter(map(case_key, rows))
    return [row for row in rows if counts[case_key(row)] >= cell.task.rows_a_case]
