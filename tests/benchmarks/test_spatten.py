"""SpAtten part by part: each part changes something, and the method itself stays what it is."""

from __future__ import annotations

import random

import pytest
from benchmarks.spatten import PARTS, compare

from outrider.eval.rows import Text
from outrider.guidance.rivals import RIVALS
from outrider.guidance.rivals.spatten import SpAtten


@pytest.fixture(scope="module")
def pair(make_pair, byte_tokenizer):
    shapes = {"num_hidden_layers": 6, "vocab_size": 257, "max_position_embeddings": 2048}
    return make_pair("llama", tokenizer=byte_tokenizer, **shapes)


def test_parts_differ(pair):
    text = Text(name="noise", text="".join(random.Random(3).choices("abcdefgh .,", k=1300)))
    rows = {row.method: row for row in compare(pair, [text], [0.1], 1200, 12)}
    assert list(rows) == list(PARTS) and len({row.ppl for row in rows.values()}) == len(PARTS)
    assert len({row.kept_fraction for row in rows.values()}) == 1, "of tokens all keep as many"
    tokens, heads, values, every = (row.kv_read_fraction for row in rows.values())
    assert every <= values < heads <= tokens
    assert RIVALS["spatten"] is SpAtten and not PARTS.keys() & RIVALS.keys()
