"""Corrections for unlisted tokens: their estimates against dense attention, and the rounds against the engine's."""

from __future__ import annotations

import pytest
import torch
from benchmarks.given import Document, Given, prepare
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import tail_correction as tail
from outrider.config import Budget
from outrider.decoding.pair import make_selector
from outrider.decoding.teacher_forced import TeacherForced
from outrider.ops import sparse_attention

N, T, HEADS, GROUP, D = 60, 3, 2, 2, 8
BUDGET = Budget(sinks=2, recent=4, min_context=0)


@pytest.fixture
def attend(monkeypatch):
    """`attend(name or Correction, keep, keys, values)`: output [T, Hq, D] of a round, the dense one, and the reader."""

    def run(correction, keep: float, keys: Tensor, values: Tensor, fit: tail.Fit | None = None, fitting: bool = False):
        if isinstance(correction, tail.Correction):
            monkeypatch.setitem(tail.CORRECTIONS, "made here", correction)
            correction = "made here"
        generator = torch.Generator().manual_seed(1)
        queries = torch.randn(1, T, HEADS * GROUP, D, generator=generator)
        mass = torch.rand(1, HEADS, N + T, generator=generator)
        reader = tail.Reader(tail.Case(name=correction, keep=keep), BUDGET, fit or tail.Fit(), 0, fitting)
        reader.begin(Given(tokens=torch.zeros(1, T), length=N, mass=mass), 0)
        reader.of(0, queries)
        given = queries, keys[None], values[None]
        dense = sparse_attention(*given, None, None, torch.tensor([N]), scale=0.3)
        return reader.attend(*given, scale=0.3)[0], dense[0], reader

    return run


@pytest.fixture
def cache() -> tuple[Tensor, Tensor]:
    """Keys and values [N + T, Hkv, D] at random."""
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(N + T, HEADS, D, generator=generator) for _ in range(2))


@pytest.mark.parametrize("name", [name for name, each in tail.CORRECTIONS.items() if each.summary is None])
def test_with_room_for_every_token_all_samples_are_dense(attend, cache, name):
    out, dense, reader = attend(name, 1.0, *cache)
    assert (out - dense).abs().max() < 1e-5
    assert reader.errors[0][0] < 1e-5


def test_a_tail_of_one_token_repeated_is_what_its_centroid_says(attend, cache):
    """All unlisted rows alike: mean key, mean value and their number say everything."""
    keys, values = (x.clone() for x in cache)
    keys[2 : N - 4], values[2 : N - 4] = keys[2], values[2]
    for name in ("centroid", "mean, true share", "pages of 256, true share"):
        out, dense, _ = attend(name, 0.2, keys, values)
        assert (out - dense).abs().max() < 1e-4, name
    plain, dense, _ = attend("none", 0.2, keys, values)
    assert (plain - dense).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name, each in tail.CORRECTIONS.items() if each.fitted and not each.page])
def test_what_is_fitted_on_a_round_serves_that_round_better(attend, cache, name):
    """Shares are least squares, so never worse where they are fitted; offsets need not be, but are here."""
    fit = tail.Fit()
    out, dense, _ = attend(name, 0.3, *cache, fit, fitting=True)
    assert torch.allclose(out, dense, atol=1e-5)  # while fitting, what follows sees dense outputs
    fitted, _, _ = attend(name, 0.3, *cache, fit)
    plain, _, _ = attend("none", 0.3, *cache)
    assert (fitted - dense).norm() < (plain - dense).norm()


def test_a_learned_value_is_found_where_there_is_one():
    """Outputs that lack a known share of a known value, by head: regression gives both back, of features of any size."""
    generator = torch.Generator().manual_seed(3)
    out = torch.randn(HEADS, GROUP, 50, D, generator=generator)
    value, weight = torch.randn(HEADS, GROUP, 1, D, generator=generator), torch.rand(HEADS, GROUP, generator=generator) + 0.1
    feature = torch.rand(HEADS, GROUP, 50, generator=generator)
    missing = (weight[..., None] * feature)[..., None] * (value - out)
    flat = [x.flatten(1, 2) for x in (feature, out, missing)]
    fit = tail.Fit()
    fit.add(0, *(term.unflatten(1, (GROUP, -1)) for term in tail.moments([flat[0]], *flat[1:], torch.zeros(()))))
    found_weight, found_value = tail.learned(*fit.sums[0])
    torch.testing.assert_close(found_weight, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found_value, value[:, :, 0], rtol=1e-2, atol=1e-3)
    with_known = tail.squares([flat[0]], *flat[1:], value.expand_as(out).flatten(1, 2))
    fit.add(1, *(term.unflatten(1, (GROUP, -1)) for term in with_known))
    torch.testing.assert_close(tail.solved(fit.sums[1])[0], weight, rtol=1e-3, atol=1e-4)


