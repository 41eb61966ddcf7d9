"""union_lists against python sets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.ops import union_lists


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(0, 9)),
    length=st.integers(1, 30),
    seed=st.integers(0, 999),
)
def test_union_is_that_of_sets(shape, length, seed):
    L, B, Q, Hs, M = shape
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, M + 1, (L, B, Q, Hs), generator=generator, dtype=torch.int32)
    indices = torch.randint(0, length, shape, generator=generator, dtype=torch.int32)
    indices[torch.arange(M) >= counts.unsqueeze(-1)] = 2**31 - 1  # junk behind the counts
    got = union_lists(indices, counts, length)
    assert got.indices.dtype == got.counts.dtype == torch.int32
    assert got.indices.shape == (L, B, Hs, int(got.counts.max()))
    for layer in range(L):
        for b in range(B):
            for h in range(Hs):
                lists = [indices[layer, b, q, h, : counts[layer, b, q, h]].tolist() for q in range(Q)]
                expected = sorted({i for row in lists for i in row})
                count = int(got.counts[layer, b, h])
                assert got.indices[layer, b, h, :count].tolist() == expected
                assert (got.indices[layer, b, h, count:] == -1).all()


@pytest.mark.parametrize("position", [-1, 8])
def test_positions_outside_the_length_raise(position):
    indices = torch.full((1, 1, 1, 1, 1), position, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"indices: expected values in 0 \.\. 7"):
        union_lists(indices, torch.ones(1, 1, 1, 1, dtype=torch.int32), 8)


def test_bad_arguments_are_named():
    indices, counts = torch.zeros(1, 1, 2, 1, 3, dtype=torch.int32), torch.ones(1, 1, 2, 1, dtype=torch.int32)
    with pytest.raises(TypeError, match="indices: expected dtype int32, got int64"):
        union_lists(indices.long(), counts, 4)
    with pytest.raises(ValueError, match=r"counts: .* with L=1, B=1, Q=2, Hs=1"):
        union_lists(indices, counts[:, :, :1], 4)
    with pytest.raises(ValueError, match="length: expected at least 0"):
        union_lists(indices, counts, -4)
