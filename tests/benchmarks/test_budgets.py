"""Budgets by layer and head: totals, the fit, and the rounds against the engine's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from benchmarks.given import Document, Given, prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import budgets
from outrider.config import Budget
from outrider.decoding.pair import make_selector
from outrider.decoding.teacher_forced import TeacherForced
from outrider.ops import sparse_attention

L, HEADS, N, T = 3, 2, 240, 3
BUDGET = Budget(sinks=2, recent=4)


def ranked_of(seed: int, n: int = N) -> budgets.Ranked:
    """A round whose lists have flat and peaked masses."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 4, L * HEADS).view(L, HEADS, 1)
    mass = (spread * torch.randn(L, HEADS, n + T, generator=generator)).softmax(-1)
    return budgets.Ranked.of(Given(tokens=torch.zeros(1, T), length=n, mass=mass), BUDGET)


def fit_of(keep: float, seed: int = 0) -> budgets.Fit:
    """As if fitted: shares of that mean, some small, some large."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(L, HEADS, generator=generator) + 0.1
    shares = {(name, keep): raw / raw.mean() * keep for name in ("recall", "output", "weighted output", "kl", "kl by layer")}
    return budgets.Fit(shares=shares, top_p={keep: 0.5}, weights={keep: raw})


def test_order_puts_what_every_list_holds_first():
    ranked = ranked_of(0)
    assert ranked.forced == 6
    assert (ranked.order[..., :6].sort(-1).values == torch.tensor([0, 1, N - 4, N - 3, N - 2, N - 1])).all()
    assert (ranked.order.sort(-1).values == torch.arange(N)).all()
    assert (ranked.mass[..., 6:].diff(dim=-1) <= 0).all()
    lists = ranked.select(torch.tensor([[7, 30]]), [1])
    assert lists.layers == (1,) and lists.counts.tolist() == [[[7, 30]]]
    for head, count in enumerate((7, 30)):
        kept = lists.indices[0, 0, head]
        assert kept[:count].tolist() == sorted(ranked.order[1, head, :count].tolist())
        assert (kept[count:] == -1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.sampled_from([0.03, 0.1, 0.35, 0.8]))
def test_all_have_one_total(seed, keep):
    ranked, fit = ranked_of(seed), fit_of(keep, seed)
    total = L * HEADS * max(math.ceil(N * keep), 6)
    for name, counts in budgets.VARIANTS.items():
        found = counts(ranked, keep, fit)
        assert found.shape == (L, HEADS)
        assert int(found.min()) >= 6 and int(found.max()) <= N, name
        if name != "top-p":
            assert int(found.sum()) == total, name
    assert budgets.VARIANTS["threshold by layer"](ranked, keep, fit).sum(1).unique().tolist() == [total // L]


def test_a_threshold_holds_the_most_mass_and_one_share_the_most_of_the_least():
    ranked, keep = ranked_of(1), 0.2
    held, shares = {}, {}
    for name in ("flat", "threshold", "top-p of the round"):
        counts = budgets.VARIANTS[name](ranked, keep, fit_of(keep))
        held[name] = torch.stack([ranked.mass[i, j, : counts[i, j]].sum() for i in range(L) for j in range(HEADS)])
        shares[name] = [ranked.held().gather(-1, counts[..., None] - 1 + more) for more in (0, 1)]
    assert held["threshold"].sum() > held["flat"].sum() > held["top-p of the round"].sum()
    last, following = shares["top-p of the round"]
    assert last.max() <= following.min()  # nobody has a token beyond the common share, nor lacks one below it
    assert last.min() > shares["flat"][0].min()
    assert held["threshold"].sum() == pytest.approx(float(best_mass(ranked, keep)), rel=1e-5)


def best_mass(ranked: budgets.Ranked, keep: float) -> torch.Tensor:
    free = ranked.mass[..., ranked.forced :].flatten().sort(descending=True).values
    extra = ranked.total(keep) - L * HEADS * ranked.forced
    return ranked.mass[..., : ranked.forced].sum() + free[:extra].sum()


def test_top_p_is_calibrated_to_the_budget():
    rounds = [ranked_of(seed) for seed in range(5)]
    share = budgets.share_holding(rounds, 0.2)
    kept = sum(int(budgets.holding(one, share).sum()) for one in rounds)
    assert kept == pytest.approx(sum(one.total(0.2) for one in rounds), abs=2 * L * HEADS * 5)
    for one in rounds:
        counts = budgets.holding(one, share)
        for i, j in itertools.product(range(L), range(HEADS)):
            row = one.mass[i, j].double()
            assert row[: counts[i, j]].sum() >= share * row.sum() - 1e-12
            if counts[i, j] > one.forced:
                assert row[: counts[i, j] - 1].sum() < share * row.sum()


def test_shares_are_divided_above_the_least_one_tried():
    costs = torch.tensor([[[4.0, 1.0, 0.0]], [[2.0, 1.9, 0.0]]])
    found = budgets.best_shares([0.1, 0.2, 1.0], costs, 0.3)
    assert found.flatten().tolist() == pytest.approx([0.2, 0.4])


def test_looking_sees_what_lists_would_have_done():
    generator = torch.Generator().manual_seed(3)
    ranked, d = ranked_of(4), 8
    queries = torch.randn(1, T, 2 * HEADS, d, generator=generator)
    keys, values = (torch.randn(1, N + T, HEADS, d, generator=generator) for _ in range(2))
    looking = budgets.Looking(ranked=[ranked])
    looking.begin(None, 0)
    assert looking.of(1, queries) == (None, None)
    lengths = torch.tensor([N])
    dense = sparse_attention(queries, keys, values, None, None, lengths, scale=0.3)
    assert torch.equal(looking.attend(queries, keys, values, None, None, lengths, scale=0.3), dense)
    held, errors = looking.held[0][0], looking.errors[0]
    assert held.shape == (HEADS, N) and torch.allclose(held[:, -1], torch.ones(HEADS))
    assert (held.diff(dim=1) >= 0).all() and (errors[:, -1] < 1e-10).all()
    for column in (4, 8, 11):  # as the op itself computes them
        count = max(math.ceil(budgets.SHARES[column] * N), ranked.forced)
        lists = ranked.select(torch.full((1, HEADS), count), [1])
        out = sparse_attention(queries, keys, values, *lists.of(1), lengths, scale=0.3)
        wanted = (out - dense).square().unflatten(2, (HEADS, -1)).sum((0, 1, 3, 4)) / dense.square().sum()
        assert torch.allclose(errors[:, column], wanted, rtol=1e-3, atol=1e-9)


def test_flat_rounds_are_those_of_the_evaluation(builtin_pair, builtin_alignment, book):
    """The same lists, logits and bytes as `outrider eval` has for method outrider with one budget for all."""
    tokens = builtin_pair[0].tokenizer(book)["input_ids"][:560]
    document = Document(builtin_pair, tokens[:500], 60, 4)
    rounds = document.rounds(tokens[500:])
    ranked = [budgets.Ranked.of(one, Budget()) for one in rounds]
    reading = budgets.Reading(ranked, lambda one: budgets.flat(one, 0.3, None), document.target.spec.full_layers)
    ran = document.run(rounds, reading)
    alignment = builtin_alignment.map("joint+divergence").alignment
    selector = make_selector(
        *builtin_pair, "outrider", alignment, Budget(keep=0.3, min_context=0, allocation="flat", unlisted="none"), 4
    )
    reader = TeacherForced(builtin_pair, 560, 4)
    reader.read([tokens[:500]], 2048)
    [wanted] = reader.run([tokens[500:]], selector)
    assert torch.allclose(ran.logits, wanted.logits, atol=1e-3)
    assert ran.bytes_read / ran.bytes_dense == pytest.approx(wanted.kv_read_fraction)
    assert float(torch.stack(reading.shares).mean()) == pytest.approx(wanted.kept_fraction, rel=1e-4)


def test_rows_of_a_text(builtin_pair, book, monkeypatch):
    """Fitted and compared on one text with a planted fact; budgets of everything are dense."""
    monkeypatch.setattr(budgets, "Budget", lambda: BUDGET)
    monkeypatch.setattr(budgets, "KL_SHARES", (0.02, 1.0))
    monkeypatch.setattr(budgets, "SHARES", (0.02, 0.1, 0.3, 1.0))
    tokens = builtin_pair[0].tokenizer(book)["input_ids"][:400]
    quiet = lambda *step: None  # noqa: E731
    document, following, _ = prepare(builtin_pair, tokens, 5, 0, 4, 0)
    fit = budgets.fit(document, following, [0.25], quiet)
    for shares in fit.shares.values():
        assert float(shares.mean()) == pytest.approx(0.25, abs=1e-6)
    cases = [(name, 0.25) for name in ("flat", "top-p", "fitted to KL", "weighted squares")]
    rows = list(budgets.compare(*prepare(builtin_pair, tokens, 10, 1, 4, 0), cases, fit, quiet))
    assert [(row["budgets"], row["keep"]) for row in rows] == cases
    for row in rows:
        assert row["scored"] == 9 and row["asked"] == 1 and 0 < row["kl"] < 2 and 0 < row["held"] < 1
        assert row["kept_fraction"] == pytest.approx(0.25, abs=0.005) or row["budgets"] == "top-p"
        assert len(row["shares"]) == 6 and len(row["shares"][0]) == 2