@given(st.integers(1, 30), st.integers(0, 1000), st.booleans())
@settings(max_examples=50, deadline=None)
def test_samples_have_distinct_tokens_of_positive_size(count, seed, in_order):
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(HEADS, 50, generator=generator) ** 4
    size[:, :15] = 0
    chosen, chance = tail.sample(size, count, in_order, generator)
    assert chosen.shape == chance.shape == (HEADS, count)
    for row, probabilities, sizes in zip(chosen, chance, size, strict=True):
        assert len(row.unique()) == count
        assert bool((sizes[row] > 0).all() and (probabilities > 0).all() and (probabilities <= 1).all())
    wanted = tail.inclusion(size.double(), count)
    assert torch.allclose(wanted.sum(1), torch.tensor(float(count), dtype=torch.float64))
    assert torch.allclose(wanted.gather(1, chosen).float(), chance)


@pytest.mark.parametrize("in_order", [True, False])
def test_sampled_sums_are_unbiased(in_order):
    """Horvitz-Thompson: the mean over draws of what is sampled, over its probability, is the sum of all; within 5 errors."""
    generator = torch.Generator().manual_seed(0)
    size, x = torch.rand(1, 40, generator=generator) ** 2, torch.randn(40, generator=generator)
    sums = []
    for _ in range(1500):
        chosen, chance = tail.sample(size, 8, in_order, generator)
        sums.append(float((x[chosen] / chance).sum()))
    found = torch.tensor(sums)
    assert abs(float(found.mean() - x.sum())) < 5 * float(found.std()) / 1500**0.5
    assert found.std() > 0.1


def test_sums_kept_up_over_rounds_are_those_of_all_unlisted_rows(attend, cache):
    keys, values = cache
    _, _, reader = attend("mean, true share", 0.3, keys, values)
    rows, listed = values.transpose(0, 1), torch.tensor([[0, 5, 61], [1, 2, 3]])
    found = reader._unlisted("values", rows, listed, tail.row_sum)
    for head in range(HEADS):
        left = [i for i in range(N + T) if i not in listed[head].tolist()]
        assert torch.allclose(found[head, 0], rows[head, left].sum(0), atol=1e-5)


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.5])
def test_all_corrections_read_as_much(keep):
    """Of the rows that a budget allows at most one is left over by each."""
    given = Given(tokens=torch.zeros(1, 5), length=16000, mass=torch.zeros(6, 2, 1))
    for name, correction in tail.CORRECTIONS.items():
        reader = tail.Reader(tail.Case(name=name, keep=keep), Budget(), tail.Fit(), 0)
        assert 16000 * keep - 1 < reader.begin(given, 0) / 12 <= 16000 * keep, (name, correction)


def test_rounds_without_a_correction_are_those_of_the_evaluation(builtin_pair, builtin_alignment, book):
    """The same lists, logits and bytes as `outrider eval` has for method outrider."""
    tokens = builtin_pair[0].tokenizer(book)["input_ids"][:560]
    document = Document(builtin_pair, tokens[:500], 60, 4)
    case = tail.Case(name="none", keep=0.3)
    ran = document.run(document.rounds(tokens[500:]), tail.Reader(case, Budget(), tail.Fit(), 0))
    alignment = builtin_alignment.map("joint+divergence").alignment
    budget = Budget(keep=0.3, min_context=0, allocation="flat", unlisted="none")
    selector = make_selector(*builtin_pair, "outrider", alignment, budget, 4)
    reader = TeacherForced(builtin_pair, 560, 4)
    reader.read([tokens[:500]], 2048)
    [wanted] = reader.run([tokens[500:]], selector)
    assert torch.allclose(ran.logits, wanted.logits, atol=1e-3)
    assert ran.bytes_read / ran.bytes_dense == pytest.approx(wanted.kv_read_fraction)


def test_rows_of_a_text(builtin_pair, book, monkeypatch):
    """Every case has its row, on one text with planted facts; an untouched budget is dense."""
    tokens = builtin_pair[0].tokenizer(book)["input_ids"][:400]
    monkeypatch.setattr(tail, "Budget", lambda: BUDGET)
    cases = [tail.Case(name=name, keep=0.5, lists=lists) for name in ("none", "mean, fixed share") for lists in tail.LISTS]
    quiet = lambda *step: None  # noqa: E731
    document, following, _ = prepare(builtin_pair, tokens, 20, 0, 4, 0)
    fits = tail.fit(document, following, cases, 0, quiet)
    rows = list(tail.compare(*prepare(builtin_pair, tokens, 20, 1, 4, 0), fits, 0, quiet))
    assert [(row["correction"], row["lists"]) for row in rows] == [(case.name, case.lists) for case in cases]
    for row in rows:
        assert row["scored"] == 19 and row["asked"] == 1 and len(row["output_error_by_layer"]) == 6
        assert abs(row["delta_percent"]) < 20 and 0 < row["output_error"] < 0.5
