"""Mode exact on a GPU: the dense target's own text, in graphs, and its distribution in many draws. make test-gpu."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from outrider import Outrider
from outrider.config import SamplingParams, engine_config
from outrider.decoding.sampling import Sampling, distributions
from outrider.decoding.statistics import total
from outrider.models import wrap

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [201, 77, 140, 33, 90]  # more than slots: rows are refilled and moved while others run
MANY = 400
DRAWS = 100_000
V = 12
TINY = {"vocab_size": V, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def builtin(builtin_pair, builtin_alignment, device):
    """`builtin(dtype, **options)`: an engine over the pair that ships with Outrider, on the GPU."""
    made = {}

    def make(dtype, **options):
        if dtype not in made:
            modules = [copy.deepcopy(model.module).to(device, getattr(torch, dtype)) for model in builtin_pair]
            given = zip(modules, builtin_pair, strict=True)
            made[dtype] = [wrap(module, model.tokenizer, name=model.spec.name) for module, model in given]
        return Outrider(*made[dtype], engine_config(**options), builtin_alignment)

    return make


def same(results, others):
    """How many tokens stand before the first one that differs, and of how many."""
    pairs = [(one.token_ids, other.token_ids) for one, other in zip(results, others, strict=True)]
    firsts = [next((at for at, (x, y) in enumerate(zip(*pair, strict=False)) if x != y), len(pair[0])) for pair in pairs]
    return sum(firsts), sum(len(one) for one, _ in pairs)


@pytest.mark.parametrize("every", [4, 64, None])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_greedy_text_is_that_of_the_dense_target(eager, every, builtin, book):
    dense, exact = (
        builtin("float32", mode=mode, keep=0.05, exact_every=every, batch_size=3, eager=eager) for mode in ("dense", "exact")
    )
    tokens = dense.tokenize(book)
    prompts = [tokens[3000 * i : 3000 * i + n] for i, n in enumerate((4000, 1500, 2500, 1100))]
    params = SamplingParams(max_new_tokens=MANY)
    found, wanted = exact.generate(prompts, params), dense.generate(prompts, params)
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
    counted = total([result.statistics for result in found])
    assert counted.rolled_back > 0 and counted.confirmed > counted.confirmations
    assert counted.kept_fraction < 0.1 and counted.seconds["confirm"] > 0


def test_bfloat16_parts_by_rounding_alone(builtin, book):
    """Dense rounds and dense confirmations add up in another order: undecided tokens may part, most text stands."""
    dense, exact = (builtin("bfloat16", mode=mode, keep=0.1, batch_size=4) for mode in ("dense", "exact"))
    tokens = dense.tokenize(book)
    prompts = [tokens[3000 * i : 3000 * i + 2000] for i in range(4)]
    params = SamplingParams(max_new_tokens=100)
    stands, of = same(exact.generate(prompts, params), dense.generate(prompts, params))
    assert stands > 0.5 * of


@pytest.mark.parametrize("dtype, kv_dtype", [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8")])
def test_graphs_give_the_tokens_of_eager_rounds(dtype, kv_dtype, gpu_pair, make_engine, random_prompts):
    options = {"mode": "exact", "keep": 0.2, "exact_every": 9, "batch_size": 3, "kv_dtype": kv_dtype}
    eager, graphs = (make_engine(gpu_pair(dtype), eager=eager, **options) for eager in (True, False))
    assert graphs._engine.captures
    temperatures = [1.0, 0.0, 0.7, 1.2, 0.9] if dtype == "float32" else [0.0] * 5
    params = [SamplingParams(max_new_tokens=40, temperature=t, seed=i) for i, t in enumerate(temperatures)]
    for _ in range(2):  # again from graphs that are there
        found, wanted = (engine.generate(random_prompts(PROMPTS), params) for engine in (graphs, eager))
        assert [result.token_ids for result in found] == [result.token_ids for result in wanted]


def test_sampled_text_depends_on_its_noise_alone(gpu_pair, make_engine, random_prompts):
    """Whatever is kept, drafted, and confirmed at a time, in any batch: the same seed, the same text."""
    prompts = random_prompts(PROMPTS)
    params = [SamplingParams(max_new_tokens=60, temperature=0.5 + i / 4, top_p=0.95, seed=i) for i in range(5)]
    choices = (
        {"keep": 0.01, "exact_every": 3, "batch_size": 2},
        {"keep": 0.5, "exact_every": 64, "batch_size": 5, "draft_tokens": 5},
        {"min_context": 150, "batch_size": 1},
    )
    one, *others = (make_engine(gpu_pair("float32"), mode="exact", **chosen).generate(prompts, params) for chosen in choices)
    for other in others:
        assert [result.token_ids for result in other] == [result.token_ids for result in one]


def test_a_hundred_thousand_draws_follow_the_dense_target(make_model, noisy, make_engine, random_prompts, device):
    """Chi-square of the first two tokens, under lists of one or two tokens that depend on what was drafted."""
    models = make_model("llama", 1, head_dim=32, **TINY), noisy(make_model("llama", 1, head_dim=32, **TINY), 0.3)
    pair = tuple(wrap(copy.deepcopy(model.module).to(device), None, name=model.spec.name) for model in models)
    [prompt] = random_prompts([14], vocabulary=V)
    params = [SamplingParams(max_new_tokens=2, temperature=1.0, seed=seed) for seed in range(DRAWS)]
    starved = {"keep": 0.1, "sinks": 0, "recent": 0, "min_context": 0, "draft_tokens": 2}
    engine = make_engine(pair, mode="exact", exact_every=2, batch_size=512, eager=True, **starved)
    results = engine.generate([prompt] * DRAWS, params)
    counted = total([result.statistics for result in results])
    assert counted.rolled_back > DRAWS / 10, "the sparse target is another one"
    pairs = torch.tensor([result.token_ids for result in results])
    counts = torch.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V).double()

    def after(texts):
        tokens = torch.tensor(texts)
        logits = pair[0].forward(tokens, pair[0].new_cache(len(texts), 64)).logits[:, -1:]
        return distributions(logits, Sampling.of([params[0]] * len(texts), device))[:, 0].cpu().double()

    expected = (after([prompt]).T * after([[*prompt, token] for token in range(V)])).flatten() * DRAWS
    often = expected >= 5
    counts, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert math.erfc(normal / math.sqrt(2)) / 2 > 0.01
