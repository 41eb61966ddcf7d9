"""The laws of mode exact: what a dense forward has confirmed is the dense target's, whatever the sparse rounds before it made.

Little is kept, alignments are random, so rounds differ from the dense target often, and rejections are counted: a test in which
nothing is rolled back would prove nothing.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding.confirmation import tail
from outrider.decoding.noise import Noise, key_of
from outrider.decoding.prefill import prefill
from outrider.decoding.runner import Runner
from outrider.decoding.sampling import Sampling, distributions
from outrider.decoding.statistics import ReadCounter, total
from outrider.models import LanguageModel

COUNT = 24
STARVED = {"mode": "exact", "keep": 0.005, "sinks": 0, "recent": 0}  # one listed token, or two


def tokens(results):
    return [result.token_ids for result in results]


def check_counts(results):
    """Every tentative token was either confirmed or rolled back, and each confirmation emitted one token more."""
    for result in results:
        statistics = result.statistics
        assert statistics.tentative == statistics.confirmed + statistics.rolled_back
        assert statistics.confirmations <= statistics.generated_tokens
        assert statistics.generated_tokens == len(result.token_ids)
    return total([result.statistics for result in results])


@pytest.mark.parametrize("k", [1, 4])
def test_law_2_all_kept_all_drafted_tokens_are_confirmed(family, k, make_pair, generate, random_prompts):
    pair = make_pair(family, "same")
    if not pair[0].spec.full_layers:
        pytest.skip("no layer with full attention, so no lists")
    results = generate(pair, random_prompts([19, 33]), SamplingParams(max_new_tokens=COUNT), mode="exact", keep=1.0,
                       drafting="dense", draft_tokens=k, exact_every=7)  # fmt: skip
    counted = check_counts(results)
    assert counted.accepted == counted.drafted
    assert counted.rolled_back == 0


def test_law_3_equals_generate_of_the_target_alone(family, make_pair, generate, alone, random_prompts):
    pair, prompts = make_pair(family), random_prompts([21, 1, 34], seed=1)
    if not pair[0].spec.full_layers:
        pytest.skip("no layer with full attention, so no lists")
    results = generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), exact_every=4, batch_size=2, **STARVED)
    assert tokens(results) == [alone(pair[0], prompt, COUNT) for prompt in prompts]
    assert check_counts(results).rolled_back > 0


@pytest.mark.parametrize("every", [1, 5, 64, None])
def test_law_3_however_many_tokens_are_confirmed_at_a_time(every, make_pair, generate, alone, random_prompts):
    """By a draft of noise."""
    pair, prompts = make_pair("llama", "other"), random_prompts([21, 1, 34], seed=2)
    results = generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), exact_every=every, **STARVED)
    assert tokens(results) == [alone(pair[0], prompt, COUNT) for prompt in prompts]
    assert check_counts(results).rolled_back > COUNT


@pytest.mark.parametrize("method", ["sts", "specattn", "dustin", "h2o", "quest", "snapkv"])
def test_law_3_whoever_makes_the_lists(method, make_pair, generate, alone, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts([40, 25])
    results = generate(pair, prompts, SamplingParams(max_new_tokens=16), method=method, exact_every=5, **STARVED)
    assert tokens(results) == [alone(pair[0], prompt, 16) for prompt in prompts]
    check_counts(results)


@pytest.mark.parametrize("options", [{"unlisted": "mean"}, {"drafting": "dense"}, {"kv_dtype": "fp8"}, {"draft_tokens": 17}],
                         ids=lambda options: next(iter(options)))  # fmt: skip
def test_law_3_whatever_the_options(options, make_pair, generate, random_prompts):
    pair, prompts = make_pair("qwen3"), random_prompts([40])
    params, shared = SamplingParams(max_new_tokens=COUNT), {"kv_dtype": options.get("kv_dtype", "auto")}
    dense = generate(pair, prompts, params, mode="dense", **shared)
    assert tokens(generate(pair, prompts, params, exact_every=3, **(STARVED | options))) == tokens(dense)


def test_law_3_builtin_pair(builtin_pair, make_engine, alone, book):
    target = builtin_pair[0]
    text = target.tokenizer(book, verbose=False)["input_ids"]
    prompts = [text[1000:1300], text[5000:5201], text[9000:9450]]
    engine = make_engine(builtin_pair, mode="exact", keep=0.1, recent=16, min_context=64, batch_size=2, draft_tokens=4)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=40))
    assert tokens(results) == [alone(target, prompt, 40) for prompt in prompts]
    counted = check_counts(results)
    assert counted.rolled_back > 0 and counted.confirmed + counted.drafted_on > 2 * counted.confirmations
    assert counted.drafted_on > 0


@pytest.mark.parametrize("every", [1, 4, None])
def test_what_is_cached_is_what_the_dense_target_would_have_written(every, make_pair, make_engine, random_prompts, monkeypatch):
    """KV rows of confirmed tokens, in every layer, against a dense prefill of the same text."""
    target, draft = make_pair("gemma3")
    engine = make_engine((target, draft), exact_every=every, **STARVED)
    made = []
    new_cache = LanguageModel.new_cache

    def spy(model, *shape):
        made.append((model.module, new_cache(model, *shape)))
        return made[-1][1]

    monkeypatch.setattr(LanguageModel, "new_cache", spy)
    [prompt] = random_prompts([30])
    sequences = engine._sequences([prompt], SamplingParams(max_new_tokens=COUNT))
    checked = 0
    for event in engine._engine.run(sequences):
        [cache] = [cache for module, cache in made if module is target.module]
        if event.sequence.finish_reason is None:
            length = int(cache.lengths[0])
            text = (prompt + event.sequence.tokens)[:-1]
            assert len(text) == length, "confirmed tokens alone, all but the pending one"
            wanted = new_cache(target, 1, length)
            prefill(target, wanted, torch.tensor([text]), 64)
            for layer in range(len(target.spec.layers)):
                for found, own in ((cache.keys, wanted.keys), (cache.values, wanted.values)):
                    torch.testing.assert_close(found(layer, length)[:1], own(layer), rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked >= 3 and sequences[0].statistics.rolled_back > 0


@pytest.fixture(scope="module")
def drawn(independent):
    """`drawn(target, prompt, params)`: the text that transformers' own model draws by the noise of that seed."""

    @torch.inference_mode()
    def run(target, prompt, params):
        text, key = list(prompt), torch.tensor([key_of(params.seed)])
        for position in range(len(prompt), len(prompt) + params.max_new_tokens):
            logits = independent(target)(input_ids=torch.tensor([text])).logits[:, -1:]
            noise = Noise(keys=key, first=torch.tensor([position]))
            text.append(int(noise.choose(distributions(logits, Sampling.of([params])))))
        return text[len(prompt) :]

    return run


