"""The same cells on a local Ray cluster; skipped where there is no Ray."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from outrider.cli.files import read_text
from outrider.eval.sweep.plan import read_plan
from outrider.eval.sweep.remote import run_on_ray
from outrider.eval.sweep.run import Notice, Settled, Started, run_here
from outrider.eval.sweep.store import Store

pytest.importorskip("ray")

PLAN = """
models: {{target: target, draft: draft, alignment: {alignment}}}
texts: [text.txt, other.txt]
contexts: [160]
budget: {{min-context: 8, recent: 4}}
methods: [dense, outrider, streaming]
keeps: [0.2]
tasks:
  perplexity: {{scored-tokens: 12}}
  facts: {{facts: {facts}, contexts: [640]}}
"""


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_a_cluster_that_is_not_there(fails, folder, alignment, tmp_path, address):
    (folder / "ray.yaml").write_text(PLAN.format(alignment=alignment, facts=1), encoding="utf-8")
    message = fails("eval", "sweep", folder / "ray.yaml", "--output", tmp_path / "out", "--ray", address)
    assert message.startswith(f"ray: got '{address}'; allowed: local, auto or host:port of a running cluster (")
    assert list(tmp_path.iterdir()) == []


def workers() -> list[int]:
    """Processes that run a cell at this moment."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if status.read_bytes().startswith(b"ray::compute_remotely"):
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def test_cells_run_on_a_cluster_whose_workers_may_die(folder, alignment, tmp_path):
    """The first worker seen at a cell is killed; rows come out as from one process; a cell that fails is recorded."""
    (folder / "ray.yaml").write_text(PLAN.format(alignment=alignment, facts=100), encoding="utf-8")
    plan, store = read_plan(folder / "ray.yaml", read_text), Store(tmp_path / "out")
    events, killed = [], False
    for event in run_on_ray(plan, store, "local", 2):
        events.append(event)
        while isinstance(event, Started) and not killed:
            for worker in workers()[:1]:
                os.kill(worker, signal.SIGKILL)
                killed = True
            time.sleep(0.001)
    lost = [event.text for event in events if isinstance(event, Notice)]
    assert len(lost) == 1 and "its worker was lost" in lost[0] and lost[0].endswith("1 of 4 tries")
    settled = {event.stem: event for event in events if isinstance(event, Settled)}
    assert len(settled) == 4 and [store.missing(cell) for cell in plan.cells[:2]] == [(), ()]
    for cell in plan.cells[2:]:
        assert "OptionError: facts: got 100" in (settled[cell.stem].error or "") and store.failure(cell) is not None

    (folder / "ray.yaml").write_text(PLAN.format(alignment=alignment, facts=100).replace("  facts", "  #"), encoding="utf-8")
    plan, alone = read_plan(folder / "ray.yaml", read_text), Store(tmp_path / "alone")
    list(run_here(plan, alone))
    for cell in plan.cells:
        ours, theirs = ([row.as_dict() | {"seconds": 0} for row in one.rows(cell)] for one in (alone, store))
        assert ours == theirs
