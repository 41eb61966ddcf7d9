"""What goes wrong with one prompt stays with it; prompts can be cancelled; waiting ones are read between rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding.prefill import Prefill
from outrider.decoding.runner import Runner
from outrider.errors import EngineError, PromptError

TOKENS = SamplingParams(max_new_tokens=20)
PROMPTS = [20, 9, 33, 14, 27]


def tokens(results):
    return [result.token_ids for result in results]


@pytest.fixture
def alone(make_pair, generate, random_prompts):
    """Every prompt's own continuation."""
    return [generate(make_pair("llama"), [prompt], TOKENS)[0].token_ids for prompt in random_prompts(PROMPTS)]


def failing(monkeypatch, model, error, when):
    """`model.forward` raises `error` where `when(tokens, cache)` says so."""
    forward = model.forward

    def run(given, cache, **options):
        if when(given, cache):
            raise error
        return forward(given, cache, **options)

    monkeypatch.setattr(model, "forward", run)


def test_plain_is_the_target_alone(make_pair, make_engine, random_prompts, alone):
    engine = make_engine(make_pair("llama"), mode="plain", batch_size=2)
    results = engine.generate(random_prompts(PROMPTS), TOKENS)
    assert tokens(results) == alone
    for result in results:
        assert (result.statistics.rounds, result.statistics.drafted, result.statistics.accepted) == (20, 0, 0)
        assert (result.statistics.kept_fraction, result.statistics.kv_read_fraction) == (1.0, 1.0)


def test_a_prompt_without_memory_fails_alone(make_pair, make_engine, random_prompts, monkeypatch, alone):
    pair, prompts = make_pair("llama"), random_prompts(PROMPTS)
    long = torch.tensor([prompts[2][:-1]])
    failing(monkeypatch, pair[0], torch.OutOfMemoryError("CUDA out of memory. Tried"), lambda t, c: torch.equal(t, long))
    engine = make_engine(pair, batch_size=2)
    for _ in range(2):
        results = engine.generate(prompts, TOKENS)
        assert [r.finish_reason for r in results] == ["length", "length", "error", "length", "length"]
        assert results[2].error == "no memory for its prompt: CUDA out of memory. Tried"
        assert results[2].token_ids == []
        assert [r.token_ids for r in results[:2] + results[3:]] == alone[:2] + alone[3:]


def test_a_round_without_memory_fails_the_rows_in_it(make_pair, make_engine, random_prompts, monkeypatch, alone):
    pair, prompts = make_pair("llama"), random_prompts(PROMPTS)
    rounds = []

    def third(given, cache):
        rounds.append(given.shape[1] == 4 and given.shape[0] == 2)
        return rounds[-1] and sum(rounds) == 3

    failing(monkeypatch, pair[0], torch.OutOfMemoryError("none left"), third)
    results = make_engine(pair, batch_size=2).generate(prompts, TOKENS)
    assert [r.finish_reason for r in results] == ["error", "error", "length", "length", "length"]
    assert tokens(results)[2:] == alone[2:]
    for result, whole in zip(results[:2], alone[:2], strict=True):
        assert result.error == "none left" and 0 < len(result.token_ids) < 20
        assert result.token_ids == whole[: len(result.token_ids)], "what was emitted before stays"


def test_an_error_of_the_device_ends_all_and_is_remembered(make_pair, make_engine, random_prompts, monkeypatch):
    pair, prompts = make_pair("llama"), random_prompts(PROMPTS)
    calls = []
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore about it")
    failing(monkeypatch, pair[0], error, lambda t, c: calls.append(t) or len(calls) == 7)
    engine = make_engine(pair, batch_size=2)
    results = engine.generate(prompts, TOKENS)
    assert {r.finish_reason for r in results} == {"error"}
    assert {r.error for r in results} == {"CUDA error: an illegal memory access was encountered"}
    with pytest.raises(EngineError, match=r"illegal memory access was encountered\); it cannot be used again"):
        engine.generate(prompts, TOKENS)


