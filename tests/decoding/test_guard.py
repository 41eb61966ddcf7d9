"""The guard's rule: how often it errs, how soon it sees, by simulation; and what its levels are."""

from __future__ import annotations

import pytest
import torch

from outrider.config import Budget, EngineConfig, SamplingParams, engine_config
from outrider.decoding.guard import ALARM, CALM, POOR, WINDOW, Audit, Calm, Evidence, Guard, Guards, levels
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import Statistics
from outrider.errors import OptionError

T = 5  # positions of an audit
TOLERANCE = EngineConfig().guard_tolerance
SHARES = 0.1, 0.2, 1.0


def audit(differs=0.0, recalled=0.7, kept=0.1):
    return Audit(differences=[differs] * T, recalled=recalled, kept=kept)


def first_alarms(mean, runs, audits, seed=0, spread=None):
    """By run the audit of the first alarm, `audits + 1` where there is none. With `spread` each audit has a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.full((runs, audits, 1), mean)
    if spread is not None:
        means = means + spread * (2 * torch.rand(runs, audits, 1, generator=generator) - 1)
    drawn = (torch.rand(runs, audits, T, generator=generator) < means).double().tolist()
    found = []
    for run in drawn:
        evidence = Evidence(TOLERANCE)
        found.append(next((at for at, one in enumerate(run, start=1) if evidence.add(one) >= ALARM), audits + 1))
    return torch.tensor(found)


@pytest.mark.parametrize("mean, spread, most", [(0.13, None, 0.0), (0.15, 0.15, 0.01), (0.2, None, 0.01), (0.25, None, 0.15)])
def test_false_alarms_are_rare(mean, spread, most):
    """Of sequences of 200 audits (6,400 rounds at 32), the share with an alarm."""
    alarms = first_alarms(mean, 400, 200, spread=spread)
    assert (alarms <= 200).double().mean() <= most


@pytest.mark.parametrize("mean, within, least", [(0.95, 4, 0.99), (0.8, 4, 0.85), (0.6, 12, 0.9), (0.45, 40, 0.95)])
def test_alarms_come_soon(mean, within, least):
    assert (first_alarms(mean, 400, within) <= within).double().mean() >= least


def test_what_goes_wrong_late_is_seen_as_soon():
    evidence = Evidence(TOLERANCE)
    for _ in range(500):
        assert evidence.add([0.0] * T) < 1
    assert [evidence.add([1.0] * T) >= ALARM for _ in range(2)] == [False, True]


@pytest.mark.parametrize("bound", [0.05, 0.25, 0.9])
def test_capital_is_not_expected_to_grow(bound):
    """Exactly, over all outcomes of one position: by Bernoulli's and by a continuous distribution of that mean."""
    yes, no = Evidence(bound).add([1.0]), Evidence(bound).add([0.0])
    assert bound * yes + (1 - bound) * no == pytest.approx(1)
    assert Evidence(bound).add([bound]) == pytest.approx(1), "linear in the number, so it is so for every distribution"
    yes, no = Calm(bound).add([1.0]), Calm(bound).add([0.0])
    assert bound * yes + (1 - bound) * no == pytest.approx(1) and yes > 0


def test_a_failure_of_the_text_leads_to_everything():
    guard = Guard(32, TOLERANCE, SHARES)
    assert guard.share is None
    assert [guard.add(audit(1.0)) for _ in range(4)] == [0, 1, 0, 1]
    assert guard.share == 1 and guard.reads_all and not guard.is_due(32)


def test_lists_that_miss_everything_lead_there_too():
    """Text that has gone astray agrees with itself."""
    guard = Guard(32, TOLERANCE, SHARES)
    assert [guard.add(audit(recalled=0.12)) for _ in range(4)] == [0, 0, 0, 1]
    assert guard.share == 0.2
    assert [guard.add(audit(recalled=0.22, kept=0.2)) for _ in range(4)] == [0, 0, 0, 1]
    assert guard.reads_all


def test_some_layers_may_hold_little():
    """Every audit sees a part of the layers; the mean of all counts."""
    guard = Guard(32, TOLERANCE, SHARES)
    for n in range(400):
        assert guard.add(audit(recalled=0.15 if n % WINDOW == 0 else 0.6)) == 0


