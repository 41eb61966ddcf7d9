"""When tentative tokens are confirmed: the pace of a row, and who is due."""

from __future__ import annotations

import pytest

from outrider.config import MAX_EXACT_EVERY, EngineConfig, SamplingParams, engine_config
from outrider.decoding.pace import NARROW, WIDE, Confirmations, Pace
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import Statistics
from outrider.errors import OptionError


def seen(passed, of, times=40, tokens=4):
    pace = Pace(None, 4)
    for _ in range(times):
        pace.brought(tokens)
        pace.confirmed(passed, of)
    return pace


def sequence(prompt=20, tentative=0, index=0, **params):
    made = Sequence(
        index, [1] * prompt, SamplingParams(max_new_tokens=50, **params), None, (7,), Statistics(mode="", method=None)
    )
    made.hold([2] * tentative)
    return made


def test_every_number_is_the_best_by_its_own_rule():
    for pace in (Pace(None, 4), seen(3, 4), seen(16, 16), seen(0, 4)):
        a, m = pace.agreement, 4.0 if pace._rounds > 1 else 2.0
        d = pace._drafted_on / pace._whole if pace._whole else m - 1
        stand = [sum(a**i for i in range(n + 1)) + a**n * d for n in range(1, MAX_EXACT_EVERY + 1)]
        # up to 5 tokens come to at most 9 with the round that brings the last of them: 16 with one before and 6 behind
        worth = [tokens / (n / m + (NARROW if n <= 5 else WIDE)) for n, tokens in enumerate(stand, start=1)]
        assert worth[pace.every - 1] == pytest.approx(max(worth))


def test_the_pace_follows_what_it_sees():
    paces = [seen(0, 4), seen(3, 4), seen(15, 16), seen(60, 60, times=2000)]
    assert [pace.every for pace in paces] == sorted(pace.every for pace in paces)
    assert paces[0].every <= 3 and paces[-1].every > 30
    assert all(0 < pace.agreement < 1 for pace in paces)
    turned = paces[-1]
    for _ in range(60):
        turned.confirmed(0, 30)
    assert turned.every < 8, "what was long ago counts little"


def test_a_fixed_number_stays():
    pace = Pace(13, 4)
    pace.confirmed(0, 13)
    assert pace.every == 13


def test_who_is_due():
    config = engine_config(mode="exact", exact_every=6, min_context=10)
    rows = [sequence(index=i, tentative=n) for i, n in enumerate((6, 5, 0, 9, 7))]
    confirmations = Confirmations(rows, config)
    assert confirmations.are_due(rows) and confirmations.are_due(rows[3:])
    assert not confirmations.are_due(rows[1:3]) and not confirmations.are_due([])
    rows[1].hold([2, 7, 2])
    assert rows[1].closing and rows[1].tentative[-1] == 7, "what comes behind an end of text is dropped"
    assert confirmations.are_due(rows[1:3])
    assert confirmations.are_due_behind(rows[2:3], 5) is False
    assert confirmations.are_due_behind(rows[2:3], 6) is None, "a round may bring as many"
    assert confirmations.are_due_behind([sequence(index=1, tentative=5)], 5), "one is enough"


def test_a_pace_is_kept_to_the_nearest_round():
    """What a round under way brings is not known, but what rounds bring on average."""
    confirmations = Confirmations([sequence()], engine_config(mode="exact", min_context=10))
    pace = confirmations.pace(sequence())
    for _ in range(200):
        pace.brought(4)
        pace.confirmed(19, 20)
    assert pace.tokens == pytest.approx(4)
    first = next(count for count in range(30) if confirmations.are_due_behind([sequence(tentative=count)], 5))
    assert abs(first + 4 - pace.every) <= 2


def test_below_min_context_and_in_other_modes_nothing_is_tentative():
    short, long = sequence(prompt=8), sequence(prompt=12, index=1)
    for mode, holds in (("exact", [False, True]), ("sparse", [False, False]), ("dense", [False, False])):
        confirmations = Confirmations([short, long], engine_config(mode=mode, min_context=10))
        assert [confirmations.holds(one) for one in (short, long)] == holds
        assert not confirmations.are_due([short, long])


def test_tentative_tokens_are_no_result_until_they_are_confirmed():
    one = sequence(prompt=3)
    assert one.hold([4, 5]) == 2
    assert (one.tokens, one.pending, one.cached, one.text_cached) == ([], 5, 4, [1, 1, 1, 4])
    assert one.extend([4, 9]) == [4, 9]
    assert (one.tokens, one.tentative, one.pending, one.cached) == ([4, 9], [], 9, 4)
    long = sequence(prompt=3)
    assert long.hold([2] * 60) == 50 and long.closing, "no more than may be generated"


@pytest.mark.parametrize("value", [0, 65, -1, 2.0, True, "8"])
def test_bad_numbers_are_refused(value):
    with pytest.raises(OptionError, match=r"exact-every: got .*; allowed: a whole number in 1 .. 64, or None"):
        EngineConfig(mode="exact", exact_every=value)


def test_modes_are_named_where_one_is_unknown():
    with pytest.raises(OptionError, match="mode: got 'exactly'; allowed: plain, dense, sparse, exact"):
        EngineConfig(mode="exactly")
