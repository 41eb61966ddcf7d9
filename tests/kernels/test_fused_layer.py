"""Whole decoder layers on the kernels in CUDA C++: every layer that has a fused form agrees with it, and a round is as near."""

from __future__ import annotations

import pytest
import torch

from outrider.models import wrap

GPU = torch.cuda.is_available()
# with and without biases, norms of heads and windows; the emulated CUDA takes its time
FAMILIES = ["llama", "mistral-window", "qwen2", "qwen3"] if GPU else ["qwen2", "qwen3"]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3 if GPU else 1}  # rows of 16-byte pieces
CACHED = (20, 3)


@pytest.fixture(scope="module", autouse=True)
def cuda(request):
    """On a GPU, or in the emulated CUDA."""
    if not GPU:
        with request.getfixturevalue("emulated")():
            yield
    else:
        yield


def round_of(model, tokens):
    """A round of ragged sequences: what is added to the cache, and logits."""
    cache = model.new_cache(2, max(CACHED) + tokens.shape[1])
    generator = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        for layer, shape in enumerate(model.spec.layers):
            rows = torch.randn(2, 2, max(CACHED), shape.kv_heads, shape.head_dim, generator=generator)
            cache.append(layer, *rows.to(cache.device, model.spec.dtype))
        cache.advance(torch.tensor(CACHED))
    output = model.forward(tokens, cache, record_queries=True)
    return [output.logits, *output.queries]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_fused_and_as_near_as_before(family, make_module, device, margin):
    exact = wrap(make_module(family, dtype="float64", **SHAPE).to(device), None, name="exact")
    module = make_module(family, dtype="float64", **SHAPE).to(device, torch.bfloat16)
    exact.module.load_state_dict(module.state_dict())  # rounded weights
    plain = wrap(module, None, name="plain")
    fused = plain.fuse()
    assert sorted(fused.fused_layers) == list(range(len(plain.spec.layers)))
    tokens = torch.tensor([[5, 9, 60], [17, 2, 33]])
    results = (round_of(model, tokens) for model in (fused, plain, exact))
    for found, rounded, wanted in zip(*results, strict=True):
        margin(found, rounded, wanted)
