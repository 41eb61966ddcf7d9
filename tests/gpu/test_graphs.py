"""Rounds as CUDA graphs give the tokens of rounds run kernel by kernel, whatever batch, budget and sampling. make test-gpu."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams
from outrider.errors import OptionError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [201, 77, 140, 33, 90]  # more than slots: rows are refilled and moved while others run
GREEDY = SamplingParams(max_new_tokens=40)
SAMPLED = [
    SamplingParams(max_new_tokens=30, temperature=1.0, seed=1),
    SamplingParams(max_new_tokens=40, seed=2),
    SamplingParams(max_new_tokens=25, temperature=0.7, top_k=5, seed=3),
    SamplingParams(max_new_tokens=35, temperature=1.2, top_p=0.8, seed=4),
    SamplingParams(max_new_tokens=20, temperature=0.9, top_k=20, top_p=0.9, seed=5),
]
MODES = {
    "dense": {},
    "top_k": {"mode": "sparse", "keep": 0.2},
    "top_p": {"mode": "sparse", "top_p": 0.7},
    "mean": {"mode": "sparse", "keep": 0.2, "unlisted": "mean"},
    "exact": {"mode": "exact", "keep": 0.2, "exact_every": 6},
    "plain": {"mode": "plain"},
    "sparse draft": {"drafting": "sparse", "draft_keep": 0.2, "draft_recent": 4},
    "both sparse": {"mode": "sparse", "keep": 0.2, "drafting": "sparse", "draft_keep": 0.2, "draft_recent": 4},
    "late": {"mode": "sparse", "keep": 0.2, "min_context": 100, "drafting": "sparse"},  # dense rounds first
}


# compiled layers round as eager ones do, but add up in another order: in bfloat16 a drawn token may then be another one
@pytest.mark.parametrize(
    "dtype, kv_dtype, params",
    [
        ("float32", "auto", GREEDY),
        ("float32", "auto", SAMPLED),
        ("bfloat16", "auto", GREEDY),
        ("bfloat16", "fp8", GREEDY),
    ],
    ids=["fp32", "fp32-sampled", "bf16", "fp8"],
)
@pytest.mark.parametrize("mode", MODES)
def test_graphs_give_the_tokens_of_eager_rounds(mode, dtype, kv_dtype, params, gpu_pair, make_engine, random_prompts):
    prompts, options = random_prompts(PROMPTS), MODES[mode] | {"batch_size": 3, "kv_dtype": kv_dtype}
    eager, graphs = (make_engine(gpu_pair(dtype), eager=eager, **options) for eager in (True, False))
    assert not eager._engine.captures and graphs._engine.captures
    wanted, found = (engine.generate(prompts, params) for engine in (eager, graphs))
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert (one.statistics.accepted_at, one.statistics.bytes_read) == (
            other.statistics.accepted_at,
            other.statistics.bytes_read,
        )


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("score_keys", ["4bit", "2bit"])
def test_keys_in_few_bits(score_keys, kv_dtype, gpu_pair, make_engine, random_prompts):
    """Graphs give the tokens of eager rounds, a run repeats itself, and all that is kept is dense."""
    prompts, params = random_prompts([400, 77, 340, 33, 190]), SamplingParams(max_new_tokens=90)
    options = {"score_keys": score_keys, "kv_dtype": kv_dtype, "min_context": 100, "draft_recent": 4, "batch_size": 3}
    eager, graphs, whole = (
        make_engine(gpu_pair("bfloat16"), eager=eager, mode="sparse", keep=keep, draft_keep=keep, **options)
        for eager, keep in ((True, 0.2), (False, 0.2), (False, 1.0))
    )
    assert graphs._engine.captures
    wanted = [result.token_ids for result in eager.generate(prompts, params)]
    for _ in range(2):
        assert [result.token_ids for result in graphs.generate(prompts, params)] == wanted
    dense = make_engine(gpu_pair("bfloat16"), mode="dense", drafting="dense", kv_dtype=kv_dtype, batch_size=3)
    found, exact = (engine.generate(prompts, params) for engine in (whole, dense))
    pairs = [(x.token_ids, y.token_ids) for x, y in zip(found, exact, strict=True)]
    same = [one == other for tokens in pairs for one, other in zip(*tokens, strict=True)]
    assert sum(same) > 0.5 * len(same)  # sums in another order: a text of these undecided models parts sooner or later


def test_few_bits_are_the_default_where_a_kernel_reads_them(gpu_pair, make_engine):
    bits = {dtype: make_engine(gpu_pair(dtype), mode="sparse").score_bits for dtype in ("bfloat16", "float32")}
    assert bits == {"bfloat16": 4, "float32": None}
    for options in ({"backend": "reference"}, {"draft_tokens": 40}, {"score_keys": "exact"}):
        assert make_engine(gpu_pair("bfloat16"), mode="sparse", **options).score_bits is None


def test_keys_in_few_bits_need_kernels(gpu_pair, make_engine):
    for options, message in (({"dtype": "float32"}, "bfloat16 or float16"), ({"draft_tokens": 40}, "queries per KV head")):
        with pytest.raises(OptionError, match=rf"score-keys: got '4bit'.*{message}"):
            dtype = options.pop("dtype", "bfloat16")
            make_engine(gpu_pair(dtype), mode="sparse", score_keys="4bit", **options)


@pytest.mark.parametrize("unlisted", ["none", "mean"])
def test_a_row_of_a_batch_equals_the_row_alone(unlisted, gpu_pair, make_engine, random_prompts):
    """Law 7, in graphs."""
    options = {"mode": "sparse", "keep": 0.2, "unlisted": unlisted, "batch_size": 5}
    prompts, engine = random_prompts(PROMPTS), make_engine(gpu_pair("float32"), **options)
    together = engine.generate(prompts, SAMPLED)
    for prompt, params, result in zip(prompts, SAMPLED, together, strict=True):
        [alone] = engine.generate([prompt], params)
        assert alone.token_ids == result.token_ids


def test_a_second_run_finds_its_graphs(gpu_pair, make_engine, random_prompts):
    """Caches and graphs stay for the next run that fits, and are given back when asked to."""
    engine = make_engine(gpu_pair("float32"), mode="sparse", keep=0.2, batch_size=3)
    first = engine.generate(random_prompts(PROMPTS), GREEDY)
    runner, before = engine._engine._idle, torch.cuda.memory_allocated()
    kinds = len(runner.stages._variants)
    again = engine.generate(random_prompts(PROMPTS), GREEDY)
    assert [result.token_ids for result in again] == [result.token_ids for result in first]
    assert engine._engine._idle is runner and len(runner.stages._variants) == kinds
    assert torch.cuda.memory_allocated() == before
    engine.generate(random_prompts([400]), GREEDY)
    assert engine._engine._idle is not runner, "a longer prompt needs a larger cache"
    del runner
    engine.release()
    assert torch.cuda.memory_allocated() < before


def test_what_waits_for_the_device_is_not_captured(gpu_pair, make_engine, random_prompts):
    for options in ({"method": "specattn", "mode": "sparse"}, {"backend": "reference"}, {"draft_tokens": 17}):
        engine = make_engine(gpu_pair("float32"), **options)
        assert not engine._engine.captures
        assert len(engine.generate(random_prompts([60]), GREEDY)[0].token_ids) == 40
