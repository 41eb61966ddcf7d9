"""token_select against an oracle that sorts, and with sorting forbidden."""

from __future__ import annotations

import importlib
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import TokenLists, token_select

ONE_ROW = torch.zeros(1, 1, 1, dtype=torch.int64)


def lists_of(lists: TokenLists) -> list:
    """Nested python lists `[Lt][B][Hs]` of the kept positions, once the form of the result is checked."""
    indices, counts = lists
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape[:-1] == counts.shape
    used = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    assert (indices[~used] == -1).all()
    flat = [row[:count].tolist() for row, count in zip(indices.flatten(0, 2), counts.flatten().tolist(), strict=True)]
    assert all(a < b for row in flat for a, b in pairwise(row)), "ascending, without repeats"
    Lt, B, Hs = counts.shape
    return [[[flat[(layer * B + b) * Hs + h] for h in range(Hs)] for b in range(B)] for layer in range(Lt)]


def merge_rows(scores: Tensor, sources: list[int], how: str) -> list[Fraction]:
    """One merged row, exact; the scores of these tests merge without rounding."""
    rows = [[Fraction(v) for v in scores[source].tolist()] for source in sources]
    return [max(column) if how == "max" else sum(column) / len(column) for column in zip(*rows, strict=True)]


def oracle(row: list[Fraction], length: int, *, top_k=None, top_p=None, sinks=0, recent=0) -> list[int]:
    """Sort by descending score, then position; take from the front what is needed."""
    forced = [i for i in range(length) if i < sinks or i >= length - recent]
    others = sorted(set(range(length)) - set(forced), key=lambda i: (-row[i], i))
    if top_k is not None:
        return sorted(forced + others[: max(top_k - len(forced), 0)])
    if top_p >= 1:
        return list(range(length))
    mass, wanted, kept = sum(row[i] for i in forced), Fraction(top_p) * sum(row[:length]), list(forced)
    for i in others:
        if mass >= wanted:
            break
        mass += row[i]
        kept.append(i)
    return sorted(kept)


@st.composite
def cases(draw):
    """Scores from few values (so with many ties), some beyond the length; G a power of two, so that means are exact."""
    B, R, S = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 24))
    values = st.sampled_from(draw(st.sampled_from([[0], [3], [0, 1], [0, 1, 2, 7], [0, 2**-20, 1, 2**20]])))
    scores = torch.tensor(draw(st.lists(values, min_size=B * R * S, max_size=B * R * S)), dtype=torch.float32)
    lengths = draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
    Lt, Hs, G = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    sources = draw(st.lists(st.integers(0, R - 1), min_size=Lt * Hs * G, max_size=Lt * Hs * G))
    options = {name: draw(st.sampled_from([0, 0, 1, 2, 5, 40])) for name in ("sinks", "recent")}
    options["merge"] = draw(st.sampled_from(["mean", "max"]))
    return scores.view(B, R, S), torch.tensor(lengths), torch.tensor(sources).view(Lt, Hs, G), options


def check_against_oracle(scores, lengths, sources, options, *, name, per_sequence, value):
    got = lists_of(token_select(scores, lengths, sources, **{name: value}, **options))
    forced = {"sinks": options["sinks"], "recent": options["recent"]}
    for layer, heads in enumerate(sources.tolist()):
        for b, length in enumerate(lengths.tolist()):
            for h, rows in enumerate(heads):
                expected = oracle(merge_rows(scores[b], rows, options["merge"]), length, **{name: per_sequence[b]}, **forced)
                assert got[layer][b][h] == expected


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_top_k_is_exact(case, data):
    _, lengths, _, _ = case
    ks = data.draw(st.lists(st.integers(0, 30), min_size=len(lengths), max_size=len(lengths)))
    check_against_oracle(*case, name="top_k", per_sequence=ks, value=torch.tensor(ks, dtype=torch.int32))
    check_against_oracle(*case, name="top_k", per_sequence=[ks[0]] * len(ks), value=ks[0])


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_each_list_may_have_its_own_budget(case, data):
    scores, lengths, sources, options = case
    shape = (len(sources), len(lengths), sources.shape[1])
    name, values = data.draw(
        st.sampled_from([("top_k", st.integers(0, 30)), ("top_p", st.integers(0, 17).map(lambda n: n / 16))])
    )
    size = shape[0] * shape[1] * shape[2]
    own = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))).view(shape)
    own = own.double() if name == "top_p" else own
    got = lists_of(token_select(scores, lengths, sources, **{name: own}, **options))
    forced = {"sinks": options["sinks"], "recent": options["recent"]}
    for layer, heads in enumerate(sources.tolist()):
        for b, length in enumerate(lengths.tolist()):
            for h, rows in enumerate(heads):
                budget = {name: own[layer, b, h].item()}
                row = merge_rows(scores[b], rows, options["merge"])
                assert got[layer][b][h] == oracle(row, length, **budget, **forced)


