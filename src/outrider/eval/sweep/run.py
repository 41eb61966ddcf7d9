"""Claim, run, write: what one process does until nothing of a plan is left, whoever else works on the same folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

from outrider.errors import SweepError
from outrider.eval.sweep.evaluator import Evaluator
from outrider.eval.sweep.plan import Cell, Plan
from outrider.eval.sweep.store import Claim, Store

POLL_SECONDS = 0.25  # between looks at cells that another process has


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """This process has taken a cell."""

    stem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A cell is done, or has failed; `rows` are those that this process computed for it."""

    stem: str
    rows: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that the user should know."""

    text: str


Event = Started | Settled | Notice


def run_here(plan: Plan, store: Store) -> Iterator[Event]:
    """Compute all that is missing, in this process. Every cell that was not done is settled once.

    The models are loaded and everything checked before the folder is made.
    """
    evaluator = Evaluator(plan.models, plan.models.alignment)
    evaluator.check(plan)
    store.open(plan, evaluator.identity())
    return work(store, [cell for cell in plan.cells if store.missing(cell)], evaluator)


def work(store: Store, cells: list[Cell], evaluator: Evaluator) -> Iterator[Event]:
    """Settle `cells`; those that another process has are waited for, and taken over should it end without them."""
    waited_for = False
    while cells:
        left: list[Cell] = []
        for together in grouped(cells, evaluator.batch_size):
            settled, claims = [], []
            with ExitStack() as held:
                for cell in together:
                    claim = store.claim(cell)
                    if claim is None:
                        left.append(cell)
                        continue
                    held.enter_context(claim)
                    found = already_settled(claim)
                    if found is None:
                        claims.append(claim)
                        yield Started(stem=cell.stem)
                    else:
                        settled.append(found)
                while claims:
                    alike = [claim for claim in claims if claim.missing == claims[0].missing]
                    claims = [claim for claim in claims if claim not in alike]
                    settled += compute(alike, evaluator)
            yield from settled
        if len(left) == len(cells):
            if not waited_for:
                yield Notice(text=f"waiting for {len(left)} cells that other processes compute")
                waited_for = True
            time.sleep(POLL_SECONDS)
        cells = left


def grouped(cells: list[Cell], size: int) -> Iterator[list[Cell]]:
    """Cells that one call may compute, up to `size` that follow each other: of one task, part and context."""
    for (task, _, _), some in groupby(cells, key=lambda cell: (cell.task, cell.subject.part, cell.context)):
        alike, most = list(some), size if task.batches else 1
        yield from (alike[start : start + most] for start in range(0, len(alike), most))


def already_settled(claim: Claim) -> Settled | None:
    """What another process has made of the cell since; None where it is to be computed."""
    if not claim.missing:
        claim.finish()
        return Settled(stem=claim.cell.stem)
    if claim.failure is not None:
        return Settled(stem=claim.cell.stem, error=claim.failure)
    return None


def compute(claims: list[Claim], evaluator: Evaluator) -> list[Settled]:
    """Run what is missing of claimed cells, the same of all. An error ends all and is recorded; what is done stays."""
    started, error = time.perf_counter(), None
    rows = dict.fromkeys((claim.cell.stem for claim in claims), 0)
    by_text = {claim.cell.subject.name: claim for claim in claims}
    try:
        for row in evaluator.rows([claim.cell for claim in claims], claims[0].missing):
            claim = by_text[row.text] if len(claims) > 1 else claims[0]
            claim.add(row)
            rows[claim.cell.stem] += 1
    except SweepError:  # the folder's own
        raise
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    for claim in claims:
        if error is None:
            claim.finish()
        else:
            claim.fail(error)
    seconds = (time.perf_counter() - started) / len(claims)
    return [Settled(stem=stem, rows=count, seconds=seconds, error=error) for stem, count in rows.items()]


class Pace:
    """How long the rest takes, from how long what is done has taken.

    A cell's cost is guessed as its context times its missing cases and one more, the reading that they share.
    """

    def __init__(self, store: Store, cells: list[Cell]) -> None:
        self._left = {cell.stem: cell.context * (1 + len(store.missing(cell))) for cell in cells}
        self._done = 0
        self._started = time.monotonic()

    def settled(self, stem: str) -> None:
        self._done += self._left.pop(stem, 0)

    def seconds_left(self) -> float | None:
        """None before anything is done."""
        if not self._done:
            return None
        return (time.monotonic() - self._started) * sum(self._left.values()) / self._done


def in_words(seconds: float) -> str:
    """About how long, as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