def test_a_return_takes_good_audits_and_the_next_one_more():
    guard = Guard(32, TOLERANCE, SHARES)

    def audits_until(change, differs):
        return next(n for n in range(1, 1000) if guard.add(audit(differs, recalled=0.7, kept=0.1)) == change)

    assert audits_until(1, 1.0) == 2 and guard.share == 0.2
    first = audits_until(-1, 0.0)
    assert guard.share is None and first > 4
    assert audits_until(1, 1.0) == 2
    assert audits_until(-1, 0.0) > first


@pytest.mark.parametrize("mean", [0.05, 0.2])
def test_a_return_needs_less_than_half_the_tolerance(mean):
    generator = torch.Generator().manual_seed(1)
    returned = 0
    for _ in range(100):
        calm = Calm(TOLERANCE / 2)
        drawn = (torch.rand(100, T, generator=generator) < mean).double().tolist()
        returned += any(calm.add(one) >= CALM for one in drawn)
    assert returned >= 90 if mean < TOLERANCE / 2 else returned <= 5


def test_tolerance_1_only_watches():
    guard = Guard(1, 1.0, SHARES)
    assert {guard.add(audit(1.0, recalled=0.0)) for _ in range(50)} == {0}
    assert guard.share is None


@pytest.mark.parametrize(
    "budget, wanted",
    [({}, (0.1, 0.2, 1.0)), ({"keep": 0.5}, (0.5, 1.0)), ({"keep": 1.0}, (1.0,)), ({"top_p": 0.9}, (0.9, 1.0))],
    ids=str,
)
def test_levels(budget, wanted):
    assert levels(Budget(**budget)) == wanted
    if len(wanted) == 1:
        assert not Guard(1, TOLERANCE, wanted).is_due(1), "nothing to audit"


def test_a_sequence_is_due_by_its_own_rounds():
    rows = [
        Sequence(i, [1, 2], SamplingParams(), None, (), Statistics(mode="", method=None, rounds=n))
        for i, n in enumerate((3, 2))
    ]
    for mode, every, wanted in (("sparse", 4, [True, False]), ("sparse", None, [False] * 2), ("dense", 4, [False] * 2)):
        guards = Guards(rows, engine_config(mode=mode, guard_every=every))
        assert guards.due(rows, 0) == wanted
        assert guards.due(rows, 1) == ([False, True] if any(wanted) else wanted), "a round is under way"


def test_what_an_audit_leaves_to_the_statistics():
    [row] = [Sequence(0, [1, 2], SamplingParams(), None, (), Statistics(mode="sparse", method="outrider"))]
    guards = Guards([row], engine_config(guard_every=1))
    assert [guards.heed(row, audit(1.0, recalled=0.5)) for _ in range(4)] == [False, False, False, True]
    counted = row.statistics
    assert (counted.audits, counted.audited_positions, counted.disagreement, counted.recalled_mass) == (4, 4 * T, 1.0, 0.5)
    assert (counted.budget_raised, counted.budget_lowered, counted.fallbacks, counted.fell_back_at) == (2, 0, 1, 0)
    assert row.share == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guard_every": 0}, "guard-every: got 0; allowed: a whole number >= 1, or None"),
        ({"guard_every": 2.0}, "guard-every: got 2.0; allowed: a whole number >= 1, or None"),
        ({"guard_tolerance": 0.0}, r"guard-tolerance: got 0.0; allowed: a number in \(0, 1\]"),
        ({"guard_tolerance": 1.5}, r"guard-tolerance: got 1.5; allowed: a number in \(0, 1\]"),
        ({"guard_tolerance": None}, r"guard-tolerance: got None; allowed: a number in \(0, 1\]"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        EngineConfig(**options)


def test_a_method_that_makes_its_own_lists_has_no_guard(make_pair, make_engine):
    with pytest.raises(OptionError, match="guard-every: got 4; allowed: None with method h2o"):
        make_engine(make_pair("llama"), mode="sparse", method="h2o", guard_every=4)


def test_poor_audits_are_few_by_design():
    assert Evidence(POOR).add([1.0]) * 100 < ALARM, "one is no alarm"
