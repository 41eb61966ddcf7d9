"""Dummy weights: shapes, noise in the cache, and a judge that accepts at given rates."""

from __future__ import annotations

import pytest
import torch

from outrider.bench.cases import TINY
from outrider.bench.dummy import ScriptedAgreement, ScriptedJudge, random_alignment, read_noise
from outrider.bench.prompts import random_prompts
from outrider.models.dummy import dummy_module
from outrider.types import DraftTrace

RATES = (0.9, 0.8, 0.7, 0.6)


def judged(judge: ScriptedJudge, rows: int, k: int = len(RATES), vocabulary: int = 7, tentative: int = 0):
    """The next verdict on so many rows, and the logits [B, K + 1, V] it was made on."""
    count = torch.full((rows,), tentative)
    tokens, probs = torch.zeros(rows, k, dtype=torch.int64), torch.zeros(rows, k, vocabulary)
    trace = DraftTrace(tokens=tokens, probs=probs, queries=(), tentative=count)
    logits = torch.randn(rows, k + 1, vocabulary, generator=torch.Generator().manual_seed(1))
    return judge(trace, logits, None), logits


@pytest.mark.parametrize("rows", [1, 4])
def test_rates_are_unconditional_and_met_soon(rows):
    judge = ScriptedJudge(torch.tensor(RATES))
    accepted = torch.cat([judged(judge, rows)[0].accepted for _ in range(40)])
    for position, rate in enumerate(RATES):
        assert (accepted > position).double().mean() == pytest.approx(rate, abs=0.03)
    assert accepted.double().mean() == pytest.approx(sum(RATES), abs=0.08)
    assert len(set(accepted[:8].tolist())) > 2, "not one value after the other"


def test_the_next_token_is_the_targets():
    verdict, logits = judged(ScriptedJudge(torch.tensor(RATES)), 50)
    assert verdict.accepted.dtype == torch.int64 and set(verdict.accepted.tolist()) == {0, 1, 2, 3, 4}
    assert verdict.next_token.shape == (50,)
    assert verdict.next_token.tolist() == [int(logits[row, n].argmax()) for row, n in enumerate(verdict.accepted.tolist())]


def test_without_drafted_tokens_nothing_is_accepted():
    verdict, logits = judged(ScriptedJudge(torch.tensor(RATES)), 3, k=0)
    assert verdict.accepted.tolist() == [0, 0, 0]
    assert verdict.next_token.tolist() == logits[:, 0].argmax(-1).tolist()


def test_agreement_is_that_of_the_script():
    """By the token: of blocks of 20 tokens, where each passes at a rate of 0.9 if all before it do."""
    agreement, passed, tested = ScriptedAgreement.at(0.9, RATES, 4, torch.device("cpu")), 0, 0
    for _ in range(300):
        verdict, logits = judged(agreement, 1, k=20, tentative=20)
        [accepted] = verdict.accepted.tolist()
        accepted = min(accepted, 20)
        passed, tested = passed + accepted, tested + min(accepted + 1, 20)
        assert verdict.next_token.tolist() == [int(logits[0, accepted].argmax())]
    assert passed / tested == pytest.approx(0.9, abs=0.02)
    for rate, wanted in ((0.0, 0), (1.0, 20)):
        judge = ScriptedAgreement.at(rate, RATES, 4, torch.device("cpu"))
        assert judged(judge, 1, k=20, tentative=20)[0].accepted.tolist() == [wanted]


def test_drafted_tokens_behind_tentative_ones_pass_as_drafted_ones_do():
    """Where all tentative tokens pass, at the rates of rounds."""
    judge, k = ScriptedAgreement.at(1.0, RATES, 4, torch.device("cpu")), len(RATES)
    passed = torch.stack([judged(judge, 4, k=3 + k, tentative=3)[0].accepted - 3 for _ in range(400)])
    assert passed.min() >= 0
    for at, rate in enumerate(RATES):
        assert float((passed > at).double().mean()) == pytest.approx(rate, abs=0.03)


def test_noise_fills_the_rows_of_a_chunk_and_no_others(work):
    cache = work.target.new_cache(2, 64)
    row = cache.rows(1, 2)
    for stop in (10, 24):
        read_noise(work.target, row, torch.zeros(1, stop - int(row.lengths), dtype=torch.int64), stop)
    assert cache.lengths.tolist() == [0, 24]
    for layer in range(len(cache.layers)):
        for stored in (cache.keys(layer), cache.values(layer)):
            assert not stored[0].any() and not stored[1, 24:].any()
            assert stored[1, :24].std() == pytest.approx(1, abs=0.15)


def test_dummy_weights_are_made_of_noise():
    make = {"dtype": torch.float32, "device": torch.device("cpu")}
    module, again = dummy_module(TINY.draft, **make), dummy_module(TINY.draft, **make)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.model.embed_tokens.weight.std() == pytest.approx(0.02, rel=0.05)
    assert bool((module.model.norm.weight == 1).all())
    frequencies = module.model.rotary_emb.inv_freq
    assert frequencies.device.type == "cpu" and frequencies[0] == 1 and bool((frequencies.diff() < 0).all())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_alignments_and_prompts_are_random_and_the_same_every_time(work):
    sources = random_alignment(work.target.spec, work.draft.spec).sources
    assert sources.shape == (3, 4, 1, 2)
    assert sources[..., 0].max() == 1 and sources[..., 1].max() == 1 and sources.min() == 0
    assert torch.equal(sources, random_alignment(work.target.spec, work.draft.spec).sources)
    first, second = random_prompts(100, 2, 512)
    assert len(first) == len(second) == 100 and first != second
    assert min(first) >= 0 and 255 < max(first) < 512
    assert random_prompts(100, 2, 512) == [first, second]
