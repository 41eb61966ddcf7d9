"""token_verify: the law of speculative sampling by chi-square, and its edges one by one. All draws have fixed seeds."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import token_verify

DRAFT = torch.tensor([[0.30, 0.25, 0.20, 0.15, 0.10, 0.00], [0.05, 0.05, 0.10, 0.30, 0.25, 0.25]])
TARGET = torch.tensor(
    [[0.10, 0.35, 0.05, 0.20, 0.00, 0.30], [0.25, 0.05, 0.30, 0.10, 0.30, 0.00], [0.40, 0.00, 0.10, 0.20, 0.05, 0.25]]
)
DRAWS = 200_000


def one_hot(tokens: list[int], V: int = 6) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float().unsqueeze(0)


def assert_follows(tokens: Tensor, probs: Tensor) -> None:
    """Chi-square test of counts against probabilities at a level of 1e-4; tokens of probability 0 must not occur."""
    probs = probs.double() / probs.double().sum()
    observed = torch.bincount(tokens, minlength=len(probs)).double()
    possible = probs > 0
    assert not observed[~possible].any()
    expected = probs[possible] * observed.sum()
    statistic = ((observed[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"


@pytest.fixture(scope="module")
def rounds() -> tuple[Tensor, Tensor, Tensor]:
    """Many independent rounds of K = 2: drafted tokens, accepted, next token."""
    torch.manual_seed(0)
    tokens = torch.stack([torch.multinomial(row, DRAWS, replacement=True) for row in DRAFT], dim=1)
    uniforms = torch.rand(DRAWS, 3)
    verified = token_verify(tokens, DRAFT.expand(DRAWS, 2, 6), TARGET.expand(DRAWS, 3, 6), uniforms)
    return tokens, verified.accepted, verified.next_token


def test_first_emitted_token_follows_the_target(rounds):
    tokens, accepted, next_token = rounds
    assert_follows(torch.where(accepted > 0, tokens[:, 0], next_token), TARGET[0])


def test_second_emitted_token_follows_the_target(rounds):
    tokens, accepted, next_token = rounds
    emitted = torch.where(accepted > 1, tokens[:, 1], next_token)
    assert_follows(emitted[accepted > 0], TARGET[1])


def test_bonus_token_follows_the_target(rounds):
    _, accepted, next_token = rounds
    assert_follows(next_token[accepted == 2], TARGET[2])


@pytest.mark.parametrize("position", [0, 1])
def test_accepted_and_recovered_tokens_follow_their_own_laws(rounds, position):
    tokens, accepted, next_token = rounds
    draft, target = DRAFT[position], TARGET[position]
    assert_follows(tokens[accepted > position, position], torch.minimum(draft, target))
    assert_follows(next_token[accepted == position], (target - draft).clamp(min=0))
    rate = (accepted > position).sum() / (accepted >= position).sum()
    assert abs(rate - torch.minimum(draft, target).sum()) < 0.006


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24], ids=["lowest", "middle", "highest"])
@pytest.mark.parametrize(
    ("drafted", "wanted", "accepted", "next_token"),
    [
        pytest.param([3, 1, 5], [3, 1, 5, 0], 3, 0, id="all_agree"),
        pytest.param([3, 1, 5], [2, 1, 5, 0], 0, 2, id="first_differs"),
        pytest.param([3, 1, 5], [3, 1, 4, 0], 2, 4, id="last_differs"),
        pytest.param([3, 1, 5], [3, 0, 5, 0], 1, 0, id="agreement_after_a_rejection_is_void"),
        pytest.param([], [5], 0, 5, id="nothing_drafted"),
    ],
)
def test_greedy_is_exact_for_all_uniforms(drafted, wanted, accepted, next_token, u):
    K = len(drafted)
    draft = one_hot(drafted) if K else torch.zeros(1, 0, 6)
    tokens = torch.tensor([drafted], dtype=torch.int64)
    got = token_verify(tokens, draft, one_hot(wanted), torch.full((1, K + 1), u))
    assert (got.accepted.tolist(), got.next_token.tolist()) == ([accepted], [next_token])
    assert got.accepted.dtype == got.next_token.dtype == torch.int64


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24], ids=["lowest", "middle", "highest"])
def test_equal_distributions_accept_everything(u):
    torch.manual_seed(0)
    probs = torch.rand(4, 6, 11).softmax(-1)
    tokens = torch.randint(0, 11, (4, 5))
    assert (token_verify(tokens, probs[:, :5], probs, torch.full((4, 6), u)).accepted == 5).all()


def test_a_residual_lost_to_rounding_falls_back_to_the_target():
    """The target's rows sum to less than the draft's: nowhere is it above the draft, and yet a token is rejected."""
    draft = torch.tensor([[[0.5, 0.5, 0.0]]])
    target = torch.tensor([[[0.0, 0.4999999, 0.0], [1.0, 0.0, 0.0]]])
    got = token_verify(torch.tensor([[0]]), draft, target, torch.tensor([[0.9, 0.3]]))
    assert (got.accepted.item(), got.next_token.item()) == (0, 1)


def test_a_token_the_target_cannot_emit_is_always_rejected():
    draft, target = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    got = token_verify(torch.tensor([[0]]), draft, target, torch.zeros(1, 2))
    assert (got.accepted.item(), got.next_token.item()) == (0, 1)


def test_inverse_cdf_of_the_bonus_token():
    target = torch.tensor([[[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]])
    expected = {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, 1 - 2**-24: 4}
    for u, token in expected.items():
        got = token_verify(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0, 6), target, torch.tensor([[u]]))
        assert got.next_token.item() == token


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 4), K=st.integers(0, 4), V=st.sampled_from([1, 2, 7, 1001]), seed=st.integers(0, 999))
def test_every_row_is_a_loop_over_its_tokens(B, K, V, seed):
    generator = torch.Generator().manual_seed(seed)
    sparse = (torch.rand(2, B, K + 1, V, generator=generator) < 0.5).float()
    sparse[..., 0] += 1e-3
    draft, target = sparse / sparse.sum(-1, keepdim=True)
    tokens = torch.multinomial(draft.view(-1, V), 1, generator=generator).view(B, K + 1)[:, :K]
    uniforms = torch.rand(B, K + 1, generator=generator)
    got = token_verify(tokens, draft[:, :K], target, uniforms)
    for b in range(B):
        accepted = 0
        while accepted < K:
            token = tokens[b, accepted].item()
            if uniforms[b, accepted].item() * draft[b, accepted, token].item() >= target[b, accepted, token].item():
                break
            accepted += 1
        assert got.accepted[b] == accepted
        weights = [float(x) for x in target[b, accepted]]
        if accepted < K:
            weights = [max(t - float(d), 0.0) for t, d in zip(weights, draft[b, accepted], strict=True)]
        running = list(accumulate(weights))
        token = next(i for i, value in enumerate(running) if value > uniforms[b, K].item() * running[-1])
        assert got.next_token[b] == token
        assert target[b, accepted, token] > 0


def test_arguments_are_left_as_they_were():
    args = (torch.tensor([[0, 4]]), DRAFT.unsqueeze(0).clone(), TARGET.unsqueeze(0).clone(), torch.rand(1, 3))
    before = [x.clone() for x in args]
    token_verify(*args)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


BAD = [
    pytest.param({"draft_tokens": torch.zeros(1, 2).int()}, TypeError, "draft_tokens: expected dtype int64", id="tokens_dtype"),
    pytest.param({"draft_tokens": torch.tensor([[0, 6]])}, ValueError, r"draft_tokens: .* 0 \.\. 5, got 0 \.\. 6", id="tokens"),
    pytest.param({"draft_probs": torch.zeros(1, 3, 6)}, ValueError, "draft_probs: .* with B=1, K=2", id="draft_probs"),
    pytest.param(
        {"target_probs": torch.zeros(1, 2, 6)}, ValueError, r"target_probs: .*K\+1=3.* got \[1, 2, 6\]", id="no_bonus"
    ),
    pytest.param({"target_probs": torch.zeros(1, 3, 6).half()}, TypeError, "target_probs: expected dtype float32", id="half"),
    pytest.param({"uniforms": torch.zeros(1, 2)}, ValueError, "uniforms: .*", id="uniforms"),
    pytest.param({"backend": "triton"}, ValueError, "backend: expected one of 'auto', 'reference'", id="no_fall_back"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    good = {
        "draft_tokens": torch.tensor([[0, 4]]),
        "draft_probs": DRAFT.unsqueeze(0),
        "target_probs": TARGET.unsqueeze(0),
        "uniforms": torch.zeros(1, 3),
    }
    token_verify(**good)
    with pytest.raises(error, match=message):
        token_verify(**(good | change))
