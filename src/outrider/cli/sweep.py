"""outrider eval sweep"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from outrider.cli.files import read_text
from outrider.cli.screen import Screen
from outrider.cli.tables import evaluation_table
from outrider.config import check
from outrider.errors import OptionError

if TYPE_CHECKING:
    from outrider.eval.sweep.plan import Cell, Plan
    from outrider.eval.sweep.run import Event, Settled
    from outrider.eval.sweep.store import Store


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file that says what to compute: docs/evaluation.md")],
    output: Annotated[Path, typer.Option(help="folder of the results; one that has some is gone on with")],
    quick: Annotated[bool, typer.Option("--quick", help="the reduced version: what the file has under quick")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="processes on this machine, each with its share of the threads; default: 1")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="run on a Ray cluster: its address, auto, or local for one of --jobs CPUs; needs outrider[ray]"),
    ] = None,
) -> None:
    """Methods x budgets x contexts x tasks from one YAML file into one folder; what the folder has is not computed again.

    The same command goes on after any interruption. Several may work on one folder.
    """
    check("jobs", jobs, jobs is None or jobs >= 1, "a whole number >= 1")
    if jobs is not None and ray not in (None, "local"):
        raise OptionError("jobs", jobs, f"no --jobs: the cluster at {ray} has its own CPUs")
    screen = Screen()
    with screen.waiting("reading the plan"):
        from outrider.eval.sweep.plan import read_plan
        from outrider.eval.sweep.store import Store

        plan = read_plan(file, read_text, quick=quick)
        store = Store(output)
    well = _report(_events(plan, store, jobs or 1, ray), plan, store, screen)
    if not well:
        raise typer.Exit(1)


def _events(plan: Plan, store: Store, jobs: int, ray: str | None) -> Iterator[Event]:
    if ray is not None:
        from outrider.eval.sweep.remote import run_on_ray

        yield from run_on_ray(plan, store, ray, jobs)
    elif jobs > 1:
        from outrider.eval.sweep.processes import run_in_processes

        yield from run_in_processes(plan, store, jobs)
    else:
        from outrider.eval.sweep.run import run_here

        yield from run_here(plan, store)


def _report(events: Iterator[Event], plan: Plan, store: Store, screen: Screen) -> bool:
    """Show events as they come, then tables of all that is there and what is missing. False if something is."""
    from outrider.eval.sweep.run import Notice, Pace, Settled, in_words

    cells = {cell.stem: cell for cell in plan.cells}
    left = {stem for stem, cell in cells.items() if store.missing(cell)}
    pace = Pace(store, [cells[stem] for stem in left])

    def progress(doing: str) -> None:
        seconds = pace.seconds_left()
        rest = "" if seconds is None else f", {in_words(seconds)} left"
        screen.progress("cells", len(cells) - len(left), len(cells), note=f"{doing}{rest}")

    with screen.working(), closing(events):  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Notice):
                screen.note(Text(event.text))
                continue
            cell = cells[event.stem]
            if isinstance(event, Settled):
                new = event.stem in left
                left.discard(event.stem)
                pace.settled(event.stem)
                if event.rows or (event.error and new):
                    screen.note(Text(_line(cell, event, len(cells) - len(left), len(cells))))
            progress(cell.name)
    return _summary(list(cells.values()), store, screen)


def _line(cell: Cell, settled: Settled, done: int, of: int) -> str:
    came = f"{settled.rows} rows in {settled.seconds:.1f} s" if settled.error is None else f"FAILED: {settled.error}"
    return f"{done}/{of} {cell.name}: {came}"


def _summary(cells: list[Cell], store: Store, screen: Screen) -> bool:
    """A table a task and context; False if a case is missing."""
    from outrider.eval.rows import summarize
    from outrider.eval.sweep.plan import case_key

    for (task, context), group in groupby(cells, key=lambda cell: (cell.task.name, cell.context)):
        rows = []
        for cell in group:
            order = {case_key(case): number for number, case in enumerate(cell.cases)}
            here = [row for row in store.rows(cell) if case_key(row) in order]
            rows += sorted(here, key=lambda row: order[case_key(row)])
        if rows:
            screen.show(evaluation_table(f"{task}, {context} tokens", summarize(rows)))
    missing = [(cell, cases) for cell in cells if (cases := store.missing(cell))]
    for cell, cases in missing:
        error = store.failure(cell)
        why = f": {error}" if error is not None else ""
        screen.note(Text(f"missing: {cell.name}, {len(cases)} of {len(cell.cases)} cases{why}"))
    return not missing
