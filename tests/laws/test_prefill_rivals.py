"""The laws of methods that read a prompt whole, on models: everything kept is dense, what is left out is not read, and what
follows is read at its place in the text."""

from __future__ import annotations

import pytest
import torch

from outrider.config import PREFILL_METHODS, Budget, EngineConfig
from outrider.decoding import prefill_rivals
from outrider.decoding.prefill_rivals import READERS
from outrider.decoding.prompt_reader import make_prompt_reader
from outrider.decoding.sparse_prefill import PREFILL_METHOD, Kept
from outrider.errors import OptionError
from outrider.guidance.prefill_rivals import token_sparse, vertical_slash
from outrider.models.drift import hidden_drift

METHODS = tuple(READERS)
LENGTH = 203
CONFIG = EngineConfig(prefill_block=16, prefill_chunk=64, prefill_min_context=0)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def caches(pair, reader, room=20):
    models = pair if reader.drafts else pair[:1]
    return [(model, model.new_cache(1, LENGTH + room + reader.ahead)) for model in models]


def read(pair, method, prompt, keep, behind=(), config=CONFIG):
    """Logits [T, V] of the prompt, or of its end, and of tokens `behind` it; the rows, and the share that was kept."""
    reader = make_prompt_reader(method, *pair, config, keep)
    rows, tokens = caches(pair, reader), torch.tensor([prompt])
    logits, lists = reader.read(rows, tokens, len(prompt), logits=True)
    kept = Kept()
    kept.add(lists, 0, len(prompt))
    if behind:
        place = torch.arange(len(prompt), len(prompt) + len(behind))[None]
        stop = len(prompt) + len(behind)
        target, cache = rows[0]
        logits = torch.cat([logits, target.forward(torch.tensor([behind]), cache, stop=stop, positions=place).logits], 1)
    return logits[0], rows, kept.fraction


def densely(model, tokens):
    return model.forward(torch.tensor([tokens]), model.new_cache(1, len(tokens))).logits[0]


@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen3", "gemma3"])
@pytest.mark.parametrize("draft", ["noisy", "other"])
def test_law_1_keeping_everything_is_dense(family, draft, method, make_pair, random_prompts):
    pair, [prompt, behind] = make_pair(family, draft), random_prompts([LENGTH, 9])
    found, _, kept = read(pair, method, prompt, 1.0, behind)
    torch.testing.assert_close(found, densely(pair[0], prompt + behind)[-len(found) :], rtol=1e-4, atol=1e-4)
    assert kept == 1 and len(found) == (10 if method == "spec-prefill" else LENGTH + 9)


def test_little_kept_is_not_dense(method, make_pair, random_prompts):
    pair, [prompt, behind] = make_pair("llama"), random_prompts([LENGTH, 9])
    found, _, kept = read(pair, method, prompt, 0.4, behind)
    assert found.isfinite().all() and not torch.allclose(found, densely(pair[0], prompt + behind)[-len(found) :], atol=0.1)
    wanted = {
        "token-sparse": (LENGTH + 2 * 128) / (3 * LENGTH),  # two layers of three keep the last 128 tokens
        "spec-prefill": (2 * 32 + LENGTH % 32) / LENGTH,  # three chunks of seven, the last one among them
        "vertical-slash": 0.4,
    }
    assert kept == pytest.approx(wanted[method], abs=0.02 if method == "vertical-slash" else 1e-9)


def test_a_few_predictions_are_the_last_ones(method, make_pair, random_prompts):
    pair, [prompt] = make_pair("llama"), random_prompts([LENGTH])
    reader = make_prompt_reader(method, *pair, CONFIG, 0.4)
    rows = caches(pair, reader)
    found = {}
    for last in (None, 5, 1):
        for _, cache in rows:
            cache.truncate(0)
        found[last] = reader.read(rows, torch.tensor([prompt]), LENGTH, logits=True, last=last)[0]
    for last in (5, 1):
        torch.testing.assert_close(found[last], found[None][:, -last:])
    for _, cache in rows:
        cache.truncate(0)
    assert reader.read(rows, torch.tensor([prompt]), LENGTH)[0].shape == (1, 0, pair[0].spec.vocabulary)


