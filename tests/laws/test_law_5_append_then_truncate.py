"""Law 5: append then truncate is a no-op for every cache, in any schedule of what the engine does to one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from outrider.errors import OptionError
from outrider.models import KVCache, LayerShape

LAYERS = (
    LayerShape(query_heads=4, kv_heads=2, head_dim=3, scale=1.0, window=None),
    LayerShape(query_heads=3, kv_heads=1, head_dim=5, scale=1.0, window=4),
)
BATCH, CAPACITY = 3, 11


class CacheMachine(RuleBasedStateMachine):
    """A cache against lists: row i of a sequence is a number of its own, written in every layer, head and channel."""

    @initialize()
    def start(self):
        self.cache = KVCache(LAYERS, BATCH, CAPACITY, dtype=torch.float32)
        self.rows: list[list[float]] = [[] for _ in range(BATCH)]
        self.number = 0.0

    def write(self, cache, t):
        """Append t fresh rows to every sequence of `cache`; returns their numbers [B][T]."""
        numbers = self.number + 1 + torch.arange(cache.batch * t, dtype=torch.float32).view(cache.batch, t)
        self.number += cache.batch * t
        for layer, shape in enumerate(LAYERS):
            keys = numbers[:, :, None, None] + torch.arange(shape.kv_heads)[:, None] / 8 + torch.arange(shape.head_dim) / 64
            cache.append(layer, keys, -keys)
        return numbers.tolist()

    @rule(data=st.data(), t=st.integers(1, 4))
    def append_and_advance(self, data, t):
        """On all sequences, or on a part that shares storage and lengths: appended, then committed in part."""
        first = data.draw(st.integers(0, BATCH - 1), label="first")
        last = data.draw(st.integers(first + 1, BATCH), label="last")
        part = self.cache.rows(first, last)
        before = part.lengths.tolist()
        if max(before) + t > CAPACITY:
            with pytest.raises(OptionError, match="cache capacity"):
                self.write(part, t)
            assert part.lengths.tolist() == before
            return
        numbers = self.write(part, t)
        counts = data.draw(st.lists(st.integers(0, t), min_size=last - first, max_size=last - first), label="counts")
        part.advance(torch.tensor(counts))
        for row, new, count in zip(self.rows[first:last], numbers, counts, strict=True):
            row += new[:count]

    @rule(t=st.integers(1, 4))
    def append_advance_truncate(self, t):
        """The law itself: afterwards nothing has changed."""
        lengths = self.cache.lengths.clone()
        if int(lengths.max()) + t <= CAPACITY:
            self.write(self.cache, t)
            self.cache.advance(t)
            self.cache.truncate(lengths)

    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(row))) for row in self.rows]
        self.cache.truncate(torch.tensor(lengths))
        self.rows = [row[:n] for row, n in zip(self.rows, lengths, strict=True)]

    @precondition(lambda self: any(self.rows))
    @rule(data=st.data())
    def truncate_to_more_is_refused(self, data):
        row = data.draw(st.integers(0, BATCH - 1))
        wrong = [len(r) for r in self.rows]
        wrong[row] = data.draw(st.sampled_from([-1, wrong[row] + 1]))
        with pytest.raises(OptionError, match="truncate lengths"):
            self.cache.truncate(torch.tensor(wrong))

    @rule(pair=st.permutations(range(BATCH)))
    def move(self, pair):
        source, target = pair[:2]
        self.cache.move(source, target)
        self.rows[target], self.rows[source] = self.rows[source], []

    @invariant()
    def holds_the_rows(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths.tolist() == [len(row) for row in self.rows]
        for layer, shape in enumerate(LAYERS):
            keys, values = self.cache.keys(layer), self.cache.values(layer)
            assert keys.shape == values.shape == (BATCH, CAPACITY, shape.kv_heads, shape.head_dim)
            offset = torch.arange(shape.kv_heads)[:, None] / 8 + torch.arange(shape.head_dim) / 64
            for b, row in enumerate(self.rows):
                wanted = torch.tensor(row).view(-1, 1, 1) + offset
                assert torch.equal(keys[b, : len(row)], wanted)
                assert torch.equal(values[b, : len(row)], -wanted)


TestCache = CacheMachine.TestCase


def test_rejected_tokens_leave_no_trace_in_a_model(family, make_model, random_prompts):
    """Through a model: a round that is rolled back gives bit-equal logits afterwards, in a ragged batch."""
    model = make_model(family)
    prompts = random_prompts([13, 5, 9])
    cache = model.new_cache(3, 24)
    for row, prompt in enumerate(prompts):
        part = cache.rows(row, row + 1)
        model.forward(torch.tensor([prompt]), part)
        part.advance(len(prompt))
    lengths = cache.lengths.clone()
    tokens, others = (torch.tensor(random_prompts([4, 4, 4], seed=seed)) for seed in (1, 2))
    before = model.forward(tokens, cache).logits
    model.forward(others, cache)
    cache.advance(torch.tensor([4, 2, 3]))
    model.forward(others, cache)
    cache.truncate(lengths)
    assert torch.equal(model.forward(tokens, cache).logits, before)
