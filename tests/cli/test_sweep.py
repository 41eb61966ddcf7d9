"""`outrider eval sweep`: one file in, one folder out, and on from there after any interruption."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing import active_children

import pytest

from outrider.cli.files import read_text
from outrider.eval.perplexity import evaluate
from outrider.eval.sweep import run
from outrider.eval.sweep.plan import read_plan
from outrider.eval.sweep.processes import run_in_processes
from outrider.eval.sweep.store import Claim, Store

PLAN = """
models: {{target: target, draft: draft, alignment: {alignment}}}
texts: [text.txt, other.txt]
contexts: [160]
budget: {{min-context: 8, recent: 4}}
methods: [dense, streaming, {{name: sts, map: joint+divergence}}]
keeps: [0.2, 1]
tasks:
  perplexity: {{scored-tokens: 12}}
"""
QA = """
  qa: {data: data.jsonl, methods: [dense, outrider], contexts: [200], max-new-tokens: 4}
  ruler: {families: [single], samples: 1, methods: [outrider], keeps: [0.2], contexts: [512], texts: [text.txt]}
  facts: {facts: 2, methods: [specattn], contexts: [640]}
"""


@pytest.fixture
def plan(folder, alignment):
    """A plan beside the tiny pair."""
    path = folder / "plan.yaml"
    path.write_text(PLAN.format(alignment=alignment), encoding="utf-8")
    return path


def rows_of(output) -> list[dict]:
    return [json.loads(line) for file in sorted(output.glob("rows/*.jsonl")) for line in file.read_text().splitlines()]


def test_rows_are_those_of_the_tasks(outrider, plan, tmp_path, folder):
    """A sweep adds nothing to the figures and takes nothing away; a second run computes nothing."""
    outcome = outrider("eval", "sweep", plan, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    made = read_plan(plan, read_text)
    evaluator = run.Evaluator(made.models, made.models.alignment)
    wanted = evaluate(
        evaluator.pair,
        evaluator.alignments,
        [cell.subject.content for cell in made.cells],
        list(made.cells[0].cases),
        context=160,
        scored_tokens=12,
    )
    got = [row for cell in made.cells for row in Store(tmp_path / "out").rows(cell)]
    assert [row.as_dict() | {"seconds": 0} for row in got] == [row.as_dict() | {"seconds": 0} for row in wanted]
    assert {row.conditions["map"] for row in got} == {"the method's own", "joint+divergence"}
    assert "1/2 perplexity text 160: 5 rows in " in outcome.err and "2/2 perplexity other 160: 5 rows in " in outcome.err
    assert "perplexity, 160 tokens" in outcome.out and "keep 0.2" in outcome.out
    again = outrider("eval", "sweep", plan, "--output", tmp_path / "out")
    assert (again.code, again.out, again.err) == (0, outcome.out, "")


def test_every_task_runs(outrider, plan, tmp_path, folder):
    questions = [{"context": "A river.", "question": "What?", "answers": "river"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    plan.write_text(plan.read_text() + QA)
    outcome = outrider("eval", "sweep", plan, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    rows = rows_of(tmp_path / "out")
    counts = {task: sum(row["task"] == task for row in rows) for task in ("perplexity", "qa", "ruler", "facts")}
    assert counts == {"perplexity": 10, "qa": 3, "ruler": 1, "facts": 4}
    assert all(f"{task}, {context} tokens" in outcome.out for task, context in (("qa", 200), ("ruler", 512), ("facts", 640)))


def test_what_fails_is_named_and_the_rest_is_done(outrider, plan, tmp_path):
    """Facts do not fit into the context: known when a cell begins, not before."""
    plan.write_text(plan.read_text().replace("tasks:", "tasks:\n  facts: {facts: 20}"))
    outcome = outrider("eval", "sweep", plan, "--output", tmp_path / "out")
    assert outcome.code == 1
    assert "1/4 facts text 160: FAILED: OptionError: facts: got 20; allowed: as many as fit" in outcome.err
    assert "missing: facts other 160, 5 of 5 cases: OptionError: facts: got 20" in outcome.err
    assert len(rows_of(tmp_path / "out")) == 10 and "perplexity, 160 tokens" in outcome.out


def test_interrupt(outrider, plan, tmp_path, monkeypatch):
    add = Claim.add

    def add_then_interrupt(claim, row):
        add(claim, row)
        if row.text == "other" and row.keep == 0.2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Claim, "add", add_then_interrupt)
        outcome = outrider("eval", "sweep", plan, "--output", tmp_path / "out")
    assert outcome.code == 130 and "outrider: interrupted" in outcome.err
    before = rows_of(tmp_path / "out")
    assert len(before) == 7
    outcome = outrider("eval", "sweep", plan, "--output", tmp_path / "out")
    assert outcome.code == 0 and "2/2 perplexity other 160: 3 rows" in outcome.err
    after = rows_of(tmp_path / "out")
    assert len(after) == 10 and all(row in after for row in before)


def test_several_processes_one_of_them_killed(plan, tmp_path):
    """The other takes over; what is written comes out as from one process."""
    made, store = read_plan(plan, read_text), Store(tmp_path / "out")
    events = run_in_processes(made, store, 2)
    killed, texts = False, []
    for event in events:
        if isinstance(event, run.Started) and not killed:
            os.kill(active_children()[0].pid, signal.SIGKILL)
            killed = True
        elif isinstance(event, run.Notice):
            texts.append(event.text)
    assert killed and "a process ended early (SIGKILL), 1 left" in texts
    assert active_children() == []
    assert [store.missing(cell) for cell in made.cells] == [(), ()]
    assert [len(store.rows(cell)) for cell in made.cells] == [5, 5]


def test_bad_options(fails, plan, tmp_path):
    output = ["--output", tmp_path / "out"]
    assert fails("eval", "sweep", plan, *output, "--jobs", "0") == "jobs: got 0; allowed: a whole number >= 1"
    assert fails("eval", "sweep", plan, *output, "--jobs", "2", "--ray", "auto").startswith("jobs: got 2; allowed: no --jobs")
    assert "cannot be read (No such file" in fails("eval", "sweep", tmp_path / "none.yaml", *output)
    assert "quick: got None; allowed: a mapping" in fails("eval", "sweep", plan, *output, "--quick")
    text = plan.read_text()
    for old, new, message in (
        ("[160]", "[160, 100000]", "context: got 100000; allowed: "),
        ("text.txt", "short.txt", "text short: got "),
        ("joint+divergence", "joint+magic", "alignment map: got 'joint+magic'; allowed"),
        ("target: target", "target: stranger", "allowed: a draft with the target's vocabulary"),
        ("draft: draft", "draft: nowhere", "draft"),
    ):
        plan.write_text(text.replace(old, new))
        assert message in fails("eval", "sweep", plan, *output)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_ray_is_named(fails, plan, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    message = fails("eval", "sweep", plan, "--output", tmp_path / "out", "--ray", "local")
    assert message == "ray: got 'local'; allowed: an installed Ray: pip install 'outrider[ray]'"


def test_other_models_are_refused(outrider, fails, plan, tmp_path):
    assert outrider("eval", "sweep", plan, "--output", tmp_path / "out").code == 0
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    plan.write_text(plan.read_text().replace("draft: draft", "draft: draft, dtype: bfloat16"))
    assert "models.dtype: got 'bfloat16'; allowed: 'float32', which its results were made with" in fails(
        "eval", "sweep", plan, "--output", tmp_path / "out"
    )
    assert (tmp_path / "out" / "sweep.json").read_bytes() == before
    file = next((tmp_path / "out" / "rows").iterdir())
    file.write_bytes(file.read_bytes()[:-20])
    plan.write_text(plan.read_text().replace(", dtype: bfloat16", ""))
    assert f"{file}, line 5: not JSON" in fails("eval", "sweep", plan, "--output", tmp_path / "out")
