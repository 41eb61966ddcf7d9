"""Counts and totals; what is counted as read is compared with lists written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.config import SamplingParams
from outrider.decoding.statistics import STAGES, Listed, ReadCounter, StageClock, Statistics, total
from outrider.models import LayerShape, ModelSpec
from outrider.types import Selection

FULL = LayerShape(query_heads=4, kv_heads=2, head_dim=8, scale=1.0, window=None)
WINDOW = replace(FULL, window=5)
SPEC = ModelSpec(
    name="target",
    digest="0",
    layers=(FULL, WINDOW, FULL),
    vocabulary=9,
    context=99,
    eos_tokens=(),
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
)
DRAFT = replace(SPEC, name="draft", layers=(replace(FULL, query_heads=3, kv_heads=1, head_dim=4),) * 3, dtype=torch.float32)
T = 4


def members(mask, n):
    return [i for i in range(n) if mask >> i & 1]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=3), st.sampled_from([1, 2, 4]), st.data())
def test_reads_equal_a_naive_count(lengths, owners, data):
    layers = data.draw(st.sampled_from([(0, 2), (2,)]))
    size = len(layers) * len(lengths) * owners
    masks = iter(data.draw(st.lists(st.integers(0, 2**12 - 1), min_size=size, max_size=size)))
    lists = [[[members(next(masks), n) for _ in range(owners)] for n in lengths] for _ in layers]
    width = max(1, max(len(one) for layer in lists for row in layer for one in row))
    padded = [[[one + [-1] * (width - len(one)) for one in row] for row in layer] for layer in lists]
    selection = Selection(
        layers=layers,
        indices=torch.tensor(padded, dtype=torch.int32),
        counts=torch.tensor([[[len(one) for one in row] for row in layer] for layer in lists], dtype=torch.int32),
        lengths=torch.tensor(lengths),
    )
    scored = data.draw(st.sampled_from([(0,), (0, 2)]))
    counted, counter = Listed.of(selection, SPEC, 12), ReadCounter(SPEC, DRAFT, scored)
    row_bytes = 2 * 8 * 2  # key and value, D = 8, two bytes
    for b, n in enumerate(lengths):
        read = window = min(n, 4) + T  # the first of T queries sees itself and 4 tokens before, the others no older ones
        dense, listed = 2 * (n + T) + window, 0.0
        for layer in (0, 2):
            own = lists[layers.index(layer)][b] if layer in layers else [list(range(n))]
            per_head = [own[0], own[0]] if len(own) == 1 else own if len(own) == 2 else [{*own[0], *own[1]}, {*own[2], *own[3]}]
            read += sum(len(head) + T for head in per_head) / 2
            listed += sum(map(len, own)) / len(own) / 2
        reads = counter.of(n, T, counted.layers, float(counted.tokens[b]), float(counted.rows[b]))
        assert reads.bytes_read == read * 2 * row_bytes + len(scored) * (n + T) * 4 * 4
        assert reads.bytes_dense == dense * 2 * row_bytes
        assert reads.listed == pytest.approx(listed)


@pytest.mark.parametrize("layers", [(FULL, WINDOW, FULL), (WINDOW, WINDOW)], ids=["mixed", "windows only"])
def test_a_dense_round_reads_everything(layers):
    counter = ReadCounter(replace(SPEC, layers=layers), DRAFT, ())
    for length in (11, 0):
        reads = counter.of(length, T)
        assert (reads.bytes_read, reads.listed) == (reads.bytes_dense, length)


def test_a_dense_run_over_window_layers_alone_keeps_everything(make_pair, generate, random_prompts):
    [result] = generate(make_pair("mistral-window"), random_prompts([20]), SamplingParams(max_new_tokens=6))
    assert (result.statistics.kept_fraction, result.statistics.kv_read_fraction) == (1.0, 1.0)


def test_total_adds_up():
    parts = [
        Statistics(
            mode="sparse",
            method="sts",
            prompt_tokens=n,
            generated_tokens=2 * n,
            rounds=n,
            drafted=4 * n,
            accepted=3 * n,
            accepted_at=[n, n, n, 0],
            listed=0.5 * n,
            cached=10 * n,
            tentative=9 * n,
            confirmed=7 * n,
            rolled_back=2 * n,
            confirmations=n,
            bytes_read=n,
            bytes_dense=4 * n,
            seconds=dict.fromkeys(STAGES, 0.25),
            decode_seconds=3.0,
            began=n / 4,
            audited=2 * n,
            agreed=n,
        )
        for n in (2, 6)
    ]
    whole = total(parts)
    assert (whole.mode, whole.method, whole.accepted_at) == ("sparse", "sts", [8, 8, 8, 0])
    assert (whole.prompt_tokens, whole.generated_tokens, whole.rounds, whole.drafted, whole.accepted) == (8, 16, 8, 32, 24)
    assert (whole.accepted_per_round, whole.kept_fraction, whole.kv_read_fraction) == (3.0, 0.05, 0.25)
    assert (whole.tentative, whole.confirmed, whole.rolled_back, whole.confirmations) == (72, 56, 16, 8)
    assert (whole.agreement, whole.tokens_per_second) == (0.5, 4.0)
    assert whole.seconds == dict.fromkeys(STAGES, 0.5)


@pytest.mark.parametrize(
    "times, wanted",
    [
        ([(1.0, 3.0), (2.0, 5.0)], 4.0),  # side by side
        ([(4.0, 5.0), (1.0, 2.0)], 2.0),  # one after the other, in any order
        ([(1.0, 9.0), (2.0, 3.0)], 8.0),  # one within the other
        ([(1.0, 2.0), None], 1.0),  # one that never ran
    ],
)
def test_the_decoding_time_of_a_run(times, wanted):
    """The time in which some sequence decoded: not the sum, and without prefills that nobody decoded beside."""
    parts = [Statistics(mode="dense", method=None) for _ in times]
    for part, span in zip(parts, times, strict=True):
        if span is not None:
            part.began, part.decode_seconds = span[0], span[1] - span[0]
    assert total(parts).decode_seconds == pytest.approx(wanted)


def test_empty_statistics_divide_by_nothing():
    empty = Statistics(mode="dense", method=None)
    assert (empty.accepted_per_round, empty.tokens_per_second, empty.agreement) == (0.0, 0.0, None)
    assert (empty.kept_fraction, empty.kv_read_fraction) == (1.0, 1.0)
    assert json.loads(json.dumps(empty.as_dict()))["kept_fraction"] == 1.0
    assert "began" not in empty.as_dict()


def test_two_statistics_do_not_share_their_counts():
    one, other = (Statistics(mode="dense", method=None) for _ in range(2))
    one.seconds["verify"] += 1
    assert other.seconds["verify"] == 0


def test_clock_adds_up_the_time_of_a_stage(monkeypatch):
    ticks = iter([1.0, 1.5, 2.0, 4.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    clock = StageClock(torch.device("cpu"))
    for _ in range(2):
        with clock.stage("verify"):
            pass
    assert clock.seconds["verify"] == 2.5
    assert sum(clock.seconds.values()) == 2.5


def test_a_stage_inside_another_stops_its_clock(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 20.0, 21.0, 30.0, 32.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = StageClock(torch.device("cpu"))
    with clock.stage("target"), clock.stage("score"):  # from 0 to 7, inside from 1 to 3
        pass
    with pytest.raises(RuntimeError), clock.stage("target"):  # at 20: not counted
        raise RuntimeError
    with clock.stage("select"):  # from 21 to 30
        pass
    spent = clock.settle()
    assert (spent["target"], spent["score"], spent["select"]) == (1 + 4, 2, 9)
