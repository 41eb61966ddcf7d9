"""What the user sees while a command runs: generated text, headings and tables, and progress on the terminal alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.text import Text

WIDE = 160  # columns of a table that goes to a file or a pipe


class Screen:
    """Generated text goes to stdout; progress to stderr, if that is a terminal.

    Headings and tables that go with the text (`note`) follow it to the terminal, and move to stderr when stdout is not one:
    piped text stays text. Tables that are the result themselves (`show`) go to stdout always.
    """

    def __init__(self) -> None:
        self._stdout = _console(stderr=False)
        self._stderr = _console(stderr=True)
        self._notes = self._stdout if self._stdout.is_terminal else self._stderr
        self._bar: Progress | None = None
        self._what = ""

    @property
    def interactive(self) -> bool:
        """Whether somebody watches stdout."""
        return self._stdout.is_terminal

    def write(self, text: str) -> None:
        """Generated text, at once."""
        if self.interactive:
            self.clear()
        sys.stdout.write(text)
        sys.stdout.flush()

    def heading(self, text: str) -> None:
        self.clear()
        self._notes.print(Rule(Text(text, style="bold"), align="left"))

    def note(self, renderable: RenderableType) -> None:
        self.clear()
        self._notes.print(renderable)

    def show(self, renderable: RenderableType) -> None:
        self.clear()
        self._stdout.print(renderable)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner for work that cannot tell how far it is."""
        if not self._stderr.is_terminal:
            yield
            return
        with self._live(SpinnerColumn(), TextColumn("{task.description}", markup=False)) as spinner:
            spinner.add_task(text, total=None)
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Whatever happens inside, no progress bar stays behind."""
        try:
            yield
        finally:
            self.clear()

    def progress(self, what: str, done: int, of: int, note: str = "") -> None:
        """A bar that goes away when the work is done, or when something is printed; behind it `note`, which may change."""
        if not self._stderr.is_terminal:
            return
        if self._bar is None or self._what != what:
            self.clear()
            description = TextColumn("{task.description}", markup=False)
            behind = TextColumn("{task.fields[note]}", markup=False)
            self._bar, self._what = (
                self._live(description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), behind),
                what,
            )
            self._bar.add_task(what, total=of, note=note)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=of, note=note)
        if done >= of:
            self.clear()

    def _live(self, *columns: ProgressColumn) -> Progress:
        """Drawn on stderr until it ends; what is written to stdout meanwhile stays on stdout."""
        return Progress(*columns, console=self._stderr, transient=True, redirect_stdout=False)

    def clear(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE)
