"""What a draft reads of a long prompt: whole blocks, as many as asked for, those that its queries look at."""

from __future__ import annotations

import pytest
import torch

from outrider.decoding.draft_blocks import EVERYTHING, DraftReading

BLOCK = 16


@pytest.fixture
def draft(make_pair):
    return make_pair("qwen3")[1]


def filled(draft, stop):
    """A cache of random rows, and random queries of its last 40 tokens by layer."""
    generator = torch.Generator().manual_seed(0)
    cache, shape = draft.new_cache(2, stop + 5), draft.spec.full_shape
    with torch.inference_mode():
        for layer in range(len(draft.spec.layers)):
            cache.append(layer, *torch.randn(2, 2, stop, shape.kv_heads, shape.head_dim, generator=generator))
    cache.advance(stop - 40)
    return cache, torch.randn(2, 40, shape.query_heads, shape.head_dim, generator=generator)


def test_how_many_blocks_are_read():
    reading = DraftReading(keep=0.25, least=3 * BLOCK)
    assert [reading.kept(n, BLOCK) for n in (0, 1, 3, 4, 12, 13, 40)] == [0, 1, 3, 3, 3, 4, 10]
    assert [DraftReading(keep=0.1).kept(n, BLOCK) for n in (1, 10, 21, 30)] == [1, 2, 3, 3]  # the first one and the last
    assert DraftReading(keep=0.5).share(5 * BLOCK, BLOCK) == (1 + 2 + 2 + 2) / 10 and EVERYTHING.share(900, BLOCK) == 1


def test_lists_are_whole_blocks_that_marks_repeat(draft):
    start, stop = 12 * BLOCK, 12 * BLOCK + 40  # blocks of 16, 16 and 8 tokens
    cache, queries = filled(draft, stop)
    lists = DraftReading(keep=0.3).lists(draft, cache, start, stop, BLOCK)
    indices, counts = lists.of(1, queries)
    heads = draft.spec.full_shape.kv_heads
    assert counts.shape == (2, 3, heads)
    assert counts.tolist() == [[[4 * BLOCK] * heads, [4 * BLOCK] * heads, [5 * BLOCK] * heads]] * 2
    marks = lists.listed[1]
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(heads)).tolist():
        b, block, head = place
        listed = indices[b, block, head, : counts[b, block, head]].tolist()
        blocks = marks[b, block, head].nonzero().flatten().tolist()
        assert listed == [token for i in blocks for token in range(i * BLOCK, (i + 1) * BLOCK)]
        assert {0, 11 + block} <= {*blocks} and max(blocks) == 11 + block
    assert len({tuple(marks[b, 0, h].nonzero().flatten().tolist()) for b in range(2) for h in range(heads)}) > 1


def test_what_one_query_looks_at_is_read(draft):
    """All keys alike but one, far back, that a single query of the second block meets."""
    start, stop = 20 * BLOCK, 22 * BLOCK
    cache, shape = draft.new_cache(1, stop), draft.spec.full_shape
    rows = torch.full((2, 1, stop, shape.kv_heads, shape.head_dim), 0.01)
    rows[0, 0, 7 * BLOCK + 3, 0, 5] = 3.0
    queries = torch.zeros(1, 2 * BLOCK, shape.query_heads, shape.head_dim)
    queries[0, BLOCK + 9, 0, 5] = 20.0
    with torch.inference_mode():
        cache.append(0, *rows)
    lists = DraftReading(keep=0.15).lists(draft, cache, start, stop, BLOCK)
    lists.of(0, queries)
    assert lists.listed[0][0, :, 0, 7].tolist() == [False, True]


def test_where_everything_is_read_there_are_no_lists(draft):
    cache, _ = filled(draft, 10 * BLOCK)
    for reading in (EVERYTHING, DraftReading(keep=0.1, least=9 * BLOCK), DraftReading(keep=0.999)):
        assert reading.lists(draft, cache, 7 * BLOCK + 8 - 8, 10 * BLOCK, BLOCK) is None
    assert DraftReading(keep=0.1).lists(draft, cache, 0, 2 * BLOCK + 1, BLOCK) is None  # two blocks, first and last
    assert EVERYTHING.bytes(draft.spec, 1000, 64, BLOCK) == 0 < DraftReading(keep=0.5).bytes(draft.spec, 1000, 64, BLOCK)


def test_layers_with_a_window_have_none(make_pair):
    draft = make_pair("gemma3")[1]
    windows = [layer for layer, shape in enumerate(draft.spec.layers) if shape.window is not None]
    cache = draft.new_cache(1, 200)
    lists = DraftReading(keep=0.1).lists(draft, cache, 160, 200, BLOCK)
    assert windows and lists.of(windows[0], torch.zeros(1, 40, 4, 8)) == (None, None) and not lists.listed