@settings(max_examples=50, deadline=None)
@given(case=cases(), data=st.data())
def test_top_p_is_exact(case, data):
    _, lengths, _, _ = case
    share = st.integers(0, 17).map(lambda n: n / 16)  # exact in binary, and once above 1
    ps = data.draw(st.lists(share, min_size=len(lengths), max_size=len(lengths)))
    check_against_oracle(*case, name="top_p", per_sequence=ps, value=torch.tensor(ps))
    check_against_oracle(*case, name="top_p", per_sequence=[ps[0]] * len(ps), value=ps[0])


def softmax_like(B: int, R: int, S: int, dtype=torch.float32) -> Tensor:
    torch.manual_seed(0)
    return (4 * torch.randn(B, R, S)).softmax(-1).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=["fp64", "fp32", "bf16", "fp16"]
)
def test_top_k_keeps_the_k_best_of_long_rows(dtype):
    scores, lengths = softmax_like(2, 3, 3001, dtype), torch.tensor([3001, 1500])
    got = lists_of(token_select(scores, lengths, torch.arange(3).view(1, 3, 1), top_k=300))
    for b, length in enumerate(lengths.tolist()):
        for h in range(3):
            best = scores[b, h, :length].double().sort(descending=True, stable=True).indices[:300]
            assert got[0][b][h] == best.sort().values.tolist()


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_top_p_keeps_the_mass_and_not_a_token_more(dtype, p):
    scores, lengths = softmax_like(2, 3, 3001, dtype), torch.tensor([3001, 1500])
    got = lists_of(token_select(scores, lengths, torch.arange(3).view(1, 3, 1), top_p=p, sinks=2, recent=5))
    for b, length in enumerate(lengths.tolist()):
        for h in range(3):
            row, kept = scores[b, h, :length].double(), got[0][b][h]
            forced = {*range(2), *range(length - 5, length)}
            assert forced <= set(kept)
            assert row[kept].sum() >= p * row.sum() - 1e-12
            free = [i for i in kept if i not in forced]
            if p < 1 and free:
                assert row[kept].sum() - row[free].min() < p * row.sum() + 1e-12
                others = [i for i in range(length) if i not in kept]
                assert row[others].max() <= row[free].min()
            if p == 1:
                assert len(kept) == length


def test_mean_of_rows_is_taken_in_float32():
    scores, sources = softmax_like(1, 3, 500), torch.tensor([[[0, 1, 2]]])
    got = lists_of(token_select(scores, torch.tensor([500]), sources, top_k=50))[0][0][0]
    merged = (scores[0, 0] + scores[0, 1] + scores[0, 2]) / 3
    assert got == merged.sort(descending=True, stable=True).indices[:50].sort().values.tolist()


def test_extreme_scores_are_told_apart():
    tiny, huge = 2**-149, 3.4e38  # the smallest denormal and nearly the largest float
    scores = torch.tensor([[[0.0, tiny, 2 * tiny, 1.0, huge, torch.inf]]])
    for k in range(7):
        got = lists_of(token_select(scores, torch.tensor([6]), ONE_ROW, top_k=k))
        assert got == [[[list(range(6 - k, 6))]]]


def test_negative_and_nan_scores_count_as_zero():
    scores = torch.tensor([[[torch.nan, -1.0, 0.5, -torch.inf, -0.0, 0.25, torch.nan]]])
    lengths = torch.tensor([6])
    assert lists_of(token_select(scores, lengths, ONE_ROW, top_k=3)) == [[[[0, 2, 5]]]]
    assert lists_of(token_select(scores, lengths, ONE_ROW, top_k=5)) == [[[[0, 1, 2, 3, 5]]]]
    assert lists_of(token_select(scores, lengths, ONE_ROW, top_p=0.9)) == [[[[2, 5]]]]
    two_rows = torch.tensor([[[-9.0, 1.0, 0.0], [8.0, 2.0, torch.nan]]])  # merged: 4, 1.5, 0
    assert lists_of(token_select(two_rows, torch.tensor([3]), torch.tensor([[[0, 1]]]), top_k=1)) == [[[[0]]]]


def test_scores_behind_the_length_are_ignored():
    scores = softmax_like(1, 1, 50)
    expected = token_select(scores, torch.tensor([20]), ONE_ROW, top_p=0.9)
    for junk in (torch.nan, torch.inf, 1e9, -1.0):
        scores[..., 20:] = junk
        assert torch.equal(token_select(scores, torch.tensor([20]), ONE_ROW, top_p=0.9).indices, expected.indices)


