"""How a budget is divided over lists: against all ways to divide one, and what must hold of every division."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.guidance import budgets
from outrider.ops import sparse_attention
from outrider.types import ListCosts


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 23))
def test_water_is_filled_best(seed, steps):
    """Against all ways to divide a budget in whole steps, on convex costs."""
    generator = torch.Generator().manual_seed(seed)
    shares = [i / 8 for i in range(9)]
    falls = torch.rand(3, 8, generator=generator).sort(descending=True).values
    costs = torch.cat([torch.zeros(3, 1), -falls.cumsum(1)], 1)
    found = budgets.water_fill(shares, costs, steps / 24)
    assert float(found.mean()) == pytest.approx(steps / 24)
    best = min(
        sum(float(costs[row, place]) for row, place in enumerate(places))
        for places in itertools.product(range(9), repeat=3)
        if sum(places) == steps
    )
    places = (found * 8).round().long()
    assert torch.allclose(found * 8, places.double(), atol=1e-6)
    assert sum(float(costs[row, place]) for row, place in enumerate(places)) == pytest.approx(best, abs=1e-5)


def test_water_runs_over_dents():
    """A cost that falls late is a straight line to there; what rises is filled last."""
    late = torch.tensor([[3.0, 3.0, 0.0], [2.0, 1.0, 0.9]])
    assert budgets.water_fill([0.0, 0.5, 1.0], late, 0.5).tolist() == pytest.approx([1.0, 0.0])
    rising = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.5, 0.0]])
    assert budgets.water_fill([0.0, 0.5, 1.0], rising, 0.5).tolist() == pytest.approx([0.0, 1.0])


def some_costs(seed: int, layers: int = 3, heads: int = 2) -> ListCosts:
    generator = torch.Generator().manual_seed(seed)
    falls = torch.rand(layers, heads, len(budgets.SHARES) - 1, generator=generator, dtype=torch.float64) ** 4
    costs = torch.cat([falls.flip(-1).cumsum(-1).flip(-1), torch.zeros(layers, heads, 1)], -1)
    return ListCosts(shares=budgets.SHARES, values=costs)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    keep=st.sampled_from([0.001, 0.02, 0.1, 0.5, 0.99, 1.0]),
    lengths=st.lists(st.integers(1, 20_000), min_size=1, max_size=3),
    forced=st.sampled_from([0, 5, 68]),
)
def test_a_division_loses_no_token(seed, keep, lengths, forced):
    costs, layers = some_costs(seed), (0, 2)
    factors = budgets.list_factors(costs, layers, keep)
    assert factors.shape == (2, 2) and float(factors.mean()) == pytest.approx(1)
    assert float(factors.min()) >= 0 and float(factors.max()) * keep <= 1 + 1e-9
    kept = torch.tensor(lengths).double() * keep
    counts = budgets.divide(kept, budgets.bounds(factors), forced)
    assert counts.shape == (2, len(lengths), 2) and counts.dtype == torch.int64
    assert bool((counts <= torch.tensor(lengths)[:, None]).all())
    more = kept > forced
    assert torch.allclose(counts.sum((0, 2)).double()[more], 4 * kept[more], atol=0.5001), "as many as equal lists have"
    exact = factors[:, None] * (kept - forced).clamp(min=0)[:, None] + kept.clamp(max=forced)[:, None]
    assert float((counts - exact).abs().max()) <= 1, "and each within a token of its part"
    if keep == 1:
        assert bool((counts == torch.tensor(lengths)[:, None]).all())


def test_lists_that_cost_alike_share_equally():
    values = torch.linspace(1, 0, len(budgets.SHARES)).expand(2, 3, -1) ** 2
    factors = budgets.list_factors(ListCosts(shares=budgets.SHARES, values=values), (0, 1), 0.1)
    assert factors.min() > 0.3 and factors.max() < 2.6  # whole pieces of equal slope go to one list after the other
    steep = values.clone()
    steep[1, 2] *= 50
    assert budgets.list_factors(ListCosts(shares=budgets.SHARES, values=steep), (0, 1), 0.1).argmax() == 5


def test_errors_are_those_of_the_op():
    """Each head's share of what attention to lists of that length is off by, layer as a whole."""
    generator = torch.Generator().manual_seed(0)
    s, t, heads, group, d = 50, 3, 2, 2, 8
    queries = torch.randn(t, heads * group, d, generator=generator)
    keys, values = (torch.randn(s + t, heads, d, generator=generator) for _ in range(2))
    mass = torch.rand(heads, s, generator=generator)
    order = budgets.rank(mass, s, 2, 4)
    counts = budgets.listed(s, 6, (0.0, 0.3, 1.0))
    assert counts == [6, 19, 50]
    errors = budgets.output_errors(queries, keys, values, order, 0.3, counts)
    lengths = torch.tensor([s])
    dense = sparse_attention(queries[None], keys[None], values[None], None, None, lengths, scale=0.3)
    for column, count in enumerate(counts):
        indices = order[None, :, :count].sort(-1).values.int()
        given = queries[None], keys[None], values[None], indices, torch.full((1, heads), count, dtype=torch.int32), lengths
        off = (sparse_attention(*given, scale=0.3) - dense).square().unflatten(2, (heads, group)).sum((0, 1, 3, 4))
        assert torch.allclose(errors[:, column], off / dense.square().sum(), atol=1e-6)
    assert errors[:, 0].min() > errors[:, 1].max() > errors[:, 2].max()


def test_order_has_what_every_list_holds_first():
    order = budgets.rank(torch.tensor([[0.1, 0.5, 0.3, 0.2, 0.4, 0.0]]), 5, 1, 1)
    assert order.tolist() == [[0, 4, 1, 2, 3]]
