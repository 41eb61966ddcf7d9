"""Law 4: sampled tokens follow the distribution of the target as run, whatever the draft: many draws through the engine.

Chi-square tests of the joint distribution of the first two emitted tokens against probabilities computed apart from the
engine's loop, one forward a case. Seeds are fixed. A test that would accept anything is worthless, so each must also reject a
distribution that is nearly right (of another temperature, or of the dense target).
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding.drafting import propose
from outrider.decoding.outrider import Outrider
from outrider.decoding.prefill import prefill
from outrider.decoding.sampling import Sampling, distributions
from outrider.decoding.scoring import score
from outrider.types import Selection

V = 12
DRAWS = 3000
SETTINGS = {
    "temperature 1": {"temperature": 1.0},
    "temperature 2": {"temperature": 2.0},
    "top-k 5": {"temperature": 1.5, "top_k": 5},
    "top-p 0.8": {"temperature": 1.5, "top_p": 0.8},
}
TINY = {"vocab_size": V, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def tiny_pair(make_model, noisy):
    """A target and drafts: a noisy copy, and random noise of another family."""
    target = make_model("llama", 1, head_dim=8, **TINY)
    return {"noisy": (target, noisy(target, 0.3)), "noise": (target, make_model("qwen3", 7, **(TINY | {"head_dim": 16})))}


@pytest.fixture(autouse=True)
def shared_prefill(monkeypatch):
    """All draws continue the same prompt: prefill it once and copy the rows, which is most of the time otherwise."""
    made = {}

    def run(model, cache, tokens, stop):
        key = id(model), str(tokens.tolist())
        if key not in made:
            made[key] = model.new_cache(1, tokens.shape[1])
            prefill(model, made[key], tokens, 64)
        for layer in range(len(model.spec.layers)):
            cache.append(layer, made[key].keys(layer), made[key].values(layer))
        cache.advance(tokens.shape[1])

    monkeypatch.setitem(Outrider.__init__.__kwdefaults__, "read", run)


@pytest.fixture(scope="module")
def draws(make_engine, random_prompts):
    """`draws(pair, prompt, params, count=2, **options)`: counts [V, V] of the last two of so many tokens over many seeds."""

    def run(pair, prompt, params, count=2, draws=DRAWS, **options):
        engine = make_engine(pair, **({"batch_size": 1000, "draft_tokens": 2} | options))
        results = engine.generate([prompt] * draws, [replace(params, max_new_tokens=count, seed=s) for s in range(draws)])
        pairs = torch.tensor([result.token_ids[-2:] for result in results])
        return torch.bincount(pairs[:, 0] * V + pairs[:, 1], minlength=V * V).view(V, V)

    return run


def p_value(counts, probs):
    """Chi-square p-value of counts against probabilities; cells that expect fewer than 5 draws are merged into one.

    Wilson and Hilferty's cube root makes the statistic normal, good to a few per cent of the p-value here.
    """
    counts, expected = counts.flatten().double(), probs.flatten().double() * counts.sum()
    if counts[expected == 0].sum() > 0:
        return 0.0  # a token of probability 0 was emitted
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 1], expected[expected > 1]
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return math.erfc(normal / math.sqrt(2)) / 2


def check(counts, probs, wrong):
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    assert p_value(counts, probs) > 0.001
    assert p_value(counts, wrong) < 1e-6, "the test has no power"


def next_token(model, contexts, params, selection=None, prefilled=None):
    """The distribution after each context: the whole context in one forward, or its end over a prefilled cache."""
    tokens = torch.tensor(contexts)
    cache = prefilled or model.new_cache(len(contexts), tokens.shape[1])
    logits = model.forward(tokens, cache, selection=selection).logits[:, -1:]
    return distributions(logits, Sampling.of([params] * len(contexts)))[:, 0]


def joint(model, prompt, params):
    """P(first, second) of the model alone, [V, V]."""
    first = next_token(model, [prompt], params)[0]
    return first[:, None] * next_token(model, [[*prompt, token] for token in range(V)], params)


@pytest.mark.parametrize("setting, draft", [("temperature 1", "noisy"), *((setting, "noise") for setting in SETTINGS)])
def test_dense_follows_the_target_alone(setting, draft, tiny_pair, draws, random_prompts):
    pair, [prompt] = tiny_pair[draft], random_prompts([9], vocabulary=V)
    params = SamplingParams(**SETTINGS[setting])
    other = replace(params, temperature=params.temperature / 2)
    check(draws(pair, prompt, params), joint(pair[0], prompt, params), joint(pair[0], prompt, other))


def fixed_lists(target, length, sinks, recent):
    """The selection of a budget that sinks and recent tokens use up: the same whatever the queries."""
    listed = sorted({*range(sinks), *range(length - recent, length)})
    heads = target.spec.layers[0].kv_heads
    indices = torch.tensor(listed, dtype=torch.int32).expand(1, 1, heads, -1)
    counts = torch.full((1, 1, heads), len(listed), dtype=torch.int32)
    return Selection(layers=(0,), indices=indices, counts=counts, lengths=torch.tensor([length]))


def verified(target, prompt, behind, params, sinks, recent):
    """The target as run: a dense prefill of `prompt` but its last token, then that token and `behind` over the lists."""
    cache = target.new_cache(1, len(prompt) + len(behind))
    prefill(target, cache, torch.tensor([prompt[:-1]]), 64)
    selection = fixed_lists(target, len(prompt) - 1, sinks, recent)
    return next_token(target, [[prompt[-1], *behind]], params, selection, cache)[0]


def sparse_joint(pair, prompt, params, sinks, recent):
    """P(first, second) of the target as run with lists of sinks and recent tokens.

    Where the first token was drafted and accepted, the second is read off the same round, over its lists; where it was
    recovered, a round later, over the lists of then and a cache that sparse verification has written.
    """
    target, draft = pair
    first = verified(target, prompt, [], params, sinks, recent)
    drafted = next_token(draft, [prompt], params)[0]
    accepted = torch.where(first > 0, torch.minimum(first, drafted) / first, 0)
    rows = []
    for token in range(V):
        same_round = verified(target, prompt, [token], params, sinks, recent)
        cache = target.new_cache(1, len(prompt) + 1)
        prefill(target, cache, torch.tensor([prompt[:-1]]), 64)
        target.forward(torch.tensor([prompt[-1:]]), cache, selection=fixed_lists(target, len(prompt) - 1, sinks, recent))
        cache.advance(1)
        later = next_token(target, [[token]], params, fixed_lists(target, len(prompt), sinks, recent), cache)[0]
        rows.append(accepted[token] * same_round + (1 - accepted[token]) * later)
    return first[:, None] * torch.stack(rows)


@pytest.mark.parametrize("setting", ["temperature 1", "top-k 5", "top-p 0.8"])
def test_sparse_follows_the_target_as_run(setting, tiny_pair, draws, random_prompts):
    """With lists that do not depend on the drafted tokens there is one distribution, and it is not the dense one."""
    pair, [prompt] = tiny_pair["noisy"], random_prompts([14], vocabulary=V)
    params = SamplingParams(**SETTINGS[setting])
    counts = draws(pair, prompt, params, mode="sparse", keep=0.01, sinks=1, recent=3, min_context=0)
    check(counts, sparse_joint(pair, prompt, params, 1, 3), joint(pair[0], prompt, params))


def test_sparse_with_lists_that_follow_the_drafted_token(tiny_pair, make_engine, random_prompts):
    """Lists that depend on the drafted token x: a first token y is x accepted under the target run with the lists of x, or
    recovered from what that target's distribution leaves. Summed over x, exactly what the engine must emit."""
    pair, [prompt] = tiny_pair["noisy"], random_prompts([14], vocabulary=V)
    target, draft = pair
    params = SamplingParams(temperature=1.5)
    engine = make_engine(pair, mode="sparse", keep=0.3, sinks=0, recent=0, min_context=0, draft_tokens=1, batch_size=1000)
    results = engine.generate([prompt] * DRAWS, [replace(params, max_new_tokens=1, seed=s) for s in range(DRAWS)])
    counts = torch.bincount(torch.tensor([result.token_ids[0] for result in results]), minlength=V)

    caches = [model.new_cache(V, len(prompt) + 2) for model in pair]
    for model, cache in zip(pair, caches, strict=True):
        prefill(model, cache, torch.tensor([prompt[:-1]] * V), 64)
    lengths, pending = caches[0].lengths.clone(), torch.full((V,), prompt[-1])
    drafted = next_token(draft, [prompt], params)[0]
    middle = (drafted.cumsum(0) - drafted / 2)[:, None]  # the number that draws each token
    trace = propose(draft, caches[1], pending, Sampling.of([params] * V), middle, V)
    assert trace.tokens[:, 0].tolist() == list(range(V))
    selector = engine._engine.guidance.target
    selection = selector.select(score(draft, caches[1], trace.queries, lengths, selector.draft_layers, per_query=False))
    assert len({str(row) for row in selection.indices[0, :, 0].tolist()}) > 1, "the lists do depend on the drafted token"
    logits = target.forward(torch.stack([pending, trace.tokens[:, 0]], dim=1), caches[0], selection=selection).logits
    under = distributions(logits, Sampling.of([params] * V))[:, 0]  # [drafted token, next token]
    accept = (under.diagonal() / drafted).clamp(max=1)
    residual = (under - drafted).clamp(min=0)
    residual /= residual.sum(-1, keepdim=True).clamp(min=1e-9)
    emitted = (drafted * accept).diag().sum(0) + (drafted * (1 - accept)) @ residual
    assert float(emitted.sum()) == pytest.approx(1, abs=1e-5)
    assert p_value(counts, emitted) > 0.001
    assert p_value(counts, next_token(target, [prompt], params)[0]) < 1e-6, "dense would be told apart"