def test_logits_that_are_no_numbers_fail_their_row(make_pair, make_engine, random_prompts, monkeypatch, alone):
    pair, prompts = make_pair("llama"), random_prompts(PROMPTS[:3])
    forward, seen = pair[0].forward, []

    def run(given, cache, **options):
        output = forward(given, cache, **options)
        if options.get("logits") is not False:
            seen.append(given)
            if len(seen) == 2:
                output = replace(output, logits=output.logits.clone())
                output.logits[1, 0, 5] = torch.nan
        return output

    monkeypatch.setattr(pair[0], "forward", run)
    results = make_engine(pair).generate(prompts, TOKENS)
    assert [r.finish_reason for r in results] == ["length", "error", "length"]
    assert results[1].error == "the target's logits are not finite numbers"
    assert tokens(results)[::2] == alone[0:3:2]
    assert results[1].token_ids == alone[1][: len(results[1].token_ids)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), None], ids=["memory", "numbers"])
def test_a_confirmation_that_fails_leaves_what_is_confirmed(error, make_pair, make_engine, random_prompts, monkeypatch, alone):
    pair, prompts = make_pair("llama"), random_prompts(PROMPTS[:4])
    confirm, calls = Runner.confirm, []

    def third(self, running, kind, under_way):
        calls.append([sequence.index for sequence in running])
        if len(calls) == 3 and error is not None:
            raise error
        flight = confirm(self, running, kind, under_way)
        flight.numbers[:, -3] = len(calls) != 3  # whether the logits are finite
        return flight

    monkeypatch.setattr(Runner, "confirm", third)
    results = make_engine(pair, mode="exact", exact_every=4, batch_size=2).generate(prompts, TOKENS)
    failed = [i for i, result in enumerate(results) if result.error is not None]
    assert failed == ([0, 1] if error is not None else calls[2])
    for index, (result, whole) in enumerate(zip(results, alone, strict=False)):
        assert result.token_ids == whole[: len(result.token_ids)], "no tentative token is emitted"
        if index in failed:
            assert result.error == (str(error) if error is not None else "the dense target's logits are not finite numbers")
            assert 0 < len(result.token_ids) < 20
        else:
            assert result.token_ids == whole


@pytest.mark.parametrize("mode", ["dense", "sparse", "exact"])
def test_cancel(mode, make_pair, make_engine, random_prompts):
    """A running prompt, and one that waits; the others do not notice."""
    prompts, options = (
        random_prompts(PROMPTS),
        {"mode": mode, "batch_size": 2, "drafting": "dense" if mode == "dense" else "sparse", "draft_recent": 4},
    )
    options["exact_every"] = 4
    engine = make_engine(make_pair("llama"), **options)
    whole = tokens(engine.generate(prompts, TOKENS))
    stream, results = engine.stream(prompts, TOKENS), {}
    for number, chunk in enumerate(stream):
        if number == 3:
            stream.cancel(1)
            stream.cancel(4)
        if chunk.result is not None:
            results[chunk.index] = chunk.result
    stream.cancel(0)
    assert [results[i].finish_reason for i in range(5)] == ["length", "cancelled", "length", "length", "cancelled"]
    assert [results[i].token_ids for i in (0, 2, 3)] == [whole[i] for i in (0, 2, 3)]
    assert results[1].token_ids == whole[1][: len(results[1].token_ids)] and 0 < len(results[1].token_ids) < 20
    assert (results[4].token_ids, results[4].text, results[4].error) == ([], "", None)


