"""Similarities of heads against plain loops over rounds, heads and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.guidance.similarity import forced_mask, jaccard, kl_layers, recall, top_sets

LENGTHS = torch.tensor([40, 23, 5])


@pytest.fixture
def target(masses):
    return masses["cut"](masses["peaked"](3, 4, 40, seed=1), LENGTHS)


@pytest.fixture
def draft(masses):
    return masses["cut"](masses["peaked"](3, 2, 3, 40, seed=2), LENGTHS)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    k=st.integers(0, 35),
    sinks=st.integers(0, 4),
    recent=st.integers(0, 6),
    seed=st.integers(0, 2**31),
)
def test_top_sets(lengths, k, sinks, recent, seed):
    mass = torch.rand(len(lengths), 2, 3, 30, generator=torch.Generator().manual_seed(seed))
    sets = top_sets(mass, torch.tensor(lengths), k, sinks=sinks, recent=recent)
    for n, length in enumerate(lengths):
        assert (sets[n].sum(-1) == min(k, length)).all()
        assert not sets[n, ..., length:].any()
        forced = {s for s in range(length) if s < sinks or s >= length - recent}
        for row, kept in zip(mass[n].flatten(0, 1), sets[n].flatten(0, 1), strict=True):
            order = sorted(range(length), key=lambda s: (s not in forced, -float(row[s])))
            wanted = set(kept.nonzero().flatten().tolist())
            if k >= len(forced):
                assert wanted == set(order[:k])
            else:
                assert wanted <= forced


def test_forced_mask():
    mask = forced_mask(torch.tensor([6, 2]), 8, 1, 2)
    assert mask.int().tolist() == [[1, 0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]


def test_kl_against_a_loop(target, draft):
    expected = []
    for layer in range(2):
        rounds = []
        for n, length in enumerate(LENGTHS.tolist()):
            t = target[n].double().mean(0)[:length]
            d = draft[n, layer].double().mean(0)[:length]
            t, d = t / t.sum(), d / d.sum()
            rounds.append(sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(t, d, strict=True)))
        expected.append(sum(rounds) / 3)
    assert kl_layers(target, draft).tolist() == pytest.approx(expected, rel=1e-3)


def test_kl_is_zero_for_equal_and_finite_for_disjoint(target):
    assert kl_layers(target, target.unsqueeze(1)).abs().max() < 1e-5
    disjoint = torch.zeros(1, 2, 1, 4)
    disjoint[..., 0] = 1
    elsewhere = torch.zeros(1, 1, 4)
    elsewhere[..., 1] = 1
    assert kl_layers(elsewhere, disjoint).tolist() == pytest.approx([math.log(1e9)] * 2, rel=1e-3)


def test_jaccard_and_recall_against_sets(target, draft):
    rows = draft.flatten(1, 2)
    target_sets, draft_sets = top_sets(target, LENGTHS, 7), top_sets(rows, LENGTHS, 7)
    overlap, held = jaccard(target_sets, draft_sets), recall(target, draft_sets)
    for h in range(4):
        for r in range(6):
            overlaps, shares = [], []
            for n in range(3):
                a = set(target_sets[n, h].nonzero().flatten().tolist())
                b = set(draft_sets[n, r].nonzero().flatten().tolist())
                overlaps.append(len(a & b) / len(a | b))
                shares.append(float(target[n, h, list(b)].sum() / target[n, h].sum()))
            assert float(overlap[h, r]) == pytest.approx(sum(overlaps) / 3, rel=1e-5)
            assert float(held[h, r]) == pytest.approx(sum(shares) / 3, rel=1e-5)


def test_recall_of_a_head_without_open_mass_is_one():
    assert recall(torch.zeros(2, 1, 5), torch.zeros(2, 3, 5, dtype=torch.bool)).tolist() == [[1.0] * 3]