# lists of 30% that depend on the drafted token: a target that sees so little is far from the dense one
FEW = {"keep": 0.3, "sinks": 0, "recent": 0, "min_context": 0}
NOTHING = {"keep": 0.01, "sinks": 1, "recent": 0, "min_context": 0}


def third(model, prompt, params):
    """P(second, third) of the model alone, [V, V], whatever the first."""
    first = next_token(model, [prompt], params)[0]
    pairs = [joint(model, [*prompt, token], params) for token in range(V)]
    return (first[:, None, None] * torch.stack(pairs)).sum(0)


@pytest.mark.parametrize("setting, every, lists", [("temperature 1", 1, FEW), ("top-p 0.8", None, NOTHING)])
def test_exact_follows_the_dense_target(setting, every, lists, tiny_pair, draws, random_prompts):
    """Where the sparse target does not: what it emits under these lists is told apart at once."""
    pair, [prompt] = tiny_pair["noisy"], random_prompts([14], vocabulary=V)
    params = SamplingParams(**SETTINGS[setting])
    wanted, other = (third(pair[0], prompt, replace(params, temperature=t * params.temperature)) for t in (1, 0.5))
    check(draws(pair, prompt, params, 3, mode="exact", exact_every=every, **lists), wanted, other)
    if every == 1:
        assert p_value(draws(pair, prompt, params, 3, mode="sparse", **lists), wanted) < 1e-6
