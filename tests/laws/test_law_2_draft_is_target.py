"""Law 2: when draft and target are the same model, greedy, dense, every drafted token is accepted."""

from __future__ import annotations

import pytest

from outrider.config import SamplingParams


def check(results, tokens, k):
    for result in results:
        statistics = result.statistics
        assert len(result.token_ids) == tokens
        assert statistics.accepted == statistics.drafted == k * statistics.rounds
        assert statistics.accepted_at == [statistics.rounds] * k
        assert statistics.rounds == -(-tokens // (k + 1))


@pytest.mark.parametrize("k", [1, 4])
def test_every_family(family, k, make_pair, generate, random_prompts):
    prompts = random_prompts([19, 1, 33])
    check(generate(make_pair(family, "same"), prompts, SamplingParams(max_new_tokens=23), draft_tokens=k), 23, k)


@pytest.mark.parametrize("k", [4, 7])
def test_builtin_target(k, builtin_pair, generate, book):
    target = builtin_pair[0]
    tokens = target.tokenizer(book, verbose=False)["input_ids"]
    prompts = [tokens[2000:2300], tokens[6000:6150]]
    results = generate((target, target), prompts, SamplingParams(max_new_tokens=40, ignore_eos=True), draft_tokens=k)
    check(results, 40, k)