def test_law_8_dropped_tokens_are_not_read(monkeypatch, make_pair, random_prompts, independent):
    """spec-prefill: other tokens in place of those that the draft drops change nothing, here and behind the prompt; kept ones
    stand where they stood."""
    pair, [prompt, other, behind] = make_pair("qwen3"), random_prompts([LENGTH, LENGTH, 9])
    kept = torch.tensor([[*range(32, 64), *range(128, 160), *range(192, LENGTH)]])
    monkeypatch.setattr(prefill_rivals, "kept_chunks", lambda importance, keep: kept)
    found, rows, share = read(pair, "spec-prefill", prompt, 0.4, behind)
    mixed = [token if place in kept[0].tolist() else other[place] for place, token in enumerate(prompt)]
    assert torch.equal(read(pair, "spec-prefill", mixed, 0.4, behind)[0], found)
    assert share == pytest.approx(kept.shape[1] / LENGTH)
    assert int(rows[0][1].lengths) == kept.shape[1] and int(rows[1][1].lengths) == LENGTH
    # transformers' own attention, given the same tokens at the same positions
    place = torch.cat([kept, torch.arange(LENGTH, LENGTH + 9)[None]], 1)
    mask = torch.full((place.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.inference_mode():
        tokens = torch.tensor([prompt + behind])[:, place[0]]
        wanted = independent(pair[0])(input_ids=tokens, position_ids=place, attention_mask=mask, use_cache=False).logits[0]
    torch.testing.assert_close(found, wanted[-10:], rtol=1e-4, atol=1e-4)


def test_the_draft_writes_and_looks_as_it_would_alone(monkeypatch, make_pair, random_prompts, alone, independent):
    """spec-prefill's lookahead: eight tokens, greedily, and the softmax masses of their queries over the prompt."""
    pair, [prompt] = make_pair("llama"), random_prompts([LENGTH])
    seen, inner = [], prefill_rivals.token_importance

    def importance(masses):
        seen.extend(masses)
        return inner(seen)

    monkeypatch.setattr(prefill_rivals, "token_importance", importance)
    read(pair, "spec-prefill", prompt, 0.4)
    tokens = torch.tensor([prompt + alone(pair[1], prompt, 8)])
    with torch.inference_mode():
        wanted = independent(pair[1])(input_ids=tokens, use_cache=False, output_attentions=True).attentions
    assert len(seen) == len(wanted) == 3
    for mass, probabilities in zip(seen, wanted, strict=True):
        torch.testing.assert_close(mass, probabilities[:, :, LENGTH:, :LENGTH].transpose(1, 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method, module, name", [("token-sparse", token_sparse, "best_tokens"), ("vertical-slash", vertical_slash, "choose")]
)
def test_causality(method, module, name, make_pair, random_prompts, monkeypatch):
    """These choose by the prompt's last queries; the choice being given, later tokens change nothing before them."""
    pair, [prompt, other] = make_pair("llama"), random_prompts([LENGTH, LENGTH], seed=3)
    changed = prompt[:150] + other[150:]
    reader = make_prompt_reader(method, *pair, CONFIG, 0.7)
    rows, inner, choices = caches(pair, reader), getattr(module, name), []

    def remember(*given, **options):
        choices.append(inner(*given, **options))
        return choices[-1]

    monkeypatch.setattr(module, name, remember)
    first = reader.read(rows, torch.tensor([prompt]), LENGTH, logits=True)[0]
    rows[0][1].truncate(0)
    assert len(choices) >= 2
    monkeypatch.setattr(module, name, lambda *given, **options: choices.pop(0))
    second = reader.read(rows, torch.tensor([changed]), LENGTH, logits=True)[0]
    assert not choices
    torch.testing.assert_close(second[:, :150], first[:, :150], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(second[:, 150:], first[:, 150:])


def test_token_sparse_layers_are_those_of_least_drift(make_pair, random_prompts, independent):
    """The drift is that of transformers' hidden states, whatever the chunks; found on the first prompt and kept."""
    pair, [prompt, other] = make_pair("llama"), random_prompts([LENGTH, LENGTH], seed=1)
    target = pair[0]
    cache, tokens = target.new_cache(1, LENGTH), torch.tensor([prompt])
    found = hidden_drift(target, cache, tokens, 50)
    torch.testing.assert_close(hidden_drift(target, cache, tokens, LENGTH), found)
    assert int(cache.lengths) == 0
    states = []
    module = independent(target)
    hooks = [
        layer.register_forward_hook(lambda _, given, out: states.append((given[0], out)))
        for layer in module.get_decoder().layers
    ]
    with torch.inference_mode():
        module(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    wanted = torch.stack([((after - before).norm(dim=-1) / before.norm(dim=-1)).mean() for before, after in states])
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5)
    reader = make_prompt_reader("token-sparse", *pair, CONFIG, 0.4)
    assert reader.layers is None
    for one in (prompt, other):
        rows = caches(pair, reader)
        reader.read(rows, torch.tensor([one]), LENGTH)
        assert reader.layers == tuple(sorted(wanted.argsort()[:2].tolist()))


def test_what_cannot_be_is_refused(method, make_pair, random_prompts):
    pair, [prompt] = make_pair("llama"), random_prompts([LENGTH])
    with pytest.raises(OptionError, match=r"keep: got 0; allowed: a number in \(0, 1\]"):
        make_prompt_reader(method, *pair, CONFIG, 0)
    with pytest.raises(OptionError, match="method: got 'quest'; allowed: outrider, token-sparse, vertical-slash, spec-prefill"):
        make_prompt_reader("quest", *pair, CONFIG, 0.1)
    windowed = make_pair("mistral-window", "same")
    with pytest.raises(OptionError, match="model: got 'tiny-mistral-window'; allowed: one with layers of full attention"):
        make_prompt_reader(method, *windowed, CONFIG, 0.1)
    reader = make_prompt_reader(method, *pair, CONFIG, 0.5)
    rows = caches(pair, reader)
    with pytest.raises(OptionError, match="prefill-chunk: got 64; allowed: the whole prompt at once, 128 tokens"):
        reader.read(rows, torch.tensor([prompt[:64]]), 128)
    with pytest.raises(OptionError, match="allocation: got 'fitted'; allowed: flat or auto with method"):
        make_prompt_reader(method, *pair, EngineConfig(budget=Budget(allocation="fitted")), 0.5)


def test_law_1_of_a_cache_in_8_bits(method, make_pair, random_prompts):
    pair, [prompt] = make_pair("llama"), random_prompts([LENGTH])
    pair = tuple(model.with_kv_dtype("fp8") for model in pair)
    found, _, _ = read(pair, method, prompt, 1.0)
    torch.testing.assert_close(found, densely(pair[0], prompt)[-len(found) :], rtol=1e-4, atol=1e-4)


def test_every_name_has_a_reader():
    assert (PREFILL_METHOD, *READERS) == PREFILL_METHODS
