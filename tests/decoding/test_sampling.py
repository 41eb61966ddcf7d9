"""Distributions against a naive computation in Python floats, and the draw by inverse CDF."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from outrider.config import SamplingParams
from outrider.decoding.sampling import Sampling, distributions, draw

LOGITS = st.lists(st.integers(-400, 400), min_size=1, max_size=12, unique=True).map(lambda row: [x / 50 for x in row])
ALMOST_ONE = 1 - 2**-24  # the largest number that torch.rand returns


def naive(logits, params):
    """Temperature, then top-k, then top-p, each on what the one before left; None on the edge of a threshold."""
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    if params.top_k:
        order = order[: params.top_k]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if abs(mass / total - params.top_p) < 1e-5:
            return None
        if mass / total < params.top_p:
            kept.append(i)
        mass += weights[i]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@given(LOGITS, st.floats(0.05, 5), st.integers(0, 14), st.floats(0.01, 1))
def test_distribution_equals_the_naive_one(logits, temperature, top_k, top_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    wanted = naive(logits, params)
    assume(wanted is not None)
    [[found]] = distributions(torch.tensor([[logits]]), Sampling.of([params])).tolist()
    assert found == pytest.approx(wanted, abs=2e-5)


def test_every_row_follows_its_own_params():
    logits = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(), SamplingParams(temperature=1.0, top_k=3), SamplingParams(temperature=0.5, top_p=0.5)]
    together = distributions(logits, Sampling.of(params))
    for row in range(3):
        assert torch.equal(together[row], distributions(logits[row : row + 1], Sampling.of(params[row : row + 1]))[0])
    assert together[0].sum(-1).tolist() == [1, 1]
    assert torch.equal(together[0].argmax(-1), logits[0].argmax(-1))
    assert (together[1] > 0).sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
def test_low_temperature_becomes_greedy(temperature):
    logits = torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)) * 30
    probs = distributions(logits, Sampling.of([SamplingParams(temperature=temperature)]))
    assert torch.equal(probs, distributions(logits, Sampling.of([SamplingParams()])))


def test_impossible_tokens_stay_impossible():
    """Padding of a narrower draft is -inf; neither temperature nor top-p may bring it back."""
    logits = torch.tensor([[[1.0, 0.5, -math.inf, -math.inf]]])
    for params in (SamplingParams(), SamplingParams(temperature=9.0), SamplingParams(temperature=2.0, top_k=3, top_p=0.99)):
        assert distributions(logits, Sampling.of([params]))[0, 0, 2:].tolist() == [0, 0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any), st.floats(0, ALMOST_ONE, width=32))
def test_draw_inverts_the_cumulative_distribution(weights, uniform):
    probs = torch.tensor([weights], dtype=torch.float32) / sum(weights)
    token = int(draw(probs, torch.tensor([uniform])))
    assert weights[token] > 0
    below = sum(weights[:token]) / sum(weights)
    assert below - 1e-6 <= uniform <= below + weights[token] / sum(weights) + 1e-6


def test_draw_spreads_evenly_spaced_numbers_as_the_distribution_does():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    uniforms = (torch.arange(1000) + 0.5) / 1000
    tokens = draw(probs.expand(1000, -1), uniforms)
    assert torch.bincount(tokens, minlength=5).tolist() == [500, 0, 300, 200, 0]


@pytest.mark.parametrize("uniform, wanted", [(0.0, 1), (ALMOST_ONE, 3)])
def test_draw_at_the_ends(uniform, wanted):
    assert draw(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]), torch.tensor([uniform])).tolist() == [wanted]
