"""Plans in a folder of their own, and an evaluator that needs no models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from outrider.cli.files import read_text
from outrider.eval.rows import Row
from outrider.eval.sweep.plan import Plan, case_key, read_plan

PLAN = """
texts: [texts/*.txt]
contexts: [64, 128]
methods: [dense, outrider, sts]
keeps: [0.1, 0.05]
tasks:
  perplexity: {scored-tokens: 8}
  ruler: {families: [single, multi-key], samples: 2, methods: [dense, outrider], contexts: [64]}
"""
MODELS = {"target": "t 0", "draft": "d 0"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two texts, for plans."""
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"The text of {name}.", encoding="utf-8")
    return tmp_path


@pytest.fixture
def plan_of(folder) -> Callable[..., Plan]:
    """`plan_of(*replacements, yaml=PLAN, quick=False)`: the plan, after replacing (old, new) in its text."""

    def make(*replacements: tuple[str, str], yaml: str = PLAN, quick: bool = False) -> Plan:
        for old, new in replacements:
            assert old in yaml
            yaml = yaml.replace(old, new)
        (folder / "plan.yaml").write_text(yaml, encoding="utf-8")
        return read_plan(folder / "plan.yaml", read_text, quick=quick)

    return make


class Fake:
    """Rows without models; what it is called for is remembered."""

    def __init__(self, fails: Callable[..., None] = lambda cell, case: None, batch_size: int = 1) -> None:
        self.fails, self.batch_size, self.computed, self.calls = fails, batch_size, [], []

    def rows(self, cells, cases):
        self.calls.append([cell.stem for cell in cells])
        for sample in range(cells[0].task.rows_a_case):
            for case in cases:
                for cell in cells:
                    self.fails(cell, case)
                    self.computed.append((cell.stem, case_key(case), sample))
                    yield row_of(cell, case)


def row_of(cell, case, **fields) -> Row:
    method, keep, top_p = case_key(case)
    own = {"task": cell.task.name, "part": cell.subject.part, "text": cell.subject.name, "context": cell.context}
    return Row(**(own | {"method": method, "keep": keep, "top_p": top_p, "scored_tokens": 8, "ppl": 1.5} | fields))


@pytest.fixture
def fake() -> type[Fake]:
    return Fake
