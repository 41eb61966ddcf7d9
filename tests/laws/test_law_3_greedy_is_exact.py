"""Law 3: dense verification, greedy, is identical to the target decoding alone, token by token."""

from __future__ import annotations

import pytest

from outrider.config import SamplingParams

COUNT = 24


@pytest.mark.parametrize("draft", ["noisy", "other", "same"])
def test_equals_generate_of_the_target_alone(family, draft, make_pair, generate, alone, random_prompts):
    pair = make_pair(family, draft)
    [prompt] = random_prompts([21])
    [result] = generate(pair, [prompt], SamplingParams(max_new_tokens=COUNT))
    assert result.token_ids == alone(pair[0], prompt, COUNT)
    assert result.finish_reason == "length"
    assert len(set(result.token_ids)) >= 5, "a text that does not wander proves little"


def test_reference_does_not_depend_on_the_implementation(family, make_model, alone, random_prompts):
    [prompt] = random_prompts([21])
    assert alone(make_model(family), prompt, COUNT, "sdpa") == alone(make_model(family), prompt, COUNT, "eager")


def test_noisy_draft_is_accepted_in_part(family, make_pair, generate, random_prompts):
    """All accepted or all rejected would leave half of the loop unproven."""
    [result] = generate(make_pair(family), random_prompts([21]), SamplingParams(max_new_tokens=COUNT))
    assert 0.1 < result.statistics.accepted / result.statistics.drafted < 0.95


def test_batch_equals_generate_of_each_prompt_alone(family, make_pair, generate, alone, random_prompts):
    pair, prompts = make_pair(family), random_prompts([21, 1, 34, 9], seed=1)
    results = generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), prefill_chunk=7)
    assert [result.token_ids for result in results] == [alone(pair[0], prompt, COUNT) for prompt in prompts]


@pytest.mark.parametrize("k", range(1, 8))
def test_any_number_of_drafted_tokens_gives_the_same_text(k, make_pair, generate, alone, random_prompts):
    pair, [prompt] = make_pair("qwen3"), random_prompts([17], seed=2)
    [result] = generate(pair, [prompt], SamplingParams(max_new_tokens=COUNT), draft_tokens=k)
    assert result.token_ids == alone(pair[0], prompt, COUNT)


def test_builtin_pair(builtin_pair, generate, alone, book):
    target = builtin_pair[0]
    tokens = target.tokenizer(book, verbose=False)["input_ids"]
    prompts = [tokens[1000:1300], tokens[5000:5201], tokens[9000:9450]]
    results = generate(builtin_pair, prompts, SamplingParams(max_new_tokens=40, ignore_eos=False), draft_tokens=4)
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == alone(target, prompt, 40)
        assert result.statistics.accepted > 0
