"""Work on one folder: nothing is lost, nothing is done twice, whoever dies."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from outrider.errors import SweepError
from outrider.eval.sweep import run
from outrider.eval.sweep.plan import case_key
from outrider.eval.sweep.run import Notice, Pace, Settled, Started, in_words, work
from outrider.eval.sweep.store import Store

from .conftest import MODELS


@pytest.fixture
def store(folder, plan_of) -> Store:
    made = Store(folder / "out")
    made.open(plan_of(), MODELS)
    return made


def all_rows(plan) -> list:
    return [(cell.stem, case_key(case), n) for cell in plan.cells for n in range(cell.task.rows_a_case) for case in cell.cases]


def stored(store, plan) -> list:
    return [(cell.stem, case_key(row)) for cell in plan.cells for row in store.rows(cell)]


def test_every_cell_is_computed_once(store, plan_of, fake):
    plan, evaluator = plan_of(), fake()
    events = list(work(store, plan.cells, evaluator))
    assert evaluator.computed == all_rows(plan)
    assert [type(event) for event in events] == [Started, Settled] * len(plan.cells)
    assert [event.stem for event in events[::2]] == [event.stem for event in events[1::2]] == [cell.stem for cell in plan.cells]
    assert [event.rows for event in events[1::2]] == [5] * 4 + [6] * 4
    again = fake()
    assert [type(event) for event in work(store, plan.cells, again)] == [Settled] * len(plan.cells) and again.computed == []


def test_only_what_is_new_is_computed(store, plan_of, fake):
    old, evaluator = plan_of(), fake()
    list(work(store, old.cells, evaluator))
    new = plan_of(("[0.1, 0.05]", "[0.1, 0.05, 0.02]"), ("[dense, outrider, sts]", "[quest, dense, outrider, sts]"))
    list(work(store, new.cells, evaluator))
    assert sorted(evaluator.computed, key=str) == sorted(all_rows(new), key=str)
    assert len(set(evaluator.computed)) == len(evaluator.computed)


def test_texts_of_one_context_are_read_together(store, plan_of, fake):
    """Perplexity takes two texts at once; what one of them has already is not computed again, and families stay alone."""
    old, plan = plan_of(("texts: [texts/*.txt]", "texts: [texts/one.txt]")), plan_of()
    list(work(store, [cell for cell in old.cells if cell.context == plan.cells[0].context], fake()))
    evaluator = fake(batch_size=2)
    events = list(work(store, plan.cells, evaluator))
    _, two, three, four = [cell.stem for cell in plan.cells[:4]]
    assert evaluator.calls[:2] == [[two], [three, four]] and {len(call) for call in evaluator.calls[2:]} == {1}
    assert sorted(stored(store, plan), key=str) == sorted(((stem, key) for stem, key, _ in all_rows(plan)), key=str)
    assert [event.rows for event in events if isinstance(event, Settled)][:4] == [0, 5, 5, 5]


def test_texts_read_together_fail_together_and_lack_what_they_lack(store, folder, plan_of, fake):
    """What is done before the error stays, of each; texts that lack different cases are read apart."""
    plan = plan_of()
    one, two, *_ = plan.cells

    def fails(cell, case):
        if cell.stem == two.stem and case == two.cases[2]:
            raise MemoryError("no room")

    settled = [event for event in work(store, [one, two], fake(fails, batch_size=2)) if isinstance(event, Settled)]
    assert [event.error for event in settled] == ["MemoryError: no room"] * 2
    assert (store.missing(one), store.missing(two)) == (one.cases[3:], two.cases[2:])
    evaluator = fake(batch_size=2)
    list(work(Store(folder / "out"), [one, two], evaluator))
    assert evaluator.calls == [[one.stem], [two.stem]]
    assert store.missing(one) == store.missing(two) == ()


def test_a_cell_that_fails_is_recorded_and_tried_again(store, folder, plan_of, fake):
    plan = plan_of()
    broken = plan.cells[1]

    def fails(cell, case):
        if cell.stem == broken.stem and case == broken.cases[2]:
            raise MemoryError("no room")

    settled = [event for event in work(store, plan.cells, fake(fails)) if isinstance(event, Settled)]
    assert [event.error for event in settled] == [None, "MemoryError: no room", *[None] * 6]
    assert store.missing(broken) == broken.cases[2:] and store.failure(broken) == "MemoryError: no room"
    other = fake()  # of the same run: it does not try again
    assert [e.error for e in work(store, [broken], other)] == ["MemoryError: no room"] and other.computed == []
    evaluator = fake()
    assert [e.error for e in work(Store(folder / "out"), plan.cells, evaluator) if isinstance(e, Settled)] == [None] * 8
    assert evaluator.computed == [(broken.stem, case_key(case), 0) for case in broken.cases[2:]]
    assert list((folder / "out" / "failed").iterdir()) == []


def test_an_error_of_the_folder_ends_the_run(store, plan_of, fake, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SweepError, match="No space left on device"):
        list(work(store, plan_of().cells, fake()))
    assert list((store.path / "failed").iterdir()) == []


def test_an_interrupt_keeps_the_cases_that_were_done(store, plan_of, fake):
    plan = plan_of()
    case = plan.cells[2].cases[3]

    def interrupts(cell, given):
        if cell.stem == plan.cells[2].stem and given == case:
            raise KeyboardInterrupt

    first, second = fake(interrupts), fake()
    with pytest.raises(KeyboardInterrupt):
        list(work(store, plan.cells, first))
    list(work(Store(store.path), plan.cells, second))
    assert first.computed + second.computed == all_rows(plan)


def test_cells_of_others_are_waited_for_and_taken_over(store, plan_of, fake, monkeypatch):
    plan = plan_of()
    held = store.claim(plan.cells[0])
    monkeypatch.setattr(run.time, "sleep", lambda _: held.release())  # its process ends, the cell not done
    evaluator = fake()
    events = list(work(store, plan.cells, evaluator))
    assert [event.text for event in events if isinstance(event, Notice)] == ["waiting for 1 cells that other processes compute"]
    assert evaluator.computed[-5:] == all_rows(plan)[:5] and store.missing(plan.cells[0]) == ()


def begin(store: Store, plan, fake, log: int, seed: int) -> int:
    """A new process that works on the folder and writes "pid begins|ends stem" into `log`."""
    child = os.fork()
    if child:
        return child
    draw = random.Random(seed)
    note = lambda text, stem: os.write(log, f"{os.getpid()} {text} {stem}\n".encode())  # noqa: E731
    try:
        evaluator = fake(lambda cell, case: time.sleep(draw.random() * 0.008))
        for event in work(Store(store.path), plan.cells, evaluator):
            if isinstance(event, Started):
                note("begins", event.stem)
            elif isinstance(event, Settled) and event.rows:
                note("ends", event.stem)
        os._exit(0)
    finally:
        os._exit(1)


def test_processes_share_a_folder_and_survive_kills(store, plan_of, fake, folder, monkeypatch):
    """Real processes, killed at random moments. Nobody has a cell of a living process; in the end each row is there once."""
    for name in "abcdefgh":
        (folder / "texts" / f"{name}.txt").write_text(name)
    plan = plan_of()
    store.open(plan, MODELS)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    draw = random.Random(1)
    children = [begin(store, plan, fake, log, seed) for seed in range(3)]
    for seed in range(3, 9):
        time.sleep(0.03 + draw.random() * 0.05)
        os.kill(victim := children.pop(draw.randrange(3)), signal.SIGSTOP)
        if os.WIFSTOPPED(os.waitpid(victim, os.WUNTRACED)[1]):  # it may have been done already
            os.write(log, f"{victim} killed -\n".encode())  # before its cell can become another's
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
        children.append(begin(store, plan, fake, log, seed))
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    expected = [(cell.stem, case_key(case)) for cell in plan.cells for case in cell.cases for _ in range(cell.task.rows_a_case)]
    assert sorted(stored(store, plan), key=str) == sorted(expected, key=str)
    assert list((store.path / "failed").iterdir()) == []
    owner: dict[str, str] = {}
    taken_over = 0
    for pid, what, stem in (line.split() for line in (folder / "log").read_text().splitlines()):
        if what == "begins":
            taken_over += owner.get(stem) == "killed"
            assert owner.get(stem, "killed") == "killed", f"{stem}: {owner[stem]} has it, and {pid} begins"
            owner[stem] = pid
        elif what == "ends":
            assert owner[stem] == pid
            owner[stem] = "done"
        else:
            owner = {cell: "killed" if has == pid else has for cell, has in owner.items()}
    assert taken_over > 0, "no kill hit a cell in the middle"


def test_pace(store, plan_of, monkeypatch):
    cells = plan_of().cells[:4]  # contexts 64, 64, 128, 128
    now = [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    pace = Pace(store, cells)
    assert pace.seconds_left() is None
    now[0] = 110.0
    pace.settled(cells[0].stem)
    assert pace.seconds_left() == pytest.approx(50)
    pace.settled(cells[0].stem)  # twice: as if once
    assert pace.seconds_left() == pytest.approx(50)
    for cell in cells[1:]:
        pace.settled(cell.stem)
    assert pace.seconds_left() == 0
    assert [in_words(seconds) for seconds in (0.2, 89, 91, 5399, 7200)] == ["1 s", "89 s", "2 min", "90 min", "2.0 h"]