def test_rows_without_mass():
    zeros = torch.zeros(1, 1, 9)
    assert lists_of(token_select(zeros, torch.tensor([9]), ONE_ROW, top_p=0.9, sinks=1, recent=2)) == [[[[0, 7, 8]]]]
    assert lists_of(token_select(zeros, torch.tensor([9]), ONE_ROW, top_p=1.0)) == [[[list(range(9))]]]
    assert lists_of(token_select(zeros, torch.tensor([9]), ONE_ROW, top_k=3)) == [[[[0, 1, 2]]]]
    assert lists_of(token_select(zeros, torch.tensor([0]), ONE_ROW, top_k=3, sinks=2)) == [[[[]]]]


def test_a_sequence_in_a_ragged_batch_equals_the_same_alone():
    scores, lengths = softmax_like(3, 4, 200), torch.tensor([200, 0, 77])
    sources = torch.tensor([[[0, 1], [2, 3]], [[3, 3], [1, 0]]])
    for options in ({"top_k": 20}, {"top_p": 0.8}):
        together = lists_of(token_select(scores, lengths, sources, sinks=2, recent=3, **options))
        for b in range(3):
            alone = token_select(scores[b : b + 1], lengths[b : b + 1], sources, sinks=2, recent=3, **options)
            assert [layer[b] for layer in together] == [layer[0] for layer in lists_of(alone)]


def test_width_pads_and_is_never_exceeded():
    scores, lengths = softmax_like(2, 1, 40), torch.tensor([40, 5])
    tight = token_select(scores, lengths, ONE_ROW, top_k=10)
    wide = token_select(scores, lengths, ONE_ROW, top_k=10, width=16)
    assert tight.indices.shape == (1, 2, 1, 10)
    assert wide.indices.shape == (1, 2, 1, 16)
    assert lists_of(tight) == lists_of(wide)
    with pytest.raises(ValueError, match="width: expected at least the longest list's 10, got 9"):
        token_select(scores, lengths, ONE_ROW, top_k=10, width=9)


@pytest.mark.parametrize("options", [{"top_k": 30}, {"top_p": 0.9}], ids=["top_k", "top_p"])
def test_nothing_is_sorted(monkeypatch, options):
    """A sort of every row is what made sparse verification slower than dense in earlier work."""
    scores, lengths = softmax_like(2, 4, 300), torch.tensor([300, 100])
    expected = lists_of(token_select(scores, lengths, torch.arange(4).view(2, 1, 2), sinks=2, recent=3, **options))

    def refuse(*args, **kwargs):
        raise AssertionError("sorted")

    for name in ("sort", "argsort", "msort", "topk", "kthvalue", "quantile", "unique"):
        for owner in (torch, Tensor):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, refuse)
    assert lists_of(token_select(scores, lengths, torch.arange(4).view(2, 1, 2), sinks=2, recent=3, **options)) == expected


def test_arguments_are_left_as_they_were():
    scores = torch.tensor([[[0.5, torch.nan, -1.0, 0.25]]])
    before = scores.clone()
    token_select(scores, torch.tensor([3]), ONE_ROW, top_k=2, sinks=1)
    token_select(scores, torch.tensor([3]), ONE_ROW, top_p=0.5, sinks=1)
    assert torch.equal(scores.nan_to_num(9), before.nan_to_num(9))


def test_scores_of_any_strides():
    scores = softmax_like(2, 3, 40)
    strided = scores.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sources, lengths = torch.arange(3).view(3, 1, 1), torch.tensor([40, 11])
    assert lists_of(token_select(strided, lengths, sources, top_k=7)) == lists_of(
        token_select(scores, lengths, sources, top_k=7)
    )


