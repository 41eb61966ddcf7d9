"""The project's own plan: it reads, and its reduced version tells methods apart on the built-in pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.cli.files import read_text
from outrider.errors import SweepError
from outrider.eval.sweep.plan import METHODS, case_key, read_plan
from outrider.eval.sweep.run import run_here
from outrider.eval.sweep.store import Store

PLAN = Path(__file__).parents[3] / "benchmarks" / "evaluation.yaml"


def test_the_whole_plan(tmp_path, monkeypatch):
    monkeypatch.delenv("BOOKS", raising=False)
    with pytest.raises(SweepError, match=r"texts\[0\]: got '\$\{BOOKS\}/.*', but the environment has no variable BOOKS"):
        read_plan(PLAN, read_text)
    monkeypatch.setenv("BOOKS", str(tmp_path))
    with pytest.raises(SweepError, match="No such file"):
        read_plan(PLAN, read_text)
    plan = read_plan(PLAN, lambda option, file: file.name)
    assert len(plan.works[0].subjects) == 8 and plan.works[0].contexts == (16384, 32768)
    assert len(plan.works[0].subjects) * plan.works[0].task.scored_tokens == 20_480
    assert {case.method for case in plan.works[0].cases} == set(METHODS)
    # dense, five budgets for 13 methods, three shares of the mass for one and two for another; then three budgets
    assert [len(work.cases) for work in plan.works] == [71, 42, 28]
    assert len(plan.cells) == 2 * 8 * (1 + 1 + 4)


def test_quick_tells_methods_apart(tmp_path, monkeypatch):
    """At 5% of 3,072 tokens of Persuasion. Measured: perplexity +13% and +58% over dense, facts 5 and 0 of 5."""
    monkeypatch.delenv("BOOKS", raising=False)
    plan, store = read_plan(PLAN, read_text, quick=True), Store(tmp_path / "out")
    list(run_here(plan, store))
    rows = {(cell.task.name, case_key(row)[0]): row for cell in plan.cells for row in store.rows(cell)}
    assert len(rows) == 4 and all(row.keep == 0.05 for row in rows.values())
    assert rows["perplexity", "outrider"].delta_percent < 25 < 45 < rows["perplexity", "streaming"].delta_percent
    assert (rows["facts", "outrider"].recalled, rows["facts", "streaming"].recalled) == (5, 0)
    assert rows["facts", "outrider"].asked == 5
    assert rows["perplexity", "outrider"].kept_fraction < 0.06
