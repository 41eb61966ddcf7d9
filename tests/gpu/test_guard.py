"""The guard on a GPU: audits in graphs, rows that fall back, and nothing else changed. make test-gpu."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding.statistics import total

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [201, 77, 140, 33, 90]  # more than slots: rows are refilled and moved while others run
STARVED = {"mode": "sparse", "keep": 0.005, "sinks": 0, "recent": 0}
COUNTED = ("audits", "audited_positions", "budget_raised", "budget_lowered", "fell_back_at")


def tokens(results):
    assert {result.error for result in results} == {None}
    return [result.token_ids for result in results]


def params(count, dtype):
    """Sampled texts are compared in fp32 alone."""
    temperatures = [1.0, 0.0, 0.7, 1.2, 0.9] if dtype == "float32" else [0.0] * 5
    return [SamplingParams(max_new_tokens=count, temperature=t, seed=i) for i, t in enumerate(temperatures)]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype, kv_dtype", [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8")])
def test_who_only_watches_changes_nothing(dtype, kv_dtype, eager, gpu_pair, make_engine, random_prompts):
    options = {"mode": "sparse", "keep": 0.2, "batch_size": 3, "kv_dtype": kv_dtype, "eager": eager}
    plain = make_engine(gpu_pair(dtype), **options)
    watched = make_engine(gpu_pair(dtype), guard_every=3, guard_tolerance=1.0, **options)
    prompts, given = random_prompts(PROMPTS), params(40, dtype)
    found = watched.generate(prompts, given)
    assert tokens(found) == tokens(watched.generate(prompts, given)), "again, from graphs that are there"
    if dtype == "float32":  # in 16 bits products of twice as many rows round otherwise
        assert tokens(found) == tokens(plain.generate(prompts, given))
    counted = total([result.statistics for result in found])
    assert counted.audits > 0 and counted.seconds["audit"] > 0
    assert 0 < counted.disagreement <= 1 and 0.1 < counted.recalled_mass < 1


def test_graphs_find_what_eager_rounds_find(gpu_pair, make_engine, random_prompts):
    """Rows fall back while others go on, in rounds captured anew."""
    engines = [make_engine(gpu_pair("float32"), guard_every=2, batch_size=3, eager=eager, **STARVED) for eager in (True, False)]
    prompts, given = random_prompts(PROMPTS), params(80, "float32")
    eager, graphs = (engine.generate(prompts, given) for engine in engines)
    assert tokens(graphs) == tokens(eager)
    for one, other in zip(graphs, eager, strict=True):
        for name in COUNTED:
            assert getattr(one.statistics, name) == getattr(other.statistics, name), name
        assert one.statistics.differed == pytest.approx(other.statistics.differed, abs=1e-2)
        assert one.statistics.recalled == pytest.approx(other.statistics.recalled, abs=1e-2)
    assert total([result.statistics for result in graphs]).fallbacks > 0


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_who_falls_back_goes_on_as_the_dense_target(eager, gpu_pair, make_engine, random_prompts):
    pair, prompts = gpu_pair("float32"), random_prompts(PROMPTS)
    engine, dense = make_engine(pair, guard_every=2, batch_size=3, eager=eager, **STARVED), make_engine(pair)
    fallen = 0
    for prompt, result in zip(prompts, engine.generate(prompts, SamplingParams(max_new_tokens=120)), strict=True):
        at = result.statistics.fell_back_at
        if at is not None and at < len(result.token_ids):
            [wanted] = dense.generate([prompt + result.token_ids[:at]], SamplingParams(max_new_tokens=120 - at))
            assert result.token_ids[at:] == wanted.token_ids
            fallen += 1
    assert fallen


def test_a_row_of_a_batch_equals_the_row_alone(gpu_pair, make_engine, random_prompts):
    engine = make_engine(gpu_pair("float32"), guard_every=2, batch_size=3, **STARVED)
    prompts, given = random_prompts(PROMPTS), params(60, "float32")
    for prompt, own, result in zip(prompts, given, engine.generate(prompts, given), strict=True):
        [single] = engine.generate([prompt], [own])
        assert result.token_ids == single.token_ids
        assert [getattr(result.statistics, x) for x in COUNTED] == [getattr(single.statistics, x) for x in COUNTED]


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_every_backend_audits(backend, gpu_pair, make_engine, random_prompts):
    from outrider.ops.backends import device_obstacle

    if (reason := device_obstacle(backend, torch.device("cuda"))) is not None:
        pytest.skip(reason)
    options = {"mode": "sparse", "keep": 0.2, "guard_every": 2, "guard_tolerance": 1.0, "backend": backend}
    results = make_engine(gpu_pair("bfloat16"), **options).generate(random_prompts([150]), SamplingParams(max_new_tokens=30))
    tokens(results)
    assert results[0].statistics.audits > 3 and 0 < results[0].statistics.recalled_mass < 1