SETTINGS = [{"temperature": 0.8}, {"temperature": 1.1, "top_p": 0.7, "top_k": 12}, {"temperature": 5.0}]


@pytest.mark.parametrize("family, setting", [*(("llama", setting) for setting in SETTINGS), ("gemma3", SETTINGS[1])], ids=str)
def test_law_4_the_text_is_what_the_target_alone_draws(family, setting, make_pair, generate, drawn, random_prompts):
    """Whatever is kept, drafted, and confirmed at a time: the same noise, the same text."""
    pair, prompts = make_pair(family), random_prompts([21, 1, 34], seed=3)
    params = [SamplingParams(max_new_tokens=COUNT, seed=seed, **setting) for seed in range(3)]
    wanted = [drawn(pair[0], prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    assert len({token for text in wanted for token in text}) > COUNT
    for options in ({"exact_every": 1}, {"exact_every": 5, "keep": 0.3, "draft_tokens": 1}, {"min_context": 30}):
        results = generate(pair, prompts, params, batch_size=2, **(STARVED | options))
        assert tokens(results) == wanted
        assert check_counts(results).rolled_back > 0


LENGTHS = [23, 1, 40, 2, 31, 11]  # more than slots; some below the shortest context of a sparse round (8)


def check_rows(engine, prompts, params):
    """Law 7: every prompt alone, and all of them together, give the same results.

    When a row is confirmed its neighbours have a say in, since all share a forward; in its text they have none.
    """
    together = engine.generate(prompts, params)
    for prompt, own, result in zip(prompts, params, together, strict=True):
        [single] = engine.generate([prompt], [own])
        assert (result.token_ids, result.text, result.finish_reason) == (single.token_ids, single.text, single.finish_reason)
    check_counts(together)
    return together


def params_for(lengths):
    """Greedy, sampled and filtered rows side by side."""
    settings = [{}, *SETTINGS]
    return [SamplingParams(max_new_tokens=3 + 7 * i % 26, seed=100 + i, **settings[i % 3]) for i in range(len(lengths))]


@pytest.mark.parametrize("every, batch_size", [(1, 3), (5, 2), (None, 8)])
def test_law_7_a_row_of_a_batch_equals_the_row_alone(every, batch_size, make_pair, make_engine, random_prompts):
    engine = make_engine(make_pair("qwen2"), mode="exact", exact_every=every, batch_size=batch_size, prefill_chunk=9)
    together = check_rows(engine, random_prompts(LENGTHS), params_for(LENGTHS))
    assert sum(result.statistics.rolled_back for result in together) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_law_7_rows_that_end_for_different_reasons(temperature, make_pair, make_engine, random_prompts, byte_tokenizer):
    """Tentative tokens that would end a row do so where they are confirmed; nothing behind them is emitted."""
    target, draft = make_pair("qwen3", vocab_size=257, tokenizer=byte_tokenizer)
    prompts = random_prompts([23, 31, 40, 11], vocabulary=256)
    options = {"mode": "exact", "exact_every": 6}
    sampled = [SamplingParams(max_new_tokens=16, temperature=temperature, seed=i) for i in range(4)]
    plain = make_engine((target, draft), **options).generate(prompts, sampled)
    ending = LanguageModel(target.module, byte_tokenizer, replace(target.spec, eos_tokens=(plain[0].token_ids[9],)))
    stops = [(), (plain[1].text[4:6],), (), (plain[3].text[7],)]
    params = [replace(own, max_new_tokens=16 - i, stop=stops[i], ignore_eos=i == 2) for i, own in enumerate(sampled)]
    together = check_rows(make_engine((ending, draft), batch_size=3, **options), prompts, params)
    for result, whole in zip(together, plain, strict=True):
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    assert {result.finish_reason for result in together} == {"eos", "stop", "length"}


def test_law_8_what_a_confirmation_replaces_is_not_read(make_pair, make_engine, random_prompts, monkeypatch):
    """NaN in all that sparse rounds have written of the target's keys and values: the dense forward writes it anew."""
    engine = make_engine(make_pair("llama"), exact_every=4, **STARVED)
    prompts, params = random_prompts([40, 23]), SamplingParams(max_new_tokens=COUNT)
    wanted = engine.generate(prompts, params)
    confirm, poisoned = Runner.confirm, []

    def poison(self, running, kind, under_way):
        cache = self.caches[0]
        for row, sequence in enumerate(running):
            behind = slice(sequence.cached - len(sequence.tentative), None)
            for layer in range(len(cache.layers)):
                cache.keys(layer)[row, behind] = cache.values(layer)[row, behind] = torch.nan
            poisoned.append(len(sequence.tentative))
        return confirm(self, running, kind, under_way)

    monkeypatch.setattr(Runner, "confirm", poison)
    assert tokens(engine.generate(prompts, params)) == tokens(wanted)
    assert sum(poisoned) > 2 * COUNT


def test_law_8_a_run_reports_what_it_has_read(make_pair, make_engine, random_prompts, monkeypatch):
    """Rounds as in mode sparse, and every row of the cache once for each confirmation, drafted tokens among them."""
    engine = make_engine(make_pair("llama"), mode="exact", exact_every=6)
    read, confirm = [], Runner.confirm

    def spy(self, running, kind, under_way):
        # C cached ones and n + 1 + t of its own
        read.append(sum(sequence.cached + 1 + tail(engine.config.draft_tokens) for sequence in running))
        return confirm(self, running, kind, under_way)

    monkeypatch.setattr(Runner, "confirm", spy)
    [result] = engine.generate(random_prompts([40]), SamplingParams(max_new_tokens=COUNT))
    statistics, target = result.statistics, engine.target.spec
    row = sum(2 * layer.kv_heads * layer.head_dim * 4 for layer in target.layers)
    monkeypatch.setattr(ReadCounter, "dense", lambda *given: 0)
    [rounds] = engine.generate(random_prompts([40]), SamplingParams(max_new_tokens=COUNT))
    read = read[: statistics.confirmations]
    assert statistics.bytes_read - rounds.statistics.bytes_read == sum(read) * row
    assert statistics.bytes_dense == rounds.statistics.bytes_dense
