"""Layers in six launches: the same numbers as transformers' own, where layers are of that kind and tokens are few."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from outrider.config import SamplingParams
from outrider.errors import OptionError
from outrider.models import compilation, fused_layer, language_model, wrap
from outrider.models.fusion import fuse_projections
from outrider.models.quantization import dequantize
from outrider.types import Selection

FUSED = ["llama", "llama-mha", "mistral", "mistral-window", "qwen2", "qwen3"]
CACHED, T = (20, 3, 11), 2  # tokens of a ragged batch before a round; past the window, and short of it
TIGHT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def fuse(monkeypatch):
    """`fuse(module)`: the model compiled under the backend that has fused layers on a CPU, and the same one uncompiled.

    Without torch.compile, which would only take its time.
    """

    def make(module):
        monkeypatch.setattr(language_model, "compile_layers", lambda module: None)
        plain = wrap(module, None, name="plain", backend="reference")
        return plain.compile(), plain

    return make


@pytest.fixture
def launches(monkeypatch):
    """Counts calls of the two ops of fused layers."""
    calls = []
    for name in ("fused_linear", "rotary_append"):
        run = getattr(fused_layer, name)
        monkeypatch.setattr(fused_layer, name, lambda *a, run=run, name=name, **o: calls.append(name) or run(*a, **o))
    return calls


def filled_cache(model, batch=3):
    """Of ragged prompts, with room for a round."""
    cache = model.new_cache(batch, max(CACHED) + T)
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(3)
        for layer, shape in enumerate(model.spec.layers):
            keys, values = torch.randn(2, batch, max(CACHED), shape.kv_heads, shape.head_dim, generator=generator).to(
                model.spec.dtype
            )
            cache.append(layer, keys, values)
        cache.advance(torch.tensor(CACHED[:batch]))
    return cache


def round_of(model, tokens, selection=None, batch=3):
    """One round behind ragged prompts: (logits, queries, keys and values of the round's tokens)."""
    cache = filled_cache(model, batch)
    output = model.forward(tokens[:batch], cache, selection=selection, record_queries=True)
    stored = [(cache.keys(i), cache.key_scales[i]) for i in range(len(model.spec.layers))]
    stored += [(cache.values(i), cache.value_scales[i]) for i in range(len(model.spec.layers))]
    return [output.logits, *output.queries, *(dequantize(rows, scale, model.spec.dtype) for rows, scale in stored)]


def assert_same_round(fused, plain, tokens, selection=None, **tolerance):
    pairs = zip(round_of(fused, tokens, selection), round_of(plain, tokens, selection), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, **(tolerance or TIGHT))


@pytest.fixture(scope="module")
def tokens(random_prompts):
    return torch.tensor(random_prompts([T] * 3))


@pytest.fixture(scope="module")
def selection():
    """Lists of two of three layers, for each of two KV heads, of other lengths."""
    indices = torch.full((2, 3, 2, 6), -1, dtype=torch.int32)
    counts = torch.randint(1, 4, (2, 3, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        layer, b, head = place
        count = int(counts[layer, b, head])
        indices[layer, b, head, :count] = torch.arange(count) * (CACHED[b] // 3)
    return Selection(layers=(0, 2), indices=indices, counts=counts, lengths=torch.tensor(CACHED))


def test_layers_that_are_fused(family, make_module, fuse, tokens, launches):
    """Of phi3 and gemma3 none: projections, and norms, are others."""
    fused, plain = fuse(make_module(family))
    layers = len(plain.spec.layers) if family in FUSED else 0
    assert sorted(fused.fused_layers) == list(range(layers))
    launches.clear()
    assert_same_round(fused, plain, tokens)
    linear, rotary, _, *behind = ["fused_linear", "rotary_append", "attention", *["fused_linear"] * 3]
    assert launches == [linear, rotary, *behind] * layers


@pytest.mark.parametrize("logits", [True, False])
def test_chunks_of_a_prompt(logits, make_module, fuse, random_prompts, launches):
    """Two chunks of one prompt: logits, queries, denominators, keys and values; the last layer's too, where nothing follows."""
    fused, plain = fuse(make_module("qwen3"))
    prompt = torch.tensor(random_prompts([50]))
    found = []
    for model in (fused, plain):
        cache = model.new_cache(1, 50)
        launches.clear()
        for part in prompt.split(30, dim=1):
            output = model.forward(part, cache, record_queries=True, record_logsumexp=True, logits=logits)
            cache.advance(part.shape[1])
        rows = [rows(layer) for layer in range(3) for rows in (cache.keys, cache.values)]
        found.append([output.logits, *output.queries, *output.logsumexp, *rows])
        assert launches.count("rotary_append") == (6 if model is fused else 0)
    assert len(found[0]) == 1 + 3 + 3 + 6
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)


@pytest.mark.parametrize("family", FUSED)
def test_with_lists(family, make_module, fuse, tokens, selection):
    fused, plain = fuse(make_module(family, num_key_value_heads=2))
    assert_same_round(fused, plain, tokens, selection)
    dense, sparse = (round_of(fused, tokens, lists)[0] for lists in (None, selection))
    assert not torch.allclose(dense, sparse, rtol=1e-2)  # they matter


@pytest.mark.parametrize("fused", [True, False])
def test_forwards_that_share_the_weights(fused, family, make_module, fuse, tokens, selection, launches):
    """Each is what it is alone, behind the same cache, which is left as the last one leaves it."""
    model = fuse(make_module(family, num_key_value_heads=2))[not fused].uncompiled()
    alone, selections = [], (selection, None, selection)
    for own in selections:
        cache = filled_cache(model)
        alone.append(model.forward(tokens, cache, selection=own).logits)
    together = filled_cache(model)
    launches.clear()
    logits = model.forward(tokens.repeat(3, 1), together, selections=selections).logits
    layers = len(model.fused_layers)
    assert (launches.count("rotary_append"), launches.count("fused_linear")) == (3 * layers, 4 * layers)
    torch.testing.assert_close(logits, torch.cat(alone), **TIGHT)
    for layer in range(3):
        for one, other in ((together.keys, cache.keys), (together.values, cache.values)):
            torch.testing.assert_close(one(layer), other(layer), **TIGHT)


@pytest.mark.parametrize(
    "options", [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}, {"tie_word_embeddings": True}]
)
def test_other_llamas(options, make_module, fuse, tokens):
    """Biases everywhere, heads wider than hidden states, an output layer that is the embedding."""
    module = make_module("llama", **options)
    for name, weights in module.named_parameters():
        if name.endswith("bias"):  # made as zeros
            nn.init.normal_(weights, generator=torch.Generator().manual_seed(2))
    fused, plain = fuse(module)
    assert len(fused.fused_layers) == 3
    assert_same_round(fused, plain, tokens)


def test_norms_with_gains(make_module, fuse, tokens):
    module = make_module("qwen3")
    for name, weights in module.named_parameters():
        if "norm" in name:  # made as ones
            nn.init.uniform_(weights, 0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    fused, plain = fuse(module)
    assert len(fused.fused_layers) == 3
    assert_same_round(fused, plain, tokens)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("bfloat16", 5e-2), ("float16", 1e-2)])
def test_other_dtypes(dtype, tolerance, make_module, fuse, tokens):
    fused, plain = fuse(make_module("qwen3", dtype=dtype))
    assert len(fused.fused_layers) == 3
    found, wanted = (round_of(model, tokens)[0] for model in (fused, plain))
    assert found.dtype == wanted.dtype == getattr(torch, dtype)
    assert (found - wanted).double().square().mean().sqrt() <= tolerance * wanted.double().std()


def test_caches_of_8_bits(make_module, fuse, tokens):
    plain = fuse(make_module("llama"))[1].with_kv_dtype("fp8")
    fused = plain.compile()
    assert len(fused.fused_layers) == 3
    assert_same_round(fused, plain, tokens)


LOOKALIKES = [
    pytest.param("GraniteConfig", {"residual_multiplier": 0.5}, [], id="residuals with a factor"),
    pytest.param("GraniteConfig", {"residual_multiplier": 1.0, "attention_multiplier": 0.3}, [0, 1, 2], id="another scale"),
    pytest.param("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}, [0, 2], id="a layer without rotation"),
    pytest.param("LlamaConfig", {"hidden_act": "gelu"}, [], id="another activation"),
    pytest.param("Ministral3Config", {"original": 512}, [0, 1, 2], id="the same everywhere"),
    pytest.param("Ministral3Config", {"original": 128}, [], id="another scale far on"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config, options, layers", LOOKALIKES)
def test_layers_that_look_alike(config, options, layers, make_module, fuse, tokens):
    if "original" in options:
        length = options["original"]
        rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 512 / length, "original_max_position_embeddings": length}
        options = {"rope_parameters": rope | {"llama_4_scaling_beta": 0.5}}
    fused, plain = fuse(make_module(config, **options))
    assert sorted(fused.fused_layers) == layers
    assert_same_round(fused, plain, tokens)


def test_a_layer_with_a_forward_of_its_own(make_module, fuse, tokens):
    """One layer in three was changed; nothing shows it but what it computes."""
    module = make_module("llama")
    layer = module.model.layers[1]
    run = layer.forward
    layer.forward = lambda hidden, **options: run(hidden, **options) + 0.05 * hidden
    fused, plain = fuse(module)
    assert sorted(fused.fused_layers) == [0, 2]
    assert_same_round(fused, plain, tokens)


class Adapted(nn.Linear):
    """As adapters and quantised layers derive from it."""


@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_other_projections_than_plain_ones(name, make_module, fuse):
    module = make_module("llama")
    module.model.layers[1].get_submodule(name).__class__ = Adapted
    assert sorted(fuse(module)[0].fused_layers) == [0, 2]


def test_few_tokens_and_chunks_of_a_compiled_model(make_module, fuse, launches):
    module = make_module("llama")
    unfused = wrap(copy.deepcopy(module), None, name="unfused")
    fuse_projections(unfused.module)
    fused, plain = fuse(module)

    def logits(model, rows, t):
        tokens = torch.arange(rows * t).view(rows, t) % 97
        launches.clear()
        return model.forward(tokens, model.new_cache(rows, t)).logits

    for shape, taken in (((1, 8), True), ((4, 2), True), ((1, 9), False), ((9, 1), False), ((2, 16), False), ((1, 17), True)):
        wanted = logits(unfused, *shape)
        found = logits(fused, *shape)
        assert bool(launches) is taken
        torch.testing.assert_close(found, wanted, **TIGHT)
        assert taken or torch.equal(found, wanted)
        assert torch.equal(logits(plain, *shape), wanted)  # over the same module
        assert not launches


def test_fused_before_compiled(make_module, monkeypatch, launches):
    """As when one engine runs eagerly and the next does not: routes stay, in front of what is compiled since."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    plain = wrap(make_module("llama"), None, name="plain", backend="reference")
    fused = plain.fuse()
    assert not compilation.has_compiled_layers(plain.module)
    both = fused.compile()
    assert compilation.has_compiled_layers(plain.module)
    assert both.compiled and not fused.compiled
    never = [(model.uncompiled(), 12, model is not plain) for model in (both, fused, plain)]
    for model, t, few in ((both, 2, True), (both, 12, False), (fused, 2, True), (fused, 12, False), (plain, 2, False), *never):
        launches.clear()
        tokens = torch.arange(t)[None]
        found = model.forward(tokens, model.new_cache(1, t)).logits
        assert bool(launches) is few
        torch.testing.assert_close(found, plain.forward(tokens, plain.new_cache(1, t)).logits, **TIGHT)
    torch._dynamo.reset()


def test_the_last_layer_stops_at_the_cache(make_module, fuse, tokens, launches):
    """Where no logits are asked for, nobody reads what it adds: keys, values and queries are there all the same."""
    fused, plain = fuse(make_module("qwen3"))
    caches, outputs = [], []
    launches.clear()
    for model in (fused, plain):
        cache = model.new_cache(3, T)
        outputs.append(model.forward(tokens, cache, record_queries=True, logits=False))
        caches.append(cache)
        launches.append("|")
    layers = len(plain.spec.layers)
    assert launches[-2:] == ["|", "|"] and launches.count("rotary_append") == layers
    assert launches.count("fused_linear") == 4 * layers - 3
    assert outputs[0].logits.shape[1] == 0 and len(outputs[0].queries) == layers
    for one, other in zip(outputs[0].queries, outputs[1].queries, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
    for layer in range(layers):
        torch.testing.assert_close(caches[0].keys(layer), caches[1].keys(layer), **TIGHT)
        torch.testing.assert_close(caches[0].values(layer), caches[1].values(layer), **TIGHT)


def test_layers_compiled_again(make_module, fuse, tokens, launches):
    """As when two engines, or target and draft, share a module: nothing is routed twice."""
    fused, plain = fuse(make_module("llama"))
    call = plain.module.model.layers[0]._compiled_call_impl
    again = plain.compile()
    assert plain.module.model.layers[0]._compiled_call_impl is call
    assert fused.compile().fused_layers.keys() == again.fused_layers.keys() == {0, 1, 2}
    launches.clear()
    assert_same_round(again, plain, tokens)
    assert len(launches) == 15


def test_a_copy_has_its_own_weights(make_module, fuse, tokens):
    fused, plain = fuse(make_module("llama"))
    other = copy.deepcopy(plain.module)
    with torch.no_grad():
        for weights in other.parameters():
            weights.mul_(1.5)
    again, alone = fuse(other)
    assert_same_round(again, alone, tokens)
    assert not torch.allclose(round_of(again, tokens)[0], round_of(fused, tokens)[0])


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_backends_without_kernels(backend, make_module, fuse, monkeypatch):
    """On this machine; a model that goes over to such a backend leaves the fused path behind."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fused, plain = fuse(make_module("llama"))
    for model in (plain.with_backend(backend).compile(), fused.with_backend(backend)):
        assert model.compiled
        assert not model.fused_layers


def test_no_room_in_the_cache(make_module, fuse, tokens):
    for model in fuse(make_module("llama")):
        with pytest.raises(OptionError, match="cache capacity: got 1; allowed: at least 2 tokens"):
            model.forward(tokens, model.new_cache(3, 1))


def test_compiled_and_fused(make_module, monkeypatch):
    """The compiler sees layers where more tokens run than the kernels take, and never the fused path."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    torch._dynamo.reset()
    plain = wrap(make_module("llama"), None, name="plain", backend="reference")
    compiled = plain.compile()
    assert not traced  # measuring compiles nothing
    counts = []
    for rows, t in ((2, 4), (1, 40), (20, 4), (2, 4)):
        tokens = torch.arange(rows * t).view(rows, t) % 97
        found, wanted = (model.forward(tokens, model.new_cache(rows, t)).logits for model in (compiled, plain))
        torch.testing.assert_close(found, wanted, **TIGHT)
        counts.append(len(traced))
    few, prefill, many, again = counts
    assert few == prefill == 2  # position encoding and last norm
    assert prefill < many == again
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["plain", "dense", "sparse"])
def test_greedy_text(mode, make_pair, generate, random_prompts, fuse, launches):
    """Target and draft, through the engine."""
    target, draft = (wrap(copy.deepcopy(model.module), None, name=model.spec.name) for model in make_pair("qwen3"))
    prompts, params = random_prompts([30, 9]), SamplingParams(max_new_tokens=24)
    plain = generate((target, draft), prompts, params, mode=mode, backend="reference")
    pair = fuse(target.module)[0], fuse(draft.module)[0]
    assert all(len(model.fused_layers) == 3 for model in pair)
    for made, model in zip(pair, (target, draft), strict=True):
        made.spec = model.spec  # the names by which they are aligned
    launches.clear()
    fused = generate(pair, prompts, params, mode=mode, backend="reference")
    assert "rotary_append" in launches
    assert [result.token_ids for result in fused] == [result.token_ids for result in plain]
