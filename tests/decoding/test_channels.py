"""Ranking channels: the published weights, of queries and keys that transformers itself makes."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from outrider.decoding.channels import rank_channels
from outrider.decoding.pair import BUILTIN_CONTROLLER, find_channels, find_controller, identity
from outrider.errors import AlignmentError, OptionError, PromptError
from outrider.guidance.channels import save

BLOCKS = [512, 188]  # tokens that meet in one forward


@pytest.fixture(scope="module")
def target(make_model, byte_tokenizer):
    return make_model("llama", vocab_size=257, tokenizer=byte_tokenizer)


def naive_weights(model, tokens: list[int]) -> dict[int, torch.Tensor]:
    """Layer -> sum over tokens and query heads of |q * k|, each token with itself [Hkv, D]."""
    found: dict[int, torch.Tensor] = {}

    def spy(module, query, key, value, attention_mask, **options):
        kv_heads = key.shape[1]
        products = (query.unflatten(1, (kv_heads, -1)) * key[:, :, None]).abs().double()  # [1, Hkv, G, T, D]
        layer = int(module.layer_idx)
        found[layer] = found.get(layer, 0) + products.sum((0, 2, 3))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", lambda *_, **__: None)
    module = copy.deepcopy(model.module)
    module.set_attn_implementation("spy")
    with torch.inference_mode():
        for part in torch.tensor([tokens]).split(BLOCKS, dim=1):
            module(input_ids=part, use_cache=False)
    return found


def test_ranking_is_by_the_mean_product_of_a_token_with_itself(target, book):
    tokens = sum(BLOCKS)
    file = rank_channels(target, book[5000:7000], text_name="book", tokens=tokens)
    assert (file.text, file.tokens, file.target.name) == ("book", tokens, target.spec.name)
    weights = naive_weights(target, target.tokenizer(book[5000:7000])["input_ids"][:tokens])
    shape = target.spec.layers[0]
    assert file.ranking.shape == (len(weights), shape.kv_heads, shape.head_dim)
    for layer, weight in weights.items():
        ordered = weight.gather(-1, file.ranking[layer])
        assert (ordered[:, :-1] >= ordered[:, 1:] * (1 - 1e-5)).all()
        assert (file.ranking[layer].sort(-1).values == torch.arange(shape.head_dim)).all()
    assert len({tuple(head) for layer in file.ranking.tolist() for head in layer}) > 1


def test_layers_with_a_window_are_not_ranked(make_model, byte_tokenizer, book):
    model = make_model("gemma3", vocab_size=257, tokenizer=byte_tokenizer)
    ranking = rank_channels(model, book[:400], text_name="book", tokens=100).ranking
    assert [bool((layer == -1).all()) for layer in ranking] == [shape.window is not None for shape in model.spec.layers]
    assert (ranking[1] >= 0).all()


def test_what_is_refused(target, make_model):
    with pytest.raises(PromptError, match="text short: got 5 tokens; allowed: at least --tokens 100"):
        rank_channels(target, "12345", text_name="short", tokens=100)
    with pytest.raises(OptionError, match="tokens: got 0"):
        rank_channels(target, "12345", text_name="short", tokens=0)
    with pytest.raises(PromptError, match="has no tokenizer"):
        rank_channels(make_model("llama"), "12345", text_name="short", tokens=2)


def test_channels_of_another_target_are_refused(target, make_model, byte_tokenizer, tmp_path):
    file = rank_channels(target, "twelve and three", text_name="short", tokens=9)
    save(file, tmp_path / "channels.json")
    found = find_channels(tmp_path / "channels.json", target)
    assert torch.equal(found.ranking, file.ranking)
    other = make_model("qwen3", vocab_size=257, tokenizer=byte_tokenizer)
    with pytest.raises(AlignmentError, match="made for the target"):
        find_channels(tmp_path / "channels.json", other)
    assert find_channels(None, other) is None


def test_the_built_in_target_brings_its_controller(builtin_pair, make_model):
    found = find_controller(None, builtin_pair[0])
    assert find_controller(BUILTIN_CONTROLLER, builtin_pair[0]).text_digest == found.text_digest
    assert found.target == identity(builtin_pair[0]) and found.controller.embed.weight.shape == (32, 384)
    assert find_controller(None, make_model("llama")) is None


def test_the_built_in_target_brings_its_channels(builtin_pair):
    found = find_channels(None, builtin_pair[0])
    shape = builtin_pair[0].spec.full_shape
    assert found.ranking.shape == (len(builtin_pair[0].spec.layers), shape.kv_heads, shape.head_dim)
    assert (found.ranking >= 0).all()
