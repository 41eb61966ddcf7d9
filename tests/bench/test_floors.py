"""Bytes against counts made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.bench.floors import Round, Weights, against_floor, stage_bytes
from outrider.models import LayerShape, ModelSpec


def spec(*windows: int | None, query_heads: int, kv_heads: int, head_dim: int, vocabulary: int = 50) -> ModelSpec:
    layers = tuple(
        LayerShape(query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, scale=1.0, window=window)
        for window in windows
    )
    return ModelSpec(
        name="x", digest="", layers=layers, vocabulary=vocabulary, context=10**6, eos_tokens=(), dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip


TARGET = spec(None, None, 9, query_heads=8, kv_heads=2, head_dim=16)  # the third layer looks at a window
DRAFT = spec(None, None, query_heads=4, kv_heads=1, head_dim=8)
WEIGHTS = Weights(body=1000, output=70, end=200), Weights(body=100, output=30, end=20)
DRAFT_WEIGHTS = 5 * 100 + 4 * 30 - 20  # of five steps; the last one ends early
TARGET_ROW, DRAFT_ROW = 2 * 2 * 16 * 2, 2 * 1 * 8 * 2  # bytes of a cached token in one layer: K and V, heads, width, bf16


def test_everything_dense():
    counted = stage_bytes(TARGET, DRAFT, WEIGHTS, Round(batch=3, cached=1000.0, draft_tokens=4))
    assert counted == {
        "propose": 4 * (100 + 30 + 2 * 3 * 1000 * DRAFT_ROW),
        "score": 0,
        "select": 0,
        "verify": 1070 + 3 * (1000 * 2 + 8) * TARGET_ROW,
        "accept": 3 * 5 * 50 * 2,
        "confirm": 0,
        "audit": 0,
    }


def test_confirmations_read_everything_as_often_as_they_come():
    round_ = Round(batch=3, cached=1000.0, draft_tokens=4, kept=0.1, confirmations=0.25, tail=6)
    dense, step = 1070 + 3 * (1000 * 2 + 8) * TARGET_ROW, 130 + 2 * 3 * 1000 * DRAFT_ROW
    assert stage_bytes(TARGET, DRAFT, WEIGHTS, round_)["confirm"] == round(0.25 * (dense + 6 * step))


def test_audits_verify_and_read_everything_and_what_is_listed_in_a_quarter_of_the_layers_again():
    round_ = Round(batch=3, cached=1000.0, draft_tokens=4, kept=0.1, audits=0.25)
    everything, listed, again = 3 * (1000 * 2 + 8) * TARGET_ROW, 3 * (100 * 2 + 8) * TARGET_ROW, 3 * 100 * 2 * TARGET_ROW / 4
    counted = stage_bytes(TARGET, DRAFT, WEIGHTS, round_)
    assert counted["audit"] == round(0.25 * (1070 + listed + everything + again))
    assert counted["verify"] == round(0.75 * (1070 + listed)), "in the other rounds"


def test_sparse_verification():
    round_ = Round(batch=3, cached=1000.0, draft_tokens=4, kept=0.1, scored_layers=(1,), mass_bytes=2)
    counted = stage_bytes(TARGET, DRAFT, WEIGHTS, round_)
    assert counted["propose"] == DRAFT_WEIGHTS + (5 * 2 - 1) * 3 * 1000 * DRAFT_ROW
    assert counted["score"] == 3 * 1000 * DRAFT_ROW // 2
    assert counted["select"] == 3 * (1000 * 4 * 2 + 100 * 4 * 2 * 2)  # 4 query heads; lists of 2 KV heads in 2 full layers
    assert counted["verify"] == 1070 + 3 * (100 * 2 + 8) * TARGET_ROW


@pytest.mark.parametrize("bits, words", [(4, 9), (2, 5)])
def test_scored_keys_in_few_bits(bits, words):
    """A block of 64 tokens has so many words for each dim of a KV head: codes, and the range."""
    exact = Round(batch=3, cached=1024.0, draft_tokens=4, kept=0.1, scored_layers=(0, 1))
    few = Round(batch=3, cached=1024.0, draft_tokens=4, kept=0.1, scored_layers=(0, 1), score_bits=bits)
    draft = spec(None, None, query_heads=4, kv_heads=2, head_dim=64)
    counted = [stage_bytes(TARGET, draft, WEIGHTS, round_) for round_ in (exact, few)]
    assert counted[1]["score"] == 2 * 3 * (1024 // 64) * 2 * 64 * words * 4
    assert counted[0] | {"score": 0} == counted[1] | {"score": 0}


def test_sparse_drafting():
    round_ = Round(batch=1, cached=1000.0, draft_tokens=4, draft_listed=50.0, scored_layers=(0, 1), mass_bytes=4)
    counted = stage_bytes(TARGET, DRAFT, WEIGHTS, round_)
    assert counted["propose"] == DRAFT_WEIGHTS + (5 * 2 - 1) * 50 * DRAFT_ROW
    assert counted["select"] == 1000 * 4 * 8 + 50 * 4 * 1 * 2
    assert counted["verify"] == 1070 + (1000 * 2 + 8) * TARGET_ROW
    short = stage_bytes(TARGET, DRAFT, WEIGHTS, replace(round_, cached=20.0))
    assert short["propose"] == DRAFT_WEIGHTS + (5 * 2 - 1) * 20 * DRAFT_ROW


def test_the_target_alone():
    counted = stage_bytes(TARGET, DRAFT, WEIGHTS, Round(batch=2, cached=1000.0, draft_tokens=0))
    read = 1070 + 2 * (1000 * 2 + 8) * TARGET_ROW
    assert counted == {"propose": 0, "score": 0, "select": 0, "verify": read, "accept": 2 * 50 * 2, "confirm": 0, "audit": 0}


def test_floors_are_times_at_the_streaming_rate():
    assert against_floor(8 * 10**9, 4.0, 4000.0) == {"bytes": 8 * 10**9, "ms": pytest.approx(2.0), "percent": pytest.approx(50)}
    assert against_floor(8, 4.0, None) == {"bytes": 8, "ms": None, "percent": None}


def test_weights_are_counted_once(work):
    hidden, inner, vocabulary, heads, kv_heads, width = 64, 96, 512, 4, 2, 16
    layer = hidden * width * (2 * heads + 2 * kv_heads) + 3 * hidden * inner + 2 * hidden
    end = hidden * width * heads + 3 * hidden * inner + hidden  # output projection, the three of the MLP, the norm before it
    assert work.weights[0] == Weights(body=4 * (3 * layer + hidden), output=4 * vocabulary * hidden, end=4 * end)
    hidden, inner, heads = 32, 48, 2
    layer = hidden * width * (2 * heads + 2 * kv_heads) + 3 * hidden * inner + 2 * hidden
    end = hidden * width * heads + 3 * hidden * inner + hidden
    tied = 4 * vocabulary * hidden
    assert work.weights[1] == Weights(body=4 * (2 * layer + hidden), output=tied, end=4 * end)
