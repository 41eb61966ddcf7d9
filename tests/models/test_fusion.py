"""Projections fused into one matrix: the same numbers, fewer products; and layers compiled around the attention function."""

from __future__ import annotations

import copy

import pytest
import torch

from outrider.models import wrap
from outrider.models.fusion import Part, fuse_projections

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
MATRICES = {"gemma3": 2, "phi3": 0}  # a layer; phi3 has its own fused ones


def logits(model):
    return model.forward(TOKENS, model.new_cache(1, TOKENS.shape[1])).logits


def test_fused_projections_give_the_same_logits(family, make_model, monkeypatch):
    model = make_model(family)
    fused = wrap(copy.deepcopy(model.module), None, name="fused")
    layers = len(model.spec.layers)
    assert fuse_projections(fused.module) == layers * MATRICES.get(family, 2)
    assert fuse_projections(fused.module) == 0  # nothing left to fuse
    torch.testing.assert_close(logits(fused), logits(model), rtol=1e-5, atol=1e-5)


def test_a_common_matrix_is_multiplied_once(make_model, monkeypatch):
    model = wrap(copy.deepcopy(make_model("llama").module), None, name="fused")
    fuse_projections(model.module)
    from outrider.models import fusion

    shapes = []
    real = fusion.linear
    monkeypatch.setattr(fusion, "linear", lambda x, weight, bias: shapes.append(tuple(weight.shape)) or real(x, weight, bias))
    logits(model)
    assert shapes == [(64, 32), (96, 32)] * 3  # (4 + 2 * 2) heads of 8; gate and up of 48


def test_parts_keep_their_weights(make_model):
    module = copy.deepcopy(make_model("qwen2").module)  # with biases
    before = {name: value.clone() for name, value in module.named_parameters()}
    fuse_projections(module)
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    parts = [part for part in module.modules() if isinstance(part, Part)]
    assert len({part.product.weight.data_ptr() for part in parts}) == 6  # views of two matrices a layer


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_compiled_layers_give_the_same_logits(family, make_module, monkeypatch):
    """Traced alone, without generating code: what is compiled together, and how often, is what can go wrong."""
    from outrider.models import compilation

    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    torch._dynamo.reset()
    plain, whole = (wrap(make_module(family), None, name=family) for _ in range(2))
    compiled = whole.compile()
    for t in (8, 1, 8, 1):
        wanted, found = (model.forward(TOKENS[:, :t], model.new_cache(1, 8)).logits for model in (plain, compiled))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    kinds = 2 if family == "gemma3" else 1  # of layers
    # for one and for several tokens: of a layer norm, projections, output, the rest; last norm and position encoding
    assert len(traced) <= 2 * (4 * kinds + 2)
    count = len(traced)
    long = torch.arange(40)[None]
    torch.testing.assert_close(*(m.forward(long, m.new_cache(1, 40)).logits for m in (compiled, plain)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(whole), logits(plain), rtol=1e-5, atol=1e-5)
    assert len(traced) == count  # a prefill, and the model that was not compiled, run as they are
    torch._dynamo.reset()
