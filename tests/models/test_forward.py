"""Forwards over a cache equal transformers' own forward: in odd chunks, past the window, ragged, in every dtype."""

from __future__ import annotations

import pytest
import torch

TOKENS = 45  # five windows of 8
SCHEDULES = {"whole": [45], "odd chunks": [7, 13, 1, 9, 15], "rounds": [11, *[4] * 8, 2], "one by one": [5, *[1] * 40]}


def forwards(model, tokens, schedule):
    """Logits [B, S, V] of `tokens` run in pieces, one after another."""
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + 3)
    parts = []
    for part in tokens.split(schedule, dim=1):
        parts.append(model.forward(part, cache).logits)
        cache.advance(part.shape[1])
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def tokens(random_prompts):
    return torch.tensor(random_prompts([TOKENS, TOKENS]))


@pytest.fixture(scope="module")
def reference(independent, tokens):
    def run(model, dtype=None):
        with torch.inference_mode():
            return independent(model, "eager", dtype)(input_ids=tokens).logits

    return run


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_equals_transformers(family, schedule, make_model, tokens, reference):
    model = make_model(family)
    torch.testing.assert_close(forwards(model, tokens, schedule), reference(model), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_errs_no_more_than_transformers(family, dtype, make_model, tokens, reference):
    """Mean error against the same weights in float64, compared with that of transformers in the same dtype."""
    model = make_model(family, dtype=dtype)
    assert model.spec.dtype == getattr(torch, dtype)
    oracle = reference(model, "float64")
    found = forwards(model, tokens, SCHEDULES["odd chunks"])
    assert found.dtype == model.spec.dtype
    error, allowed = ((x.double() - oracle).abs().mean().item() for x in (found, reference(model)))
    assert error <= 2 * allowed
    assert allowed < 0.1 * oracle.std().item()


def test_the_window_matters(make_model, tokens, independent):
    """Without the window the same weights say something else, so the comparisons above do test it."""
    model = make_model("mistral-window")
    module = independent(model)
    unlimited = forwards(make_model("mistral"), tokens, SCHEDULES["whole"])
    with torch.inference_mode():
        limited = module(input_ids=tokens).logits
    torch.testing.assert_close(limited[:, :8], unlimited[:, :8], rtol=1e-4, atol=2e-4)
    assert (limited[:, 20:] - unlimited[:, 20:]).abs().max() > 0.5


def test_ragged_batch_equals_each_row_alone(family, make_model, random_prompts):
    model = make_model(family)
    prompts = random_prompts([31, 4, 18])
    following = torch.tensor(random_prompts([5, 5, 5], seed=4))
    cache = model.new_cache(3, 40)
    wanted = []
    for row, prompt in enumerate(prompts):
        own = model.new_cache(1, 40)
        for one in (own, cache.rows(row, row + 1)):
            model.forward(torch.tensor([prompt]), one)
            one.advance(len(prompt))
        wanted.append(model.forward(following[row : row + 1], own).logits)
    torch.testing.assert_close(model.forward(following, cache).logits, torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [64, 65, 3], ids=["folded", "unfolded", "few"])
def test_both_forms_of_grouped_attention(t, make_model, random_prompts, independent):
    """A few queries fold their group into its KV head, many do not; both equal transformers."""
    model, tokens = make_model("phi3"), torch.tensor(random_prompts([20 + t, 20 + t]))
    with torch.inference_mode():
        wanted = independent(model)(input_ids=tokens).logits
    torch.testing.assert_close(forwards(model, tokens, [20, t]), wanted, rtol=1e-4, atol=2e-4)


def test_without_logits_the_rest_is_the_same(family, make_model, tokens):
    model = make_model(family)
    caches = [model.new_cache(2, TOKENS) for _ in range(2)]
    whole, rest = (
        model.forward(tokens, cache, record_queries=True, logits=wanted)
        for cache, wanted in zip(caches, (True, False), strict=True)
    )
    assert rest.logits.shape == (2, 0, 97)
    for layer in range(len(model.spec.layers)):
        assert torch.equal(rest.queries[layer], whole.queries[layer])
        assert torch.equal(caches[1].keys(layer), caches[0].keys(layer))


def test_recorded_queries(family, make_model, tokens):
    model = make_model(family)
    cache = model.new_cache(2, TOKENS)
    recorded = model.forward(tokens, cache, record_queries=True)
    assert [tuple(q.shape) for q in recorded.queries] == [(2, TOKENS, x.query_heads, x.head_dim) for x in model.spec.layers]
    plain = model.forward(tokens, cache)
    assert plain.queries == ()
    assert torch.equal(plain.logits, recorded.logits)


def test_a_forward_does_not_advance(make_model, tokens):
    model = make_model("llama")
    cache = model.new_cache(2, TOKENS)
    model.forward(tokens, cache)
    assert cache.lengths.tolist() == [0, 0]


def test_logits_past_the_context_do_not_disturb_those_within(make_module, make_model, random_prompts):
    """Learned positions end at the context; a round that runs past it must not fail there."""
    model = make_model("GPT2Config", n_positions=16, max_position_embeddings=16)
    tokens = torch.tensor(random_prompts([19]))
    cache = model.new_cache(1, 20)
    found = model.forward(tokens, cache).logits[:, :16]
    torch.testing.assert_close(found, model.forward(tokens[:, :16], cache).logits, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_text_at_its_own_places(family, make_model, tokens, independent):
    """Explicit positions: of some tokens, what transformers makes of them there; of all, what it is without."""
    model = make_model(family)
    rows = len(tokens)
    kept = torch.tensor([[0, 1, 4, 5, 6, 20, 21, 40], [2, 3, 5, 8, 13, 21, 34, 44]])
    if model.spec.full_layers == tuple(range(len(model.spec.layers))):  # windows count cached tokens
        cache, found = model.new_cache(rows, 8), []
        for part, places in zip(tokens.gather(1, kept).split(5, 1), kept.split(5, 1), strict=True):
            found.append(model.forward(part, cache, positions=places).logits)
            cache.advance(part.shape[1])
        mask = torch.full((8, 8), torch.finfo(torch.float32).min).triu(1).expand(rows, 1, 8, 8)
        with torch.inference_mode():
            given = {"position_ids": kept, "attention_mask": mask, "use_cache": False}
            wanted = independent(model)(input_ids=tokens.gather(1, kept), **given).logits
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=2e-4)
    places = torch.arange(TOKENS).expand(rows, -1)
    plain, placed = (model.forward(tokens, model.new_cache(rows, TOKENS), positions=x).logits for x in (None, places))
    assert torch.equal(plain, placed)


def test_logits_of_the_last_tokens_alone(family, make_model, tokens):
    model = make_model(family)
    found = model.forward(tokens, model.new_cache(2, TOKENS), last=3)
    every = model.forward(tokens, model.new_cache(2, TOKENS))
    assert found.logits.shape[1] == 3
    torch.testing.assert_close(found.logits, every.logits[:, -3:])
    assert model.forward(tokens, model.new_cache(2, TOKENS), last=3, logits=False).logits.shape[1] == 0