class Kernel:
    """Stands in for a kernel: one that can run everything, and leaves its lists empty."""

    def __init__(self) -> None:
        self.widths: list[int] = []

    def obstacle(self, scores: Tensor, sources: Tensor) -> str | None:
        return None if scores.dtype == torch.float32 else "it takes float32"

    def token_select(self, scores: Tensor, lengths: Tensor, sources: Tensor, *, width: int, **options) -> tuple[Tensor, Tensor]:
        self.widths.append(width)
        shape = sources.shape[0], len(lengths), sources.shape[1]
        return torch.full((*shape, width), -1, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    fake = Kernel()
    monkeypatch.setattr(importlib.import_module("outrider.ops.token_select.api"), "_triton", lambda: fake)
    monkeypatch.delenv("OUTRIDER_DEBUG", raising=False)
    return fake


def test_values_are_checked_for_a_kernel_in_debug_mode_only(kernel, monkeypatch):
    scores, lengths, sources = torch.ones(1, 2, 9), torch.tensor([5]), torch.tensor([[[1]]])

    def run(lengths=lengths, sources=sources):
        token_select(scores, lengths, sources, top_k=2, backend="triton")

    for value in ("", "0"):
        monkeypatch.setenv("OUTRIDER_DEBUG", value)
        run(lengths=torch.tensor([10]))
        run(sources=torch.tensor([[[2]]]))
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    run()
    with pytest.raises(ValueError, match=r"lengths: expected values in 0 \.\. 9, got 10"):
        run(lengths=torch.tensor([10]))
    with pytest.raises(ValueError, match=r"lengths: expected values in 0 \.\. 9, got -1"):
        run(lengths=torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"sources: expected values in 0 \.\. 1, got 2"):
        run(sources=torch.tensor([[[2]]]))


@pytest.mark.parametrize(
    ("options", "width", "given"),
    [
        ({"top_k": 3}, 3, 3),
        ({"top_k": 3, "sinks": 2, "recent": 4}, 6, 6),
        ({"top_k": 30, "sinks": 2}, 9, 9),
        ({"top_k": torch.tensor([3])}, 9, 0),  # given: as long as the longest list of this kernel
        ({"top_p": 0.5}, 9, 0),
        ({"top_p": 0.5, "width": 4}, 4, 4),
        ({"top_k": 3, "width": 12}, 12, 12),
    ],
    ids=str,
)
def test_a_kernel_is_told_its_width(kernel, options, width, given):
    lists = token_select(torch.ones(1, 1, 9), torch.tensor([9]), ONE_ROW, backend="triton", **options)
    assert kernel.widths == [width]
    assert lists.indices.shape == (1, 1, 1, given)


def test_a_backend_asked_for_by_name_is_never_exchanged(kernel):
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this call: it takes float32"):
        token_select(torch.ones(1, 1, 9).double(), torch.tensor([9]), ONE_ROW, top_k=2, backend="triton")
    token_select(torch.ones(1, 1, 9), torch.tensor([9]), ONE_ROW, top_k=2)
    assert kernel.widths == [], "on the CPU auto is the reference"


BAD = [
    pytest.param({"top_k": None}, ValueError, "exactly one of top_k and top_p", id="neither"),
    pytest.param({"top_p": 0.5}, ValueError, "exactly one of top_k and top_p", id="both"),
    pytest.param({"top_k": -1}, ValueError, "top_k: expected at least 0, got -1", id="negative_k"),
    pytest.param({"top_k": 2.0}, TypeError, "top_k: expected an int, got float", id="float_k"),
    pytest.param({"top_k": torch.tensor([1, 2])}, ValueError, "top_k: .* with B=1", id="k_shape"),
    pytest.param({"top_k": None, "top_p": -0.1}, ValueError, "top_p: expected at least 0", id="negative_p"),
    pytest.param({"top_k": None, "top_p": float("nan")}, ValueError, "top_p: expected at least 0", id="nan_p"),
    pytest.param({"top_k": None, "top_p": "0.9"}, TypeError, "top_p: expected a float", id="text_p"),
    pytest.param({"scores": torch.zeros(1, 2, 9).int()}, TypeError, "scores: expected dtype", id="scores_dtype"),
    pytest.param({"lengths": torch.tensor([10])}, ValueError, r"lengths: expected values in 0 \.\. 9, got 10", id="too_long"),
    pytest.param({"sources": torch.tensor([[[2]]])}, ValueError, r"sources: expected values in 0 \.\. 1", id="no_such_row"),
    pytest.param({"sources": torch.tensor([[[-1]]])}, ValueError, "sources: expected values", id="negative_row"),
    pytest.param({"sources": torch.zeros(1, 1, 0).long()}, ValueError, "sources: expected at least one", id="no_source"),
    pytest.param({"sources": torch.zeros(1, 1, 1).int()}, TypeError, "sources: expected dtype int64", id="sources_dtype"),
    pytest.param({"sinks": -1}, ValueError, "sinks: expected at least 0", id="sinks"),
    pytest.param({"recent": True}, TypeError, "recent: expected an int, got bool", id="recent"),
    pytest.param({"merge": "sum"}, ValueError, "merge: expected one of 'mean', 'max', got 'sum'", id="merge"),
    pytest.param({"backend": "fast"}, ValueError, "backend: expected one of 'auto', 'reference', 'cuda'", id="backend"),
    pytest.param({"backend": "cuda"}, ValueError, "backend: 'cuda' cannot run this call: ", id="no_fall_back"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    good = {"scores": torch.ones(1, 2, 9), "lengths": torch.tensor([5]), "sources": torch.tensor([[[1]]]), "top_k": 2}
    token_select(**good)
    with pytest.raises(error, match=message):
        token_select(**(good | change))
