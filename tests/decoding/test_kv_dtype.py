"""Generation over caches in 8 bits: the laws hold among themselves, and the text stays close to that of wide caches."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams, engine_config
from outrider.decoding.outrider import Outrider
from outrider.decoding.prefill import prefill
from outrider.errors import OptionError
from outrider.models import LanguageModel
from outrider.models.quantization import FP8

TOKENS = SamplingParams(max_new_tokens=12)


def tokens_of(results):
    return [result.token_ids for result in results]


def test_dense_rounds_give_the_tokens_of_the_target_alone(make_pair, generate, random_prompts):
    """Law 3, against the target over a cache of 8 bits, token by token."""
    target, draft = make_pair("qwen3", "other")
    prompts = random_prompts([25, 9])
    for prompt, result in zip(prompts, generate((target, draft), prompts, TOKENS, kv_dtype="fp8"), strict=True):
        model = target.with_kv_dtype("fp8")
        cache = model.new_cache(1, 40)
        tokens, wanted = torch.tensor([prompt]), []
        for _ in range(12):
            logits = model.forward(tokens, cache).logits
            cache.advance(tokens.shape[1])
            tokens = logits[:, -1:].argmax(-1)
            wanted.append(int(tokens))
        assert result.token_ids == wanted


def test_a_draft_that_is_the_target_is_always_right(make_pair, generate, random_prompts):
    """Law 2: both caches store the same."""
    [result] = generate(make_pair("llama", "same"), random_prompts([20]), TOKENS, kv_dtype="fp8")
    assert result.statistics.accepted == result.statistics.drafted > 0


def test_with_everything_kept_sparse_is_dense(method, make_pair, generate, random_prompts):
    """Law 1, seen through tokens."""
    pair, prompts = make_pair("llama", "other"), random_prompts([30, 12])
    dense = generate(pair, prompts, TOKENS, kv_dtype="fp8")
    sparse = generate(pair, prompts, TOKENS, kv_dtype="fp8", mode="sparse", method=method, keep=1.0)
    assert tokens_of(sparse) == tokens_of(dense)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_neighbours_change_nothing(mode, make_pair, make_engine, random_prompts):
    """Law 7, with slots refilled; the first prompt of a run must not decide how the others are stored."""
    engine = make_engine(make_pair("qwen2"), mode=mode, kv_dtype="fp8", batch_size=2, prefill_chunk=9)
    prompts = random_prompts([23, 1, 40, 11])
    together = tokens_of(engine.generate(prompts, TOKENS))
    assert together == [tokens_of(engine.generate([prompt], TOKENS))[0] for prompt in prompts]
    assert together == tokens_of(engine.generate(prompts[::-1], TOKENS))[::-1]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_bytes_are_those_of_the_cache(mode, make_pair, generate, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts([30])
    one = SamplingParams(max_new_tokens=1)  # a single round: what is read does not depend on what was written
    wide, narrow = (generate(pair, prompts, one, mode=mode, kv_dtype=kv)[0].statistics for kv in ("auto", "fp8"))
    assert wide.bytes_dense == 4 * narrow.bytes_dense > 0
    assert wide.bytes_read == 4 * narrow.bytes_read > 0


def test_the_option_belongs_to_the_engine(make_pair, make_engine, random_prompts, monkeypatch):
    seen = set()
    made = LanguageModel.new_cache

    def spy(self, batch, capacity):
        cache = made(self, batch, capacity)
        seen.add(cache.keys(0).dtype)
        return cache

    engine = make_engine(make_pair("llama"))
    monkeypatch.setattr(LanguageModel, "new_cache", spy)
    engine.generate(random_prompts([9]), TOKENS)
    assert seen == {torch.float32}
    narrow = engine.with_options(kv_dtype="fp8")
    narrow.generate(random_prompts([9]), TOKENS)
    seen.clear()
    narrow.generate(random_prompts([9]), TOKENS)
    assert seen == {FP8}
    assert engine.target.spec.kv_dtype == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels write 8 bits")
def test_a_kernel_that_cannot_write_8_bits_is_refused_before_any_work(make_pair, make_engine, monkeypatch):
    """The rehearsal has caches of the run's dtype."""
    pytest.importorskip("triton", reason="kernels need triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(OptionError, match=r"backend: got 'triton'; allowed: .*interpreter rounds to float8_e4m3fn wrongly"):
        make_engine(make_pair("llama"), kv_dtype="fp8", backend="triton")
    make_engine(make_pair("llama"), backend="triton")


def test_refused_by_name(make_pair, make_engine):
    for options in ({"kv_dtype": "int8"}, {"kv_dtype": None}):
        with pytest.raises(OptionError, match=r"kv-dtype: got .*; allowed: auto, fp8"):
            make_engine(make_pair("llama"), **options)
        with pytest.raises(OptionError, match=r"kv-dtype: got .*; allowed: auto, fp8"):
            Outrider.load(**options)


@pytest.mark.parametrize("role", [0, 1], ids=["target", "draft"])
def test_the_builtin_pair_predicts_a_novel_almost_as_well(role, builtin_pair, book):
    """Measured on four passages of 1,024 tokens: 94% to 97% of the most probable tokens agree, 0.002 to 0.010 nats are lost."""
    model = builtin_pair[role]
    tokens = torch.tensor(model.tokenizer(book, verbose=False)["input_ids"][9000:10024])
    logits = []
    for one in (model, model.with_kv_dtype("fp8")):
        cache = one.new_cache(1, 1024)
        prefill(one, cache, tokens[None, :512], 256)
        logits.append(one.forward(tokens[None, 512:], cache).logits[0])
    wide, narrow = logits
    assert (wide.argmax(-1) == narrow.argmax(-1)).float().mean() > 0.9
    losses = [torch.nn.functional.cross_entropy(one[:-1], tokens[513:]) for one in logits]
    assert abs(losses[1] - losses[0]) < 0.03
    assert not torch.equal(wide, narrow)


@pytest.mark.parametrize("mode, least", [("dense", 0.9), ("sparse", 0.8)])
def test_the_builtin_pair_writes_what_the_wide_target_would(mode, least, builtin_pair, builtin_alignment, book):
    """Measured: the dense target over a float32 cache also chooses 123 of 128 tokens, 114 of sparse rounds (float32: 109)."""
    target = builtin_pair[0]
    tokens = target.tokenizer(book, verbose=False)["input_ids"]
    prompts = [tokens[500:1100], tokens[9500:9900]]
    config = engine_config(mode=mode, keep=0.2, min_context=256, kv_dtype="fp8")
    results = Outrider(*builtin_pair, config, builtin_alignment).generate(prompts, SamplingParams(max_new_tokens=64))
    agreed = 0
    for prompt, result in zip(prompts, results, strict=True):
        text = torch.tensor([prompt + result.token_ids])
        logits = target.forward(text[:, :-1], target.new_cache(1, text.shape[1])).logits[0, len(prompt) - 1 :]
        agreed += int((logits.argmax(-1) == text[0, len(prompt) :]).sum())
    assert agreed >= least * 128
