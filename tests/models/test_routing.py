"""Attention goes through Outrider, or the checkpoint is refused by name and reason; it is never dense in silence."""

from __future__ import annotations

import copy

import pytest
import torch

from outrider.errors import ModelError
from outrider.models import load_model, wrap

MOE = {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = [
    pytest.param("Gemma2Config", {"head_dim": 16}, "gemma2.*softcap", id="softcap"),
    pytest.param("GptOssConfig", MOE, "gpt_oss.*s_aux", id="attention sinks"),
    pytest.param("BloomConfig", {}, r"bloom.*layers \[0, 1, 2\] did not call", id="own attention"),
    pytest.param("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "mpt", id="own attention that fails"),
    pytest.param("MambaConfig", {"num_hidden_layers": 2}, "layer types .*linear_attention", id="no attention"),
    pytest.param("Gemma3TextConfig", {"use_bidirectional_attention": True}, "not causal", id="bidirectional"),
]


@pytest.mark.parametrize("config, options, reason", REFUSED)
def test_unroutable_checkpoints_are_refused(config, options, reason, make_module):
    module = make_module(config, **options)
    with pytest.raises(ModelError, match=f"draft 'the-name'.*{reason}"):
        wrap(module, None, name="the-name", role="draft")


@pytest.mark.parametrize(
    "config, options",
    [("FalconConfig", {}), ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}), ("Gemma2Config", {})],
)
def test_unroutable_checkpoints_are_refused_when_loaded(config, options, make_module, tmp_path):
    """Some fail in transformers already, before our own check: the error is of one kind."""
    import transformers

    made = getattr(transformers, config)(vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **options)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ModelError, match=r"target .*checkpoint'.*: \S+"):
        load_model(str(tmp_path / "checkpoint"), role="target")


def test_a_layer_without_routing_is_named(make_module):
    """One layer that attends on its own is enough to refuse."""
    module = make_module("llama")
    module.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(ModelError, match=r"layers \[1\] did not call the routed attention"):
        wrap(module, None, name="x")


def test_other_attention_than_ours_is_refused(make_module):
    module = copy.deepcopy(make_module("llama"))
    module.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"layers \[0, 1, 2\]"):
        wrap(module, None, name="x")


def test_a_routed_module_cannot_be_called_around_outrider(make_module):
    """Without the forward argument there is no cache and no causality: refused, never guessed."""
    with pytest.raises(ModelError, match="run the model through LanguageModel"):
        make_module("llama")(input_ids=torch.tensor([[1, 2, 3]]))


def test_every_layer_is_seen_as_it_is(family, make_model):
    model = make_model(family)
    config = model.module.config
    assert len(model.spec.layers) == config.num_hidden_layers
    for layer, shape in enumerate(model.spec.layers):
        assert (shape.query_heads, shape.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
        assert shape.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        assert shape.scale == pytest.approx(shape.head_dim**-0.5)
        types = getattr(config, "layer_types", None)
        windowed = types[layer] == "sliding_attention" if types else bool(getattr(config, "sliding_window", None))
        assert shape.window == (8 if windowed else None)


def test_full_layers_of_a_mixed_model(make_model):
    assert make_model("gemma3").spec.full_layers == (1, 3)
    assert make_model("mistral-window").spec.full_layers == ()