def test_cancel_a_prompt_half_read(make_pair, make_engine, random_prompts, monkeypatch):
    """Its row is empty again, and the one that runs beside it does not notice."""
    emptied = []
    empty = Prefill.empty

    def spy(prefill):
        before = int(prefill._rows[0][1].lengths[0])
        empty(prefill)
        emptied.append((before, prefill.total, [int(cache.lengths[0]) for _, cache in prefill._rows]))

    engine = make_engine(make_pair("llama"), batch_size=2, prefill_chunk=16)
    prompts = random_prompts([20, 9, 200])
    params = [SamplingParams(max_new_tokens=n) for n in (60, 2, 5)]
    [alone] = engine.generate(prompts[:1], params[0])
    monkeypatch.setattr(Prefill, "empty", spy)
    stream, results, ended = engine.stream(prompts, params), {}, None
    for number, chunk in enumerate(stream):
        if chunk.result is not None:
            results[chunk.index] = chunk.result
            ended = number if chunk.index == 1 else ended
        if ended is not None and number == ended + 3:
            stream.cancel(2)
    assert [results[i].finish_reason for i in range(3)] == ["length", "length", "cancelled"]
    assert results[0].token_ids == alone.token_ids
    before, total, after = emptied[-1]
    assert 0 < before < total == 199 and after == [0, 0]


def test_waiting_prompts_are_read_between_rounds(make_pair, make_engine, random_prompts, monkeypatch):
    """The first prompts are read at once; a later one chunk by chunk, while the other row goes on."""
    pair = make_pair("llama")
    target, log = pair[0], []
    forward = target.forward

    def run(given, cache, **options):
        log.append("chunk" if options.get("logits") is False else "round")
        return forward(given, cache, **options)

    monkeypatch.setattr(target, "forward", run)
    params = [SamplingParams(max_new_tokens=n) for n in (60, 4, 4)]
    make_engine(pair, batch_size=2, prefill_chunk=8).generate(random_prompts([20, 20, 40]), params)
    assert log[:6] == ["chunk"] * 6 and log[6] == "round"
    late = [i for i, what in enumerate(log) if what == "chunk"][6:]
    assert len(late) == 5
    assert all(log[i + 1] == "round" for i in late), "no two chunks without a round in between"


def test_what_cannot_fit_is_refused_before_any_work(make_pair, make_engine, random_prompts, monkeypatch):
    pair = make_pair("llama")
    engine = make_engine(pair, mode="sparse", batch_size=4)
    monkeypatch.setattr("outrider.decoding.engine.free_bytes", lambda device: 20_000)
    failing(monkeypatch, pair[0], AssertionError("no work"), lambda t, c: True)
    with pytest.raises(PromptError, match=r"prompt 1: 420 tokens need .* allowed: at most \d+ tokens in the"):
        engine.stream(random_prompts([20, 400]), TOKENS)


def test_fewer_rows_where_memory_is_short(make_pair, make_engine, random_prompts, monkeypatch, alone):
    monkeypatch.setattr("outrider.decoding.engine.free_bytes", lambda device: 200_000)
    with pytest.warns(UserWarning, match="batch-size: 5 rows of 53 tokens need .* run at the same time"):
        results = make_engine(make_pair("llama"), batch_size=5).generate(random_prompts(PROMPTS), TOKENS)
    assert tokens(results) == alone


def test_short_prompts_share_a_chunk(make_pair, make_engine, random_prompts, monkeypatch):
    """Three slots come free at once and are filled behind one round: a chunk is a number of tokens, not of prompts."""
    pair, log = make_pair("llama"), []
    forward = pair[0].forward

    def run(given, cache, **options):
        log.append("prompt" if options.get("logits") is False else "round")
        return forward(given, cache, **options)

    monkeypatch.setattr(pair[0], "forward", run)
    params = [SamplingParams(max_new_tokens=n) for n in (40, 1, 1, 1, 4, 4, 4)]
    make_engine(pair, batch_size=4, prefill_chunk=64).generate(random_prompts([9] * 7), params)
    assert log[:9] == ["prompt"] * 4 + ["round"] * 2 + ["prompt"] * 3
