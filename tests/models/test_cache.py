"""What the cache refuses, and that a refusal leaves it as it was. The schedule of appends is law 5."""

from __future__ import annotations

import pytest
import torch

from outrider.errors import OptionError
from outrider.models import KVCache, LayerShape

LAYERS = (
    LayerShape(query_heads=4, kv_heads=2, head_dim=3, scale=1.0, window=None),
    LayerShape(query_heads=2, kv_heads=2, head_dim=5, scale=1.0, window=3),
)


@pytest.fixture
def cache():
    made = KVCache(LAYERS, 2, 6, dtype=torch.float32)
    made.advance(torch.tensor([4, 1]))
    return made


def test_starts_empty_and_finite():
    cache = KVCache(LAYERS, 2, 6, dtype=torch.bfloat16)
    assert (cache.batch, cache.capacity, cache.lengths.tolist(), cache.device.type) == (2, 6, [0, 0], "cpu")
    for layer, shape in enumerate(LAYERS):
        assert cache.keys(layer).shape == (2, 6, 2, shape.head_dim)
        assert cache.keys(layer).dtype == torch.bfloat16
        assert not cache.values(layer).any(), "masked rows must hold finite numbers"


@pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 1)], ids=["ragged", "even"])
def test_a_full_cache_refuses_and_keeps_what_it_holds(cache, rows):
    part = cache.rows(rows.start, rows.stop)
    before = [cache.keys(layer).clone() for layer in (0, 1)]
    fresh = torch.ones(part.batch, 3, 2, 3)
    with pytest.raises(OptionError, match="cache capacity: got 6; allowed: at least 7 tokens"):
        part.append(0, fresh, fresh)
    assert all(torch.equal(cache.keys(layer), before[layer]) for layer in (0, 1))


@pytest.mark.parametrize("lengths", [5, -1, torch.tensor([4, 2]), torch.tensor([-1, 0])], ids=str)
def test_truncate_goes_down_only(cache, lengths):
    with pytest.raises(OptionError, match=r"truncate lengths: .*current lengths \[4, 1\]"):
        cache.truncate(lengths)
    assert cache.lengths.tolist() == [4, 1]


def test_truncate_to_one_number_or_to_each_its_own(cache):
    cache.truncate(torch.tensor([3, 1]))
    assert cache.lengths.tolist() == [3, 1]
    cache.truncate(0)
    assert cache.lengths.tolist() == [0, 0]


def test_an_even_and_a_ragged_append_write_the_same(cache):
    """Two code paths, one meaning: rows land behind the committed ones of their own sequence."""
    fresh = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    cache.append(0, fresh, -fresh)
    for row, length in enumerate([4, 1]):
        alone = KVCache(LAYERS, 1, 6, dtype=torch.float32)
        alone.advance(length)
        alone.append(0, fresh[row : row + 1], -fresh[row : row + 1])
        assert torch.equal(cache.keys(0)[row], alone.keys(0)[0])
        assert torch.equal(cache.values(0)[row], alone.values(0)[0])


def test_views_share_storage_and_lengths(cache):
    part = cache.rows(1, 2)
    fresh = torch.ones(1, 2, 2, 3)
    part.append(0, fresh, fresh)
    part.advance(2)
    assert cache.lengths.tolist() == [4, 3]
    assert cache.keys(0)[1, 1:3].eq(1).all()
    assert cache.keys(0, 3).shape[1] == 3
    assert cache.keys(0, 3).data_ptr() == cache.keys(0).data_ptr(), "views, never copies"
