"""outrider bench decode | prefill"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.table import Table
from rich.text import Text

from outrider.bench.options import DecodeOptions
from outrider.bench.prefill_options import PrefillOptions
from outrider.cli.files import read_text, writable_file
from outrider.cli.launch import is_rank, launch, leads
from outrider.cli.options import Flags, takes
from outrider.cli.screen import Screen
from outrider.cli.tables import decode_table, prefill_table, stage_table

if TYPE_CHECKING:
    from outrider.bench.prefill import PrefillRow
    from outrider.bench.results import Row

AnyRow = TypeVar("AnyRow", "Row", "PrefillRow")
PREFILL = Flags(source=PrefillOptions, panel="Benchmark")
DECODE = Flags(source=DecodeOptions, panel="Benchmark", short={"draft_tokens": "-K"})
RESULTS = Path("benchmarks", "results")  # of a checkout
NAME, PREFILL_NAME = "decode.jsonl", "prefill.jsonl"
PREFILL_KEY = ("case", "engine", "mode", "method", "kv_dtype")  # of a row

app = typer.Typer(help="Measure speed, beside what the device could do at best and beside other engines.")


@app.callback()
def bench() -> None:
    """Measure speed, beside what the device could do at best and beside other engines."""


@app.command()
@takes(DECODE)
def decode(
    output: Annotated[
        Path | None,
        typer.Option(help=f"file of JSON lines; a row replaces the old one; default: {RESULTS / NAME} if there, else {NAME}"),
    ] = None,
    **values: Any,
) -> None:
    """Decode behind long contexts: tokens a second, milliseconds and bytes of every stage, on dummy weights or real models."""
    options = DecodeOptions(**DECODE.pick(values))
    text = read_text("--prompt-file", options.prompt_file) if options.prompt_file else ""
    path = writable_file("output", output or (RESULTS if RESULTS.is_dir() else Path()) / NAME)
    if options.tensor_parallel > 1 and not is_rank():
        raise typer.Exit(launch(options.tensor_parallel, options.device))
    screen = Screen()
    with screen.waiting("loading torch"):
        from outrider.bench.results import KEY
        from outrider.bench.run import measure_all
    with screen.working():
        rows = measure_all(options, text, shlex.join(["outrider", *sys.argv[1:]]), screen.progress)
        writes = leads(options.tensor_parallel)
        well = _report(rows, len(options.runs), path, screen, KEY, _decode_tables, writes=writes)
    if not well:
        raise typer.Exit(1)


@app.command()
@takes(PREFILL)
def prefill(
    output: Annotated[
        Path | None,
        typer.Option(
            help="file of JSON lines; a row replaces the old one; "
            f"default: {RESULTS / PREFILL_NAME} if there, else {PREFILL_NAME}"
        ),
    ] = None,
    **values: Any,
) -> None:
    """Read long prompts up to the first token: seconds, and what every stage takes and must do at least, on dummy weights."""
    options = PrefillOptions(**PREFILL.pick(values))
    path = writable_file("output", output or (RESULTS if RESULTS.is_dir() else Path()) / PREFILL_NAME)
    screen = Screen()
    with screen.waiting("loading torch"):
        from outrider.bench.prefill_run import measure_all
    with screen.working():
        rows = measure_all(options, shlex.join(["outrider", *sys.argv[1:]]), screen.progress)
        well = _report(rows, len(options.runs), path, screen, PREFILL_KEY, lambda done: [prefill_table(done)])
    if not well:
        raise typer.Exit(1)


def _report(
    rows: Iterable[AnyRow],
    per_case: int,
    path: Path,
    screen: Screen,
    key: tuple[str, ...],
    tables: Callable[[list[AnyRow]], Iterable[Table]],
    *,
    writes: bool = True,
) -> bool:
    """Write rows as they come, in place of those with the same `key`; show a case's tables when it is done.

    False if a row holds an error.
    """
    from outrider.bench.results import replace_rows

    cases: dict[str, list[AnyRow]] = defaultdict(list)
    well = True
    for row in rows:
        if writes:
            replace_rows(path, [row.as_dict()], key)
        cases[row.case].append(row)
        if row.error is not None:
            well = False
            screen.note(Text(f"{row.case}: {row.engine} {row.mode} FAILED: {row.error}"))
        if len(cases[row.case]) == per_case:
            for table in tables(cases[row.case]):
                screen.show(table)
    return well


def _decode_tables(rows: list[Row]) -> Iterator[Table]:
    yield decode_table(rows)
    if any(row.stages for row in rows):
        yield stage_table(rows)
