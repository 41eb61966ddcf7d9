"""Methods that choose inside the target's forward, in generation: any batch, rejected tokens, and the rounds of given text."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams, engine_config
from outrider.decoding.engine import Engine
from outrider.decoding.pair import make_rival
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import Statistics
from outrider.decoding.teacher_forced import TeacherForced
from outrider.errors import OptionError
from outrider.guidance.rivals import RIVALS
from outrider.ops.token_verify import Verified

METHODS = sorted(RIVALS.keys() - {"double-sparsity"})  # that one needs a file made for its target
SHORT = {"mode": "sparse", "sinks": 2, "recent": 4, "min_context": 8, "draft_tokens": 3}
DEEP = {"num_hidden_layers": 5}  # for methods that read everything in some
TOKENS = SamplingParams(max_new_tokens=10)
SAMPLED = [SamplingParams(max_new_tokens=6 + 2 * i, temperature=1.0, seed=i) for i in range(4)]


pytestmark = pytest.mark.usefixtures("controllers")


def short(method, **options):
    budget = {RIVALS[method].budgeted: 0.2 if RIVALS[method].budgeted == "keep" else 0.6}
    return SHORT | {"method": method} | budget | options


def tokens_of(results):
    assert {result.error for result in results} == {None}
    return [result.token_ids for result in results]


@pytest.mark.parametrize("method", [method for method in METHODS if RIVALS[method].budgeted == "keep"])
def test_keeping_everything_gives_the_dense_tokens(method, make_pair, generate, random_prompts):
    """Law 1. Tokens are rejected on the way: what a method remembers of them must not matter."""
    pair, prompts = make_pair("llama", **DEEP), random_prompts([30, 60])
    dense = generate(pair, prompts, TOKENS)
    everything = generate(pair, prompts, TOKENS, mode="sparse", method=method, keep=1.0)
    assert tokens_of(everything) == tokens_of(dense)
    assert any(result.statistics.accepted < result.statistics.drafted for result in dense)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_a_batch_equals_the_row_alone(method, make_pair, make_engine, random_prompts):
    """Law 7, refills and moved rows included; a row takes its first rounds densely."""
    prompts = random_prompts([40, 90, 12, 60])
    engine = make_engine(make_pair("llama", **DEEP), **short(method, min_context=50, batch_size=2))
    together = engine.generate(prompts, SAMPLED)
    for prompt, params, result in zip(prompts, SAMPLED, together, strict=True):
        if len(prompt) < 50:  # whether a round is sparse is the longest row's choice
            continue
        [alone] = engine.generate([prompt], params)
        assert alone.token_ids == result.token_ids
        assert alone.statistics.kept_fraction == result.statistics.kept_fraction < 1
        assert alone.statistics.bytes_read == result.statistics.bytes_read


@pytest.mark.parametrize("method", METHODS)
def test_rounds_are_those_of_given_text(method, make_pair, random_prompts):
    """Where every drafted token passes, a round of generation is one of the evaluation: same logits, same bytes."""
    target, draft = make_pair("llama", **DEEP)
    [prompt] = random_prompts([70])
    seen = []

    def pass_all(trace, logits, inputs):
        seen.append(logits[0].clone())
        return Verified(torch.tensor([trace.tokens.shape[1]]), logits[:, -1].argmax(-1))

    config = engine_config(**short(method, drafting="dense"))
    engine = Engine(target, draft, config, None, judge=pass_all)
    statistics = Statistics(mode="sparse", method=method, prompt_tokens=70, accepted_at=[0] * 3)
    sequence = Sequence(0, prompt, SamplingParams(max_new_tokens=20), None, (), statistics)
    list(engine.run([sequence]))
    assert len(sequence.tokens) == 20 and len(seen) == 5

    reader = TeacherForced((target, draft), 100, 3)
    reader.read([prompt[:-1]], 64)
    given = [prompt[-1], *sequence.tokens[:-1]]
    [run] = reader.run([given], make_rival(method, target, config.budget), config.budget.min_context)
    torch.testing.assert_close(run.logits, torch.cat(seen).float(), rtol=1e-5, atol=1e-5)
    assert statistics.kept_fraction == pytest.approx(run.kept_fraction)
    assert statistics.kv_read_fraction == pytest.approx(run.kv_read_fraction)


def test_an_alignment_is_not_needed(make_pair, random_prompts):
    target, draft = make_pair("llama", **DEEP)
    config = engine_config(**short("streaming"))
    assert Engine(target, draft, config, None).guidance.rival is not None
    with pytest.raises(OptionError, match=r"top-p: got 0\.9; allowed: --keep with method streaming"):
        Engine(target, draft, engine_config(mode="sparse", method="streaming", top_p=0.9), None)
