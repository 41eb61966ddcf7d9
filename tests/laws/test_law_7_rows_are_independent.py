"""Law 7: a row in a ragged batch equals the same row alone: greedy and sampled, dense and sparse, with slots refilled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.config import SamplingParams
from outrider.models import LanguageModel

LENGTHS = [23, 1, 40, 2, 31, 11, 27]  # more than slots; some below the shortest context of a sparse round (8)
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "top-k": {"temperature": 1.3, "top_k": 12},
    "top-p": {"temperature": 1.1, "top_p": 0.7},
}


def check_rows(engine, prompts, params):
    """Every prompt alone, and all of them together, give the same results."""
    together = engine.generate(prompts, params)
    for prompt, own, result in zip(prompts, params, together, strict=True):
        [single] = engine.generate([prompt], [own])
        assert result.token_ids == single.token_ids
        assert (result.text, result.finish_reason) == (single.text, single.finish_reason)
        ours, theirs = result.statistics, single.statistics
        assert (ours.rounds, ours.drafted, ours.accepted_at) == (theirs.rounds, theirs.drafted, theirs.accepted_at)
        assert ours.kept_fraction == pytest.approx(theirs.kept_fraction)
    return together


def params_for(lengths, **setting):
    return [SamplingParams(max_new_tokens=3 + 5 * i % 17, seed=100 + i, **setting) for i in range(len(lengths))]


@pytest.mark.parametrize("setting", SETTINGS)
def test_dense(setting, make_pair, make_engine, random_prompts):
    engine = make_engine(make_pair("qwen2"), batch_size=3, prefill_chunk=9)
    check_rows(engine, random_prompts(LENGTHS), params_for(LENGTHS, **SETTINGS[setting]))


@pytest.mark.parametrize("setting", ["greedy", "sampled"])
@pytest.mark.parametrize(
    "budget", [{"keep": 0.3}, {"top_p": 0.5}, {"keep": 0.3, "unlisted": "mean"}], ids=["keep", "top_p", "unlisted"]
)
def test_sparse(method, budget, setting, make_pair, make_engine, random_prompts):
    engine = make_engine(make_pair("llama"), mode="sparse", method=method, batch_size=2, **budget)
    together = check_rows(engine, random_prompts(LENGTHS[:5]), params_for(LENGTHS[:5], **SETTINGS[setting]))
    assert min(result.statistics.kept_fraction for result in together) < 0.9


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_every_family(family, mode, make_pair, make_engine, random_prompts):
    pair = make_pair(family, "other")
    if mode == "sparse" and not pair[0].spec.full_layers:
        pytest.skip("no layer with full attention, so no lists")
    lengths = [30, 5, 18]
    engine = make_engine(pair, mode=mode, batch_size=2)
    check_rows(engine, random_prompts(lengths), params_for(lengths))


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_any_number_of_slots(batch_size, make_pair, make_engine, random_prompts):
    pair, prompts = make_pair("mistral"), random_prompts(LENGTHS)
    wanted = make_engine(pair, mode="sparse", batch_size=3).generate(prompts, params_for(LENGTHS))
    found = make_engine(pair, mode="sparse", batch_size=batch_size).generate(prompts, params_for(LENGTHS))
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_rows_that_end_for_different_reasons(mode, make_pair, make_engine, random_prompts, byte_tokenizer):
    target, draft = make_pair("qwen3", vocab_size=257, tokenizer=byte_tokenizer)
    prompts = random_prompts(LENGTHS[:5], vocabulary=256)
    plain = make_engine((target, draft), mode=mode).generate(prompts, SamplingParams(max_new_tokens=16))
    ending = LanguageModel(target.module, byte_tokenizer, replace(target.spec, eos_tokens=(plain[0].token_ids[9],)))
    stops = [(), (), (plain[2].text[4:6],), (), (plain[4].text[7],)]
    params = [SamplingParams(max_new_tokens=16 - i, stop=stop, ignore_eos=i == 3) for i, stop in enumerate(stops)]
    together = check_rows(make_engine((ending, draft), mode=mode, batch_size=3), prompts, params)
    assert {result.finish_reason for result in together} == {"eos", "stop", "length"}


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("setting", ["greedy", "sampled"])
def test_builtin_pair(mode, setting, builtin_pair, make_engine, book):
    tokens = builtin_pair[0].tokenizer(book, verbose=False)["input_ids"]
    lengths = [260, 40, 180, 90]
    prompts = [tokens[2000 * i : 2000 * i + n] for i, n in enumerate(lengths)]
    engine = make_engine(builtin_pair, mode=mode, batch_size=2, sinks=4, recent=16, min_context=64)
    check_rows(engine, prompts, params_for(lengths, **SETTINGS[setting]))
