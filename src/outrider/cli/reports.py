"""The rows of an evaluation as they come: appended to a file, shown as tables."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from outrider.cli.screen import Screen
from outrider.cli.tables import diagnosis_tables, evaluation_table

if TYPE_CHECKING:
    from outrider.eval.diagnose.rows import Diagnosis
    from outrider.eval.rows import Row


def report(work: Iterable[Row], per_text: int | None, path: Path | None, screen: Screen) -> None:
    """Append rows as they come; print a table after every `per_text` of them (None: not at all), and the means in the end."""
    from outrider.eval.rows import append_rows, summarize

    rows: list[Row] = []
    shown = 0
    try:
        with screen.working():
            for row in work:
                rows.append(row)
                if path is not None:
                    append_rows(path, [row], command=shlex.join(["outrider", *sys.argv[1:]]))
                if len(rows) - shown == per_text:
                    screen.show(evaluation_table(row.text, rows[shown:]))
                    shown = len(rows)
    except KeyboardInterrupt:
        left = summarize(rows) if per_text is None else rows[shown:]
        if left:
            screen.show(evaluation_table(f"{left[-1].text}, interrupted", left))
        raise
    if len(rows) > (per_text or 0):
        means = summarize(rows)
        screen.show(evaluation_table(means[0].text, means))


def report_diagnosis(work: Iterable[Diagnosis], path: Path | None, screen: Screen) -> None:
    """Append rows as they come; print the tables of every text, and those of the means in the end."""
    from outrider.eval.diagnose.summary import summarize
    from outrider.eval.rows import append_rows

    rows: list[Diagnosis] = []
    texts = 0
    part: list[Diagnosis] = []
    try:
        with screen.working():
            for text, found in groupby(work, key=lambda row: row.text):
                part = []
                for row in found:
                    part.append(row)
                    if path is not None:
                        append_rows(path, [row], command=shlex.join(["outrider", *sys.argv[1:]]))
                screen.show(diagnosis_tables(text, summarize(part)))
                rows, part, texts = rows + part, [], texts + 1
    except KeyboardInterrupt:
        if part:
            screen.show(diagnosis_tables(f"{part[0].text}, interrupted", summarize(part)))
        raise
    if texts > 1:
        screen.show(diagnosis_tables(f"mean of {texts}", summarize(rows)))
