"""The result folder: rows come back as they went in, a claim is one process's, what does not fit is refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import ResultsError, SweepError
from outrider.eval.rows import Row, append_rows, read_rows
from outrider.eval.sweep.plan import case_key
from outrider.eval.sweep.store import Store

from .conftest import MODELS, row_of


@pytest.fixture
def opened(folder, plan_of):
    """`opened(*replacements)`: (plan, store), the folder made or checked for it."""

    def make(*replacements, models=MODELS):
        plan = plan_of(*replacements)
        store = Store(folder / "out")
        store.open(plan, models)
        return plan, store

    return make


def everything(path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        Row,
        task=st.text(),
        text=st.text(),
        method=st.text(),
        keep=st.none() | NUMBERS,
        top_p=st.none() | NUMBERS,
        context=st.integers(),
        scored_tokens=st.integers(),
        ppl=st.none() | NUMBERS,
        part=st.none() | st.text(),
        recalled=st.none() | st.integers(),
        conditions=st.dictionaries(st.text(), st.text() | st.integers()),
    )
)
def test_rows_come_back_as_they_went(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    append_rows(path, [row, row])
    assert read_rows(path) == [row, row]


GOOD = json.dumps(Row(task="a", text="b", method="c", keep=None, top_p=None, context=1, scored_tokens=1).as_dict())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        (GOOD[:-9], "line 2: not JSON"),
        ("[]", "line 2: got list; allowed: one JSON object a line"),
        (GOOD.replace('"method"', '"methods"'), "line 2, field methods: got 'an unknown field'; allowed: task, text, method, "),
        (GOOD.replace('"keep": null, ', ""), "line 2, field keep: got 'nothing'; allowed: a finite number or null"),
        (GOOD.replace('"context": 1', '"context": "1"'), "line 2, field context: got '1'; allowed: a whole number"),
        (GOOD.replace('"context": 1', '"context": true'), "line 2, field context: got True; allowed: a whole number"),
        (GOOD.replace('"keep": null', '"keep": "all"'), "line 2, field keep: got 'all'; allowed: a finite number or null"),
    ],
)
def test_a_malformed_line_is_named(opened, line, message):
    _, store = opened()
    file = store.path / "rows" / "some.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ResultsError) as caught:
        opened()
    assert str(file) in str(caught.value) and message in str(caught.value)


def test_rows_are_written_when_their_case_is_whole(opened):
    plan, store = opened()
    cell = plan.cells[-1]
    assert cell.task.rows_a_case == 2
    dense, first, second = cell.cases
    with store.claim(cell) as claim:
        assert claim.missing == cell.cases
        for case in (dense, first, dense):
            claim.add(row_of(cell, case))
    assert [case_key(row) for row in store.rows(cell)] == [case_key(dense)] * 2
    assert store.missing(cell) == (first, second)
    with store.claim(cell) as claim:
        for case in (first, second, first, second):
            claim.add(row_of(cell, case))
        claim.finish()
    assert store.missing(cell) == () and len(store.rows(cell)) == 6
    lines = (store.path / "rows" / f"{cell.stem}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row.as_dict() for row in store.rows(cell)]


def test_what_a_kill_leaves_behind_is_no_result(opened):
    """A temporary file, half written, is not read, and is overwritten by the next to write the cell."""
    plan, store = opened()
    cell = plan.cells[0]
    left = store.path / "rows" / f".{cell.stem}.jsonl.tmp"
    left.write_text(GOOD[:20])
    plan, store = opened()
    assert store.missing(cell) == cell.cases
    with store.claim(cell) as claim:
        claim.add(row_of(cell, cell.cases[0]))
    assert len(store.rows(cell)) == 1 and not left.exists()


def test_a_cell_has_one_owner(opened):
    plan, store = opened()
    first, second = plan.cells[:2]
    with store.claim(first):
        assert store.claim(first) is None and Store(store.path).claim(first) is None
        with store.claim(second):
            pass
    with store.claim(first):
        pass


def test_a_claim_ends_with_its_process(opened):
    plan, store = opened()
    cell = plan.cells[0]
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        claim = store.claim(cell)
        os.write(go, b"y" if claim else b"n")
        signal.pause()
    assert os.read(ready, 1) == b"y"
    assert store.claim(cell) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with store.claim(cell) as claim:
        assert claim.missing == cell.cases


def test_a_folder_may_grow(opened, folder):
    _, store = opened()
    before = json.loads((store.path / "sweep.json").read_text())
    assert {name: before[name] for name in ("format", "version", "models")} == {
        "format": "outrider sweep",
        "version": 1,
        "models": MODELS,
    }
    (folder / "texts" / "three.txt").write_text("Three.")
    plan, _ = opened(("[dense, outrider, sts]", "[dense, quest]"), ("perplexity:", "facts: {}\n  perplexity:"), ("128", "256"))
    after = json.loads((store.path / "sweep.json").read_text())
    assert after["plan"] == plan.digest != before["plan"]
    assert list(after["options"]["tasks"]) == ["perplexity", "ruler", "facts"]
    assert set(after["options"]["texts"]) == {"one", "two", "three"}
    assert after["options"]["tasks"]["perplexity"]["maps"] == before["options"]["tasks"]["perplexity"]["maps"]


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (("scored-tokens: 8", "scored-tokens: 9"), "options.tasks.perplexity.scored_tokens: got 9; allowed: 8, which"),
        (("samples: 2", "samples: 3"), "options.tasks.ruler.samples: got 3; allowed: 2"),
        (("keeps", "budget: {recent: 1}\nkeeps"), "options.budget.recent: got 1; allowed: 64"),
        (
            ("outrider, sts]", "{name: sts, map: a+b}]"),
            "options.tasks.perplexity.maps.sts: got 'a+b'; allowed: \"the method's own",
        ),
    ],
)
def test_other_options_are_refused(opened, replacement, message):
    _, store = opened()
    before = everything(store.path)
    with pytest.raises(SweepError) as caught:
        opened(replacement)
    assert message in str(caught.value) and str(store.path) in str(caught.value)
    assert everything(store.path) == before


def test_other_models_and_texts_are_refused(opened, folder):
    opened()
    with pytest.raises(
        SweepError, match=r"models\.draft: got 'd 1'; allowed: 'd 0', which its results were made with, or another"
    ):
        opened(models=MODELS | {"draft": "d 1"})
    (folder / "texts" / "two.txt").write_text("Changed.")
    with pytest.raises(SweepError, match=r"options.texts.two: got '\w{16}'; allowed: '\w{16}', which"):
        opened()


def test_a_row_in_the_wrong_file_is_refused(opened):
    plan, store = opened()
    one, other = plan.cells[0], plan.cells[-1]
    (store.path / "rows" / f"{one.stem}.jsonl").write_text(json.dumps(row_of(other, other.cases[0]).as_dict()) + "\n")
    with pytest.raises(
        SweepError, match="line 1: got a row of task 'ruler', part 'multi-key', context 64; allowed: rows of perplex"
    ):
        store.missing(one)


def test_other_folders_are_refused(folder, tmp_path):
    (folder / "full").mkdir()
    (folder / "full" / "thesis.doc").write_text("x")
    with pytest.raises(SweepError, match=r"output .*full: got a folder with other files in it; allowed: a new or empty folder"):
        Store(folder / "full")
    with pytest.raises(SweepError, match=r"cannot be read \(.*Not a directory"):
        Store(folder / "full" / "thesis.doc")
    for stamp, message in (
        ('{"format": "outrider sweep", "version": 2}', "version: got 2; allowed: 1"),
        ('{"format": "x", "version": 1}', "format: got 'x'; allowed: 'outrider sweep'"),
        ("[]", r"format: got \[\]"),
        ("{", "cannot be read"),
    ):
        (folder / "full" / "sweep.json").write_text(stamp)
        with pytest.raises(SweepError, match=message):
            Store(folder / "full")


def test_a_folder_that_cannot_be_written(folder, plan_of):
    (folder / "locked").symlink_to("/proc/nowhere")
    with pytest.raises(SweepError, match=r"output .*locked/out: cannot be written"):
        Store(folder / "locked" / "out").open(plan_of(), MODELS)


def test_failures_of_former_runs_are_forgiven(opened):
    plan, store = opened()
    cell = plan.cells[0]
    with store.claim(cell) as claim:
        claim.fail("RuntimeError: no memory")
    assert store.failure(cell) == "RuntimeError: no memory"
    assert json.loads((store.path / "failed" / f"{cell.stem}.json").read_text())["cell"] == "perplexity one 64"
    again = Store(store.path)
    assert again.failure(cell) is None
    with again.claim(cell) as claim:
        claim.finish()
    assert list((store.path / "failed").iterdir()) == []
