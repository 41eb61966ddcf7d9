"""Layer maps: the dynamic programme against every possible map."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.errors import OptionError
from outrider.guidance.layer_map import candidates, monotone, proportional


@pytest.mark.parametrize(
    ("target", "draft", "expected"),
    [(4, 2, [0, 0, 1, 1]), (6, 4, [0, 0, 1, 2, 2, 3]), (2, 4, [0, 2]), (3, 3, [0, 1, 2]), (5, 1, [0] * 5)],
)
def test_proportional(target, draft, expected):
    assert proportional(target, draft).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_monotone_equals_brute_force(target, draft, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    cost = (
        torch.randint(0, 4, (target, draft), generator=generator).float()
        if ties
        else torch.rand(target, draft, generator=generator)
    )
    path = monotone(cost).tolist()
    assert len(path) == target and path == sorted(path)
    rows = cost.double()
    best = min(sum(float(rows[t, d]) for t, d in enumerate(p)) for p in combinations_with_replacement(range(draft), target))
    assert sum(float(rows[t, d]) for t, d in enumerate(path)) == pytest.approx(best)


def test_candidates():
    cost = torch.rand(4, 2)
    assert candidates("joint", cost).all()
    for name, expected in (("proportional", proportional(4, 2)), ("monotone", monotone(cost))):
        mask = candidates(name, cost)
        assert (mask.sum(1) == 1).all()
        assert torch.equal(mask.int().argmax(1), expected)
    with pytest.raises(OptionError, match="layer map: got 'depth'; allowed: proportional, monotone, joint"):
        candidates("depth", cost)
