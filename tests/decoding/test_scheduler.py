"""The scheduler against a simulation of what its moves do to the caches."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from outrider.decoding.scheduler import Scheduler


@given(st.integers(1, 4), st.lists(st.integers(1, 5), max_size=9))
def test_slots_follow_the_moves(slots, lives):
    """Sequence i runs `lives[i]` rounds. A cache that only obeys admit, join and release always holds the running ones."""
    sequences = [SimpleNamespace(index=i, left=n, finish_reason=None) for i, n in enumerate(lives)]
    scheduler = Scheduler(sequences, slots)
    cache: list[int | None] = [None] * slots
    admitted_order, rounds = [], 0
    while scheduler.unfinished:
        while (admitted := scheduler.admit()) is not None:
            slot, sequence = admitted
            assert scheduler.admit() is None, "one at a time"
            assert cache[slot] is None, "a slot in use is never filled"
            cache[slot] = sequence.index
            admitted_order.append(sequence.index)
            assert scheduler.join() == (slot, slot)
        running = [sequence.index for sequence in scheduler.running]
        assert cache[: len(running)] == running
        assert len(running) == min(slots, len(running) + len(scheduler.waiting)), "no slot stays empty while others wait"
        for sequence in scheduler.running:
            sequence.left -= 1
            sequence.finish_reason = None if sequence.left else "length"
        for slot, sequence in enumerate(scheduler.running):
            if sequence.finish_reason is not None:
                cache[slot] = None
        for source, slot in scheduler.release():
            assert source > slot
            cache[slot], cache[source] = cache[source], None
        assert cache[: len(scheduler.running)] == [sequence.index for sequence in scheduler.running]
        rounds += 1
        assert rounds <= sum(lives)
    assert admitted_order == list(range(len(lives))), "first come, first served"
    assert cache == [None] * slots


def test_nothing_to_do():
    scheduler = Scheduler([], 3)
    assert not scheduler.unfinished
    assert scheduler.admit() is None
    assert scheduler.release() == []


def fill(scheduler):
    """Admit all there is room for; returns the slots."""
    slots = []
    while (admitted := scheduler.admit()) is not None:
        slots.append(admitted[0])
        scheduler.join()
    return slots


def test_a_prompt_joins_behind_those_that_run():
    """Rows leave while it is read: it moves from the slot where it was read to the one behind them."""
    first, second, third, late = (SimpleNamespace(finish_reason=None) for _ in range(4))
    scheduler = Scheduler([first, second, third, late], 4)
    assert [scheduler.admit()[0], scheduler.join()[1], scheduler.admit()[0], scheduler.join()[1]] == [0, 0, 1, 1]
    assert [scheduler.admit()[0], scheduler.join()[1]] == [2, 2]
    assert scheduler.admit() == (3, late)
    first.finish_reason = "eos"
    assert scheduler.release() == [(2, 0)]
    assert scheduler.unfinished
    assert scheduler.admit() is None, "another one is being read"
    assert scheduler.join() == (3, 2)
    assert scheduler.running == [third, second, late]


def test_drop_what_does_not_run():
    one, two, three = (SimpleNamespace(finish_reason=None) for _ in range(3))
    scheduler = Scheduler([one, two, three], 1)
    scheduler.admit()
    scheduler.drop(one)
    scheduler.drop(three)
    assert fill(scheduler) == [0]
    assert scheduler.running == [two] and not scheduler.waiting
