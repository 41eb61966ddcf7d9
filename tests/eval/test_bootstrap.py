"""Bootstrap intervals cover what they should, and pairing takes away what documents share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.eval.bootstrap import change_interval, mean_interval

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def normal(count: int, seed: int) -> list[float]:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def test_coverage_on_normal_data():
    """Nominal 95%; of 30 normal values a percentile bootstrap covers about 94%, and 300 trials have a deviation of 1.4%."""
    trials = [mean_interval(normal(30, seed)) for seed in range(300)]
    covered = sum(low <= 0 <= high for low, high in trials) / len(trials)
    assert 0.94 - 4 * 0.014 <= covered <= 0.94 + 4 * 0.014


def test_width_is_that_of_the_normal_theory():
    values = torch.tensor(normal(200, 1))
    low, high = mean_interval(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * float(values.std(correction=0)) / 200**0.5, rel=0.05)


@given(values=VALUES, factor=st.floats(0.1, 10), shift=st.floats(-10, 10))
def test_intervals_move_with_the_values(values, factor, shift):
    low, high = mean_interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == mean_interval(values), "the same values, the same interval"
    moved = mean_interval([factor * value + shift for value in values])
    assert moved == pytest.approx((factor * low + shift, factor * high + shift), abs=1e-6)


def test_one_document_has_no_interval_and_equal_ones_have_no_width():
    assert mean_interval([3.0]) is None and mean_interval([3.0], [4.0]) is None and change_interval([3.0], [4.0]) is None
    assert mean_interval([2.0] * 5) == (2.0, 2.0)


def test_weights_make_it_a_ratio_of_sums():
    recalled, asked = [3, 0, 4, 1], [4, 4, 4, 4]
    assert mean_interval(recalled, asked) == pytest.approx(mean_interval([r / 4 for r in recalled]))
    low, high = mean_interval([1, 30], [2, 30])
    assert (low, high) == pytest.approx((0.5, 1.0)), "either document alone, or both"


def test_paired_is_narrower():
    """Books differ by far more than a method changes any of them."""
    base = [30 + 5 * x for x in normal(10, 3)]
    changed = [b * (1.02 + 0.002 * x) for b, x in zip(base, normal(10, 4), strict=True)]
    low, high = change_interval(changed, base)
    assert low <= 2 + 0.2 * sum(normal(10, 4)) / 10 <= high
    mean = sum(base) / len(base)
    alone = mean_interval([100 * (c / mean - 1) for c in changed])  # against the same mean for all
    assert high - low < (alone[1] - alone[0]) / 10
