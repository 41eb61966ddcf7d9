"""The greedy search for a mean of draft heads: never worse than one head, sizes that keep a plain mean right."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.guidance.head_map import average, best_overlap, greedy_mean, repeated
from outrider.guidance.similarity import kl_rows, recall, top_sets


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(2, 12), st.integers(0, 2**31))
def test_greedy_is_never_worse_than_the_best_single_row(rows, rounds, k, seed):
    generator = torch.Generator().manual_seed(seed)
    draft = (torch.randn(rounds, rows, 48, generator=generator) * 2).softmax(-1)
    blend = torch.rand(rounds, 3, 1, generator=generator) * draft[:, torch.randint(rows, (3,), generator=generator)]
    target = blend.sum(1)
    choose = partial(top_sets, lengths=torch.full((rounds,), 48), k=k)
    singles = recall(target.unsqueeze(1), choose(draft))[0]
    found = greedy_mean(draft, singles, lambda merged: recall(target.unsqueeze(1), choose(merged))[0])
    assert len(found) in (1, 2, 4) and len(set(found)) == len(found)
    merged = recall(target.unsqueeze(1), choose(draft[:, found].mean(1, keepdim=True)))[0, 0]
    assert merged >= singles.max() - 1e-5
    distances = kl_rows(target, draft)
    found = greedy_mean(draft, -distances, lambda merged: -kl_rows(target, merged))
    assert kl_rows(target, draft[:, found].mean(1, keepdim=True))[0] <= distances.min() + 1e-5


def test_greedy_finds_both_halves_of_a_target():
    draft = torch.full((2, 6, 64), 1e-3)
    draft[:, 2, :8] = 1.0
    draft[:, 5, 40:48] = 0.9
    target = torch.zeros(2, 64)
    target[:, :8] = target[:, 40:48] = 1.0
    choose = partial(top_sets, lengths=torch.tensor([64, 64]), k=16)
    singles = recall(target.unsqueeze(1), choose(draft))[0]
    assert sorted(greedy_mean(draft, singles, lambda merged: recall(target.unsqueeze(1), choose(merged))[0])) == [2, 5]
    draft[:, [0, 1, 3, 4], 20:28] = 1.0  # flat rows would be close to anything; these look elsewhere
    assert sorted(greedy_mean(draft, -kl_rows(target, draft), lambda merged: -kl_rows(target, merged))) == [2, 5]


def test_repeated_lists_keep_their_mean():
    rows = [[[3], [1, 2]], [[4, 5, 6, 7], [0]]]
    scores = torch.rand(8, 10)
    merged = repeated(rows)
    assert merged.shape == (2, 2, 4)
    for layer in range(2):
        for head in range(2):
            assert torch.allclose(scores[merged[layer, head]].mean(0), scores[rows[layer][head]].mean(0))
    with pytest.raises(AssertionError):
        repeated([[[1, 2], [1, 2, 3]]])


def test_average_takes_the_allowed_layer_of_least_kl():
    kl = torch.tensor([0.3, 0.1, 0.2])
    assert average(kl, torch.tensor([True, True, True]), 2) == [[2, 3]]
    assert average(kl, torch.tensor([True, False, True]), 2) == [[4, 5]]


def test_best_overlap_stays_among_the_allowed_layers():
    table = torch.tensor([[[0.1, 0.9], [0.3, 0.2]], [[0.5, 0.4], [0.1, 0.2]]])  # [2 heads, 2 layers, 2 heads]
    assert best_overlap(table, torch.tensor([True, True])) == [[1], [0]]
    assert best_overlap(table, torch.tensor([False, True])) == [[2], [3]]
