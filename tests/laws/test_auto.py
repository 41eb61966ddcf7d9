"""The law of mode auto: whatever is chosen, and however often, the text is the dense target's, as in mode exact.

Choices are made at random here, so that every change between modes and widths comes up, with tentative tokens confirmed early,
rows whose draft has read nothing, and neighbours that come and go.
"""

from __future__ import annotations

import random

import pytest

from outrider.config import SamplingParams
from outrider.decoding.choice import PLAIN, Choice
from outrider.decoding.chooser import Fastest
from outrider.decoding.statistics import total
from outrider.errors import OptionError

COUNT = 30
STARVED = {"keep": 0.005, "sinks": 0, "recent": 0}  # one listed token, or two


def tokens(results):
    return [result.token_ids for result in results]


@pytest.fixture
def at_random(monkeypatch):
    """`at_random(seed, modes)`: every question to a chooser is answered by chance."""

    def answer(seed, modes=("plain", "dense", "exact"), varies=True):
        dice = random.Random(seed)

        def choose(self, running, *, listed):
            able = {"plain", "dense", *(choice.mode for choice in self._choices if listed)}
            mode = dice.choice([mode for mode in modes if mode in able])
            k = self._config.draft_tokens
            self._current = PLAIN if mode == "plain" else Choice(mode, dice.randint(1, k) if varies else k)
            return self._current

        monkeypatch.setattr(Fastest, "choose", choose)
        for question, chance in (("stays", 0.5), ("settles", 0.2), ("wants_draft", 0.5)):
            monkeypatch.setattr(Fastest, question, lambda self, *given, chance=chance: dice.random() < chance)

    return answer


@pytest.mark.parametrize("seed", [0, 1])
def test_law_3_equals_generate_of_the_target_alone(family, seed, at_random, make_pair, generate, alone, random_prompts):
    at_random(seed)
    pair, prompts = make_pair(family), random_prompts([21, 1, 34, 12], seed=seed)
    results = generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), mode="auto", batch_size=2, **STARVED)
    assert tokens(results) == [alone(pair[0], prompt, COUNT) for prompt in prompts]
    chosen = total([result.statistics for result in results]).chosen
    exact = pair[0].spec.full_layers
    assert {name.split()[0] for name in chosen} == {"plain", "dense", *(["exact"] if exact else [])}, chosen


PREFILL = {"prefill": "sparse", "prefill_min_context": 16, "prefill_block": 8, "prefill_chunk": 8}
OPTIONS = [
    {"drafting": "dense"},
    {"method": "sts"},
    {"method": "specattn"},
    {"unlisted": "mean"},
    {"score_keys": "4bit"},
    PREFILL,
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_law_3_whatever_the_options(options, at_random, make_pair, generate, random_prompts):
    at_random(5)
    # codes are of blocks of 64 tokens
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    pair = make_pair("qwen3", **(wide if "score_keys" in options else {}))
    prompts, params = random_prompts([150, 90]), SamplingParams(max_new_tokens=COUNT)
    shared = STARVED | {name: value for name, value in options.items() if name.startswith("prefill")}
    dense = generate(pair, prompts, params, mode="dense", **shared)
    assert tokens(generate(pair, prompts, params, mode="auto", **(STARVED | options))) == tokens(dense)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_text_is_that_of_mode_exact(seed, at_random, make_pair, generate, random_prompts):
    at_random(seed)
    pair, prompts = make_pair("llama"), random_prompts([21, 9, 34])
    params = [SamplingParams(max_new_tokens=COUNT, temperature=t, seed=i) for i, t in enumerate([1.0, 0.0, 0.7])]
    auto = generate(pair, prompts, params, mode="auto", batch_size=2, **STARVED)
    assert tokens(auto) == tokens(generate(pair, prompts, params, mode="exact", **STARVED))


def test_law_3_builtin_pair_by_its_own_choices(builtin_pair, make_engine, alone, book):
    target = builtin_pair[0]
    text = target.tokenizer(book, verbose=False)["input_ids"]
    prompts = [text[1000:1300], text[5000:5201]]
    engine = make_engine(builtin_pair, mode="auto", keep=0.1, recent=16, min_context=64, draft_tokens=4)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=40))
    assert tokens(results) == [alone(target, prompt, 40) for prompt in prompts]


def test_law_7_a_row_in_a_batch_equals_the_row_alone(at_random, make_pair, generate, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts([21, 9, 34])
    params = SamplingParams(max_new_tokens=COUNT, temperature=1.0, seed=4)
    at_random(7)
    together = tokens(generate(pair, prompts, params, mode="auto", batch_size=2, **STARVED))
    at_random(8)
    assert together == [tokens(generate(pair, [prompt], params, mode="auto", **STARVED))[0] for prompt in prompts]


def test_the_draft_knows_all_tokens_when_it_drafts_again(at_random, make_pair, generate, random_prompts):
    """A draft that is the target: all that it drafts passes, though it was left out of rounds before."""
    at_random(3, modes=("plain", "dense"))
    pair, prompts = make_pair("llama", "same"), random_prompts([21, 34])
    results = generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), mode="auto", drafting="dense")
    counted = total([result.statistics for result in results])
    assert counted.accepted == counted.drafted > 0 and counted.chosen["plain"] > 0


def test_approximate_rounds_are_sparse_ones(at_random, make_pair, generate, random_prompts):
    at_random(2, modes=("sparse",), varies=False)
    pair, prompts = make_pair("llama"), random_prompts([40, 30])
    results = generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), mode="auto", approximate=True)
    assert tokens(results) == tokens(generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), mode="sparse"))
    assert all(result.statistics.confirmations == 0 for result in results)


def test_without_an_alignment_there_is_less_to_choose_from(make_pair, generate, random_prompts, alone, monkeypatch):
    from outrider.decoding.engine import Engine

    built = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *given, **named: built(self, *given[:3], None, **named))
    pair, prompts = make_pair("llama"), random_prompts([40])
    [result] = generate(pair, prompts, SamplingParams(max_new_tokens=COUNT), mode="auto")
    assert result.token_ids == alone(pair[0], prompts[0], COUNT)
    assert not any(name.startswith("exact") for name in result.statistics.chosen)


def test_rivals_are_refused(make_pair, make_engine):
    with pytest.raises(OptionError, match=r"method: got 'quest'; allowed: .*outrider.* with mode auto"):
        make_engine(make_pair("llama"), mode="auto", method="quest")
