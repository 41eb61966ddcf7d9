"""The loop: how sequences end, when rounds are dense, seeds, audits, and the counts of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding.statistics import STAGES, total
from outrider.errors import OptionError
from outrider.models import LanguageModel

TOKENS = SamplingParams(max_new_tokens=12)


def ending(model, *eos):
    """The same model with other end-of-text tokens."""
    return LanguageModel(model.module, model.tokenizer, replace(model.spec, eos_tokens=eos))


@pytest.fixture(scope="module")
def plain(text_pair, generate, random_prompts):
    """A prompt and its continuation, ended by nothing but its length."""
    [prompt] = random_prompts([20], vocabulary=256)
    [result] = generate(text_pair, [prompt], SamplingParams(max_new_tokens=24))
    return prompt, result


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_ends_at_the_first_end_of_text_token(at, plain, text_pair, generate):
    prompt, whole = plain
    eos = whole.token_ids[at]
    first = whole.token_ids.index(eos)
    pair = ending(text_pair[0], 300, eos), text_pair[1]
    [result] = generate(pair, [prompt], SamplingParams(max_new_tokens=24))
    assert (result.token_ids, result.finish_reason) == (whole.token_ids[: first + 1], "eos")
    [ignored] = generate(pair, [prompt], SamplingParams(max_new_tokens=24, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == (whole.token_ids, "length")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_max_new_tokens_is_exact(count, plain, text_pair, generate):
    prompt, whole = plain
    [result] = generate(text_pair, [prompt], SamplingParams(max_new_tokens=count), draft_tokens=3)
    assert (result.token_ids, result.finish_reason) == (whole.token_ids[:count], "length")
    assert result.statistics.generated_tokens == count


def test_stop_string_ends_the_text_before_it(plain, text_pair, generate):
    prompt, whole = plain
    at = next(i for i in range(3, len(whole.text)) if "\ufffd" not in whole.text[i : i + 2])
    stop = whole.text[at : at + 2]
    [result] = generate(text_pair, [prompt], SamplingParams(max_new_tokens=24, stop=stop))
    assert result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.find(stop)]
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]


def test_end_of_text_wins_over_length(plain, text_pair, generate):
    prompt, whole = plain
    last = next(i for i in range(6, 24) if whole.token_ids[i] not in whole.token_ids[:i])
    pair = ending(text_pair[0], whole.token_ids[last]), text_pair[1]
    [result] = generate(pair, [prompt], SamplingParams(max_new_tokens=last + 1))
    assert (len(result.token_ids), result.finish_reason) == (last + 1, "eos")


@pytest.mark.parametrize("mode", ["dense", "sparse", "exact"])
def test_seeds_reproduce_and_differ(mode, make_pair, generate, random_prompts):
    pair, [prompt] = make_pair("llama"), random_prompts([20])
    params = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 2, 1, 3)]
    first, second = (generate(pair, [prompt] * 4, params, mode=mode) for _ in range(2))
    tokens = [result.token_ids for result in first]
    assert tokens == [result.token_ids for result in second]
    assert tokens[0] == tokens[2]
    assert len({tuple(row) for row in tokens}) == 3


def test_greedy_ignores_the_seed(make_pair, generate, random_prompts):
    pair, [prompt] = make_pair("llama"), random_prompts([20])
    results = generate(pair, [prompt] * 2, [SamplingParams(max_new_tokens=12, seed=seed) for seed in (1, 2)])
    assert results[0].token_ids == results[1].token_ids


def test_temperature_0_is_greedy_however_sampling_is_cut(make_pair, generate, random_prompts):
    pair, [prompt] = make_pair("llama"), random_prompts([20])
    params = [TOKENS, SamplingParams(max_new_tokens=12, top_k=5, top_p=0.3, seed=4)]
    results = generate(pair, [prompt] * 2, params)
    assert results[0].token_ids == results[1].token_ids


def test_below_min_context_a_sparse_run_is_the_dense_one(method, make_pair, generate, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts([20, 9])
    dense = generate(pair, prompts, TOKENS)
    sparse = generate(pair, prompts, TOKENS, mode="sparse", method=method, min_context=32)
    assert [r.token_ids for r in sparse] == [r.token_ids for r in dense]
    assert {r.statistics.kept_fraction for r in sparse} == {1.0}
    assert {r.statistics.kv_read_fraction for r in sparse} == {1.0}, "nothing is scored in a dense round"


def test_sparse_rounds_begin_at_min_context(make_pair, make_engine, random_prompts, monkeypatch):
    target, draft = make_pair("llama")
    engine = make_engine((target, draft), mode="sparse", keep=0.5, min_context=20)
    seen = []
    forward = target.forward

    def spy(tokens, cache, *, selection=None, **options):
        if options.get("logits") is not False:
            seen.append((int(cache.lengths[0]), selection is not None))
        return forward(tokens, cache, selection=selection, **options)

    monkeypatch.setattr(target, "forward", spy)
    engine.generate(random_prompts([15]), TOKENS)
    assert [sparse for _, sparse in seen] == [length >= 20 for length, _ in seen]
    assert {sparse for _, sparse in seen} == {True, False}


def test_sparse_differs_from_dense_when_little_is_kept(method, make_pair, generate, random_prompts):
    """The selection does reach the target: at this budget the text changes."""
    pair, prompts = make_pair("llama"), random_prompts([40])
    [dense] = generate(pair, prompts, TOKENS)
    [sparse] = generate(pair, prompts, TOKENS, mode="sparse", method=method, keep=0.05, sinks=0, recent=0)
    assert dense.token_ids != sparse.token_ids
    assert sparse.statistics.kept_fraction < 0.1


@pytest.mark.parametrize("audit", [True, False])
def test_audit_of_a_dense_greedy_run_agrees_throughout(audit, make_pair, generate, random_prompts):
    prompts = random_prompts([20, 1, 33, 7])
    results = generate(make_pair("gemma3"), prompts, TOKENS, audit=audit, batch_size=2, prefill_chunk=5)
    for result in results:
        assert result.statistics.audited == (12 if audit else 0)
        assert result.statistics.agreement == (1.0 if audit else None)


def test_audit_of_a_sparse_run_counts_the_tokens_the_dense_target_would_choose(
    make_pair, generate, random_prompts, independent
):
    pair, prompts = make_pair("llama"), random_prompts([40, 25, 31])
    results = generate(pair, prompts, TOKENS, mode="sparse", keep=0.15, audit=True, batch_size=2)
    plain = generate(pair, prompts, TOKENS, mode="sparse", keep=0.15, batch_size=2)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain], "an audit changes nothing"
    for prompt, result in zip(prompts, results, strict=True):
        with torch.inference_mode():
            logits = independent(pair[0])(input_ids=torch.tensor([prompt + result.token_ids[:-1]])).logits[0]
        chosen = logits[len(prompt) - 1 :].argmax(-1)
        assert result.statistics.audited == 12
        assert result.statistics.agreed == int((chosen == torch.tensor(result.token_ids)).sum())
    assert 0 < sum(r.statistics.agreed for r in results) < 36


def test_exact_audits_prefills_and_watches_like_any_mode(make_pair, make_engine, random_prompts):
    """The audit agrees throughout; a watch is told of every round of tentative tokens, a stream of confirmed ones alone."""
    engine = make_engine(make_pair("llama"), mode="exact", exact_every=5, keep=0.1, audit=True, batch_size=2)
    prompts, seen = random_prompts([40, 25, 31]), []
    [*chunks] = engine.stream(prompts, TOKENS, watch=lambda sequence, outcome, lists: seen.append((sequence.index, lists)))
    results = {chunk.index: chunk.result for chunk in chunks if chunk.result is not None}
    for index, result in results.items():
        counts = result.statistics
        assert (counts.audited, counts.agreement) == (12, 1.0)
        assert sum(lists is not None for at, lists in seen if at == index) == counts.rounds
        parts = [chunk.token_ids for chunk in chunks if chunk.index == index]
        assert [token for part in parts for token in part] == result.token_ids and len(parts) == counts.confirmations
        assert counts.seconds["confirm"] > 0
    whole = total([result.statistics for result in results.values()])
    assert whole.tentative == whole.confirmed + whole.rolled_back > 0
    assert whole.confirmations == len(chunks)


def test_counts_of_a_run(make_pair, make_engine, random_prompts):
    engine = make_engine(make_pair("llama"), mode="sparse", draft_tokens=3, batch_size=2)
    prompts = random_prompts([20, 8, 30])
    results = engine.generate(prompts, SamplingParams(max_new_tokens=11))
    for prompt, result in zip(prompts, results, strict=True):
        counts = result.statistics
        assert (counts.mode, counts.method, counts.prompt_tokens) == ("sparse", "outrider", len(prompt))
        assert counts.drafted == 3 * counts.rounds
        assert counts.accepted == sum(counts.accepted_at)
        assert sorted(counts.accepted_at, reverse=True) == counts.accepted_at, "a position is reached through those before it"
        assert 11 <= counts.accepted + counts.rounds <= 11 + 3
        assert set(counts.seconds) == set(STAGES)
        assert all((counts.seconds[stage] > 0) == (stage not in ("confirm", "audit")) for stage in STAGES)
        assert counts.decode_seconds > 0
    whole = total([result.statistics for result in results])
    each = [result.statistics.decode_seconds for result in results]
    assert max(each) <= whole.decode_seconds < sum(each), "not all at the same time, but some"
    assert whole.tokens_per_second == 33 / whole.decode_seconds
    assert whole.rounds == sum(result.statistics.rounds for result in results)


def test_dense_mode_needs_no_alignment_and_spends_nothing_on_guidance(make_pair, generate, random_prompts):
    [result] = generate(make_pair("llama"), random_prompts([20]), TOKENS)
    assert (result.statistics.seconds["score"], result.statistics.seconds["select"]) == (0, 0)
    assert (result.statistics.mode, result.statistics.method) == ("dense", None)


def test_progress_of_the_prefill(make_pair, make_engine, random_prompts):
    seen = []
    engine = make_engine(make_pair("llama"), prefill_chunk=8)
    engine.generate(random_prompts([20]), TOKENS, progress=lambda *step: seen.append(step))
    assert seen == [("prefill", 8, 19), ("prefill", 16, 19), ("prefill", 19, 19)]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_prefill_chunks_do_not_matter(chunk, family, make_pair, generate, random_prompts):
    pair, prompts = make_pair(family), random_prompts([27])
    few = SamplingParams(max_new_tokens=5)
    assert generate(pair, prompts, few, prefill_chunk=chunk)[0].token_ids == generate(pair, prompts, few)[0].token_ids


def test_sparse_without_a_layer_of_full_attention_is_refused(make_pair, make_engine):
    with pytest.raises(OptionError, match="target layers"):
        make_engine(make_pair("mistral-window"), mode="sparse")


def test_a_draft_with_narrower_logits_meets_tokens_it_does_not_know(make_model, make_engine, random_prompts, byte_tokenizer):
    """Padded vocabularies differ in width; the target may emit a padding token, which the draft has no embedding for."""
    target = make_model("llama", vocab_size=288, tokenizer=byte_tokenizer)
    draft = make_model("qwen3", 3, vocab_size=257, tokenizer=byte_tokenizer)
    prompts = [[*random_prompts([12], vocabulary=256)[0], 287], [280]]
    results = make_engine((target, draft), batch_size=2).generate(prompts, SamplingParams(max_new_tokens=40))
    wanted = make_engine((target, target), batch_size=2).generate(prompts, SamplingParams(max_new_tokens=40))
    assert [r.token_ids for r in results] == [r.token_ids for r in wanted]
    assert max(max(r.token_ids) for r in results) >= 257, "the case did occur"


def test_a_draft_with_wider_logits_never_drafts_beyond_the_target(make_model, make_engine, random_prompts, byte_tokenizer):
    target = make_model("llama", vocab_size=257, tokenizer=byte_tokenizer)
    draft = make_model("qwen3", 3, vocab_size=288, tokenizer=byte_tokenizer)
    prompts, hot = random_prompts([12, 5], vocabulary=256), SamplingParams(max_new_tokens=40, temperature=5.0)
    results = make_engine((target, draft)).generate(prompts, hot)
    assert max(max(r.token_ids) for r in results) < 257


def test_context_can_be_used_to_the_last_position(make_model, make_engine, alone, random_prompts):
    """A round runs past what is wanted; a model with learned positions has none there."""
    pair = (make_model("GPT2Config", n_positions=40, max_position_embeddings=40, initializer_range=0.3),) * 2
    [prompt] = random_prompts([30])
    [result] = make_engine(pair, draft_tokens=6).generate([prompt], SamplingParams(max_new_tokens=10))
    assert result.token_ids == alone(pair[0], prompt, 10)
