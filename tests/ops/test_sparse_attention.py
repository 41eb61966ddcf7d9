"""sparse_attention against a loop over single queries in fp64, with every row that must not be read set to NaN."""

from __future__ import annotations

import importlib
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from outrider.ops import sparse_attention

SCALE = 0.3
FP8 = torch.float8_e4m3fn
api = importlib.import_module("outrider.ops.sparse_attention.api")


def case(
    lengths: list[int], *, Hq: int = 6, Hkv: int = 2, Hs: int = 2, T: int = 4, D: int = 8, dtype=torch.float32, keep=0.4, seed=0
) -> dict[str, Tensor]:
    """Random arguments; each list keeps about a share `keep` of its sequence. Padded slots hold junk positions."""
    generator = torch.Generator().manual_seed(seed)
    B, N = len(lengths), max(lengths) + T + 3
    lists = [[(torch.rand(length, generator=generator) < keep).nonzero()[:, 0].int() for _ in range(Hs)] for length in lengths]
    counts = torch.tensor([[len(x) for x in row] for row in lists], dtype=torch.int32)
    indices = torch.full((B, Hs, int(counts.max()) + 2), -1, dtype=torch.int32)
    indices[..., -1] = 2**31 - 1
    for b in range(B):
        for h in range(Hs):
            indices[b, h, : counts[b, h]] = lists[b][h]
    return {
        "queries": (3 * torch.randn(B, T, Hq, D, generator=generator)).to(dtype),
        "keys": torch.randn(B, N, Hkv, D, generator=generator).to(dtype),
        "values": torch.randn(B, N, Hkv, D, generator=generator).to(dtype),
        "indices": indices,
        "counts": counts,
        "lengths": torch.tensor(lengths),
    }


def visible(x: dict[str, Tensor]) -> Tensor:
    """`[B, T, Hq, N]` bool: what each query attends to."""
    B, T, Hq, _ = x["queries"].shape
    mask = torch.zeros(B, T, Hq, x["keys"].shape[1], dtype=torch.bool)
    if x["counts"] is None:
        for b, length in enumerate(x["lengths"].tolist()):
            for t in range(T):
                first = 0 if x["window"] is None else max(length + t + 1 - x["window"], 0)
                mask[b, t, :, first : length + t + 1] = True
        return mask
    Hs = x["counts"].shape[1]
    for b, length in enumerate(x["lengths"].tolist()):
        for h in range(Hq):
            owner = h * Hs // Hq
            for t in range(T):
                count = x["counts"][b, owner]
                listed = torch.arange(count) if x["indices"] is None else x["indices"][b, owner, :count].long()
                mask[b, t, h, listed] = True
                mask[b, t, h, length : length + t + 1] = True
    return mask


def dense(x: dict[str, Tensor], window: int | None = None) -> dict[str, Any]:
    """Without lists."""
    return x | {"indices": None, "counts": None, "window": window}


def first(x: dict[str, Tensor]) -> dict[str, Any]:
    """The first tokens in place of lists: none, some or all."""
    B, Hs = x["counts"].shape
    share = (torch.arange(B * Hs) % 3 / 2).view(B, Hs)
    return x | {"indices": None, "counts": (share * x["lengths"].view(B, 1)).int()}


def oracle(x: dict[str, Tensor]) -> Tensor:
    """One query after the other in fp64."""
    mask = visible(x)
    B, T, Hq, _ = x["queries"].shape
    group = Hq // x["keys"].shape[2]
    out = torch.zeros(x["queries"].shape, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(Hq):
                keys, values = (x[name][b, mask[b, t, h], h // group].double() for name in ("keys", "values"))
                out[b, t, h] = (keys @ x["queries"][b, t, h].double() * SCALE).softmax(-1) @ values
    return out


def by_torch(x: dict[str, Tensor]) -> Tensor:
    """PyTorch's own attention in the dtype of the arguments."""
    q, k, v = (x[name].transpose(1, 2) for name in ("queries", "keys", "values"))
    out = scaled_dot_product_attention(q, k, v, attn_mask=visible(x).transpose(1, 2), scale=SCALE, enable_gqa=True)
    return out.transpose(1, 2)


def poison(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every row that no query of its KV head attends to becomes NaN."""
    mask = visible(x).any(1)  # [B, Hq, N]
    B, N, Hkv, _ = x["keys"].shape
    unread = ~mask.view(B, Hkv, -1, N).any(2).transpose(1, 2).unsqueeze(-1)  # [B, N, Hkv, 1]
    return x | {name: x[name].masked_fill(unread, torch.nan) for name in ("keys", "values")}


def run(x: dict[str, Tensor], lay_out=lambda rows: (rows, None)) -> Tensor:
    keys, page_table = lay_out(x["keys"])
    values, _ = lay_out(x["values"])
    return sparse_attention(**(x | {"keys": keys, "values": values}), scale=SCALE, page_table=page_table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("Hq", "Hkv", "Hs"),
    [
        pytest.param(6, 2, 1, id="gqa_one_list"),
        pytest.param(6, 2, 2, id="gqa_list_per_kv_head"),
        pytest.param(6, 2, 6, id="gqa_list_per_query_head"),
        pytest.param(3, 3, 3, id="mha"),
        pytest.param(5, 1, 5, id="mqa_list_per_query_head"),
    ],
)
def test_error_is_at_most_twice_that_of_torch(lay_out, assert_as_good_as_torch, Hq, Hkv, Hs, dtype):
    x = case([0, 21, 33], Hq=Hq, Hkv=Hkv, Hs=Hs, dtype=dtype)
    got = run(poison(x), lay_out)
    assert got.dtype == dtype
    assert_as_good_as_torch(got, by_torch(x), oracle(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("Hs", [1, 2, 6])
def test_what_stands_for_unlisted_tokens_counts_by_its_share(lay_out, Hs, dtype):
    x = case([0, 21, 33], Hs=Hs, dtype=dtype)
    plain = run(poison(x), lay_out)
    value, share = torch.randn(2, 8), torch.rand(3, 6)
    given = {"unlisted_values": value, "unlisted_shares": share}
    got = run(poison(x) | given, lay_out)
    for b in range(3):
        for h in range(6):
            wanted = (1 - share[b, h].double()) * plain[b, :, h].double() + share[b, h].double() * value[h // 3].double()
            tolerance = 1e-12 if dtype == torch.float64 else 2**-7
            torch.testing.assert_close(got[b, :, h].double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(run(poison(x) | given | {"unlisted_shares": torch.zeros(3, 6)}, lay_out), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_with_everything_listed_it_is_dense_attention(lay_out, assert_as_good_as_torch, dtype):
    x = case([1, 64, 130], keep=2.0, dtype=dtype, D=16)
    assert x["counts"].tolist() == [[1, 1], [64, 64], [130, 130]]
    dense = []
    for b, length in enumerate(x["lengths"].tolist()):
        end = length + x["queries"].shape[1]
        q, k, v = (x[name][b : b + 1].double().transpose(1, 2) for name in ("queries", "keys", "values"))
        causal = torch.ones(end, end, dtype=torch.bool).tril()[length:]
        dense.append(scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end], causal, scale=SCALE, enable_gqa=True))
    assert_as_good_as_torch(run(poison(x), lay_out), by_torch(x), torch.cat(dense).transpose(1, 2))


def test_float64_is_computed_in_float64(lay_out):
    x = case([0, 21, 33], dtype=torch.float64)
    torch.testing.assert_close(run(poison(x), lay_out), oracle(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("window", [None, 1, 3, 20, 1000])
def test_without_lists_the_error_is_at_most_twice_that_of_torch(lay_out, assert_as_good_as_torch, window, dtype):
    x = dense(case([0, 21, 33], dtype=dtype), window)
    got = run(poison(x), lay_out)
    assert got.dtype == dtype
    assert_as_good_as_torch(got, by_torch(x), oracle(x))


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_without_lists_float64_is_computed_in_float64(lay_out, window):
    x = dense(case([0, 21, 33], dtype=torch.float64), window)
    torch.testing.assert_close(run(poison(x), lay_out), oracle(x), rtol=1e-12, atol=1e-14)


def test_without_lists_is_with_every_token_listed():
    x = case([0, 64, 130], keep=2.0, dtype=torch.float64)
    torch.testing.assert_close(run(dense(x)), run(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("Hs", [1, 2, 6])
def test_counts_alone_stand_for_the_first_tokens(lay_out, assert_as_good_as_torch, Hs):
    x = first(case([0, 21, 33], Hs=Hs))
    assert_as_good_as_torch(run(poison(x), lay_out), by_torch(x), oracle(x))


@pytest.mark.parametrize("form", [lambda x: x, first, dense, lambda x: dense(x, 4)], ids=["lists", "first", "dense", "window"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_logsumexp_is_that_of_what_a_query_reads(lay_out, dtype, form):
    x = form(case([0, 21, 33], dtype=dtype))
    filled = torch.full((3, 4, 6), torch.nan).transpose(1, 2)  # of any strides
    got = run(poison(x) | {"logsumexp": filled}, lay_out)
    wanted, mask = torch.zeros(3, 6, 4, dtype=torch.float64), visible(x)
    for b, h, t in product(range(3), range(6), range(4)):
        keys = x["keys"][b, mask[b, t, h], h // 3].double()
        wanted[b, h, t] = (keys @ x["queries"][b, t, h].double() * SCALE).exp().sum().log()
    torch.testing.assert_close(filled.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, run(poison(x), lay_out)), "asking for it changes no output"


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("window", [None, 3, 12])
def test_a_row_that_is_not_finite_reaches_the_queries_that_see_it(window, name):
    """In the tail, or where it leaves the window: no query is spoilt by what it does not see, and no other is changed."""
    x = dense(case([5, 21]), window)
    clean = run(x)
    for at in (-11, -2, 2):  # from the first query's position: with a window of 12 only that one sees the first
        rows = x[name].clone()
        for b, length in enumerate(x["lengths"].tolist()):
            if length + at >= 0:
                rows[b, length + at] = torch.nan
        dirty = run(x | {name: rows})
        seen = visible(x)[torch.arange(2), :, :, (x["lengths"] + at).clamp(min=0)] & (x["lengths"] + at >= 0).view(2, 1, 1)
        torch.testing.assert_close(dirty[~seen], clean[~seen], rtol=1e-5, atol=1e-6)
        assert dirty[seen].isnan().all()


def test_later_tail_rows_do_not_reach_earlier_queries(lay_out):
    x = case([5, 21])
    clean = run(x, lay_out)
    for b, length in enumerate(x["lengths"].tolist()):
        x["keys"][b, length + 2 :] = torch.nan
        x["values"][b, length + 2 :] = torch.inf
    assert torch.equal(run(x, lay_out)[:, :2], clean[:, :2])


@pytest.mark.parametrize("width", [0, 3], ids=["no_slots", "padded_slots"])
def test_empty_lists_leave_the_tail(lay_out, width):
    x = case([0, 9]) | {
        "indices": torch.full((2, 2, width), -1, dtype=torch.int32),
        "counts": torch.zeros(2, 2, dtype=torch.int32),
    }
    got = run(poison(x), lay_out)
    torch.testing.assert_close(got.double(), oracle(x), rtol=1e-5, atol=1e-6)
    first = torch.stack([x["values"][b, length] for b, length in enumerate([0, 9])])
    torch.testing.assert_close(got[:, 0], first.repeat_interleave(3, dim=1), rtol=1e-5, atol=1e-6)


def test_the_order_of_a_list_does_not_matter():
    x = case([40], dtype=torch.float64)
    swapped = x["indices"].clone()
    for h, count in enumerate(x["counts"][0].tolist()):
        swapped[0, h, :count] = x["indices"][0, h, :count].flip(0)
    torch.testing.assert_close(run(x | {"indices": swapped}), run(x), rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    T=st.integers(1, 6),
    D=st.sampled_from([1, 3, 8]),
    heads=st.sampled_from([(6, 2, 1), (6, 2, 2), (6, 2, 6), (1, 1, 1), (5, 1, 5)]),
    keep=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    seed=st.integers(0, 999),
    window=st.sampled_from(["lists", None, 1, 2, 7, 30]),
)
def test_any_shape_matches_the_oracle_and_the_sequence_alone(lengths, T, D, heads, keep, seed, window):
    Hq, Hkv, Hs = heads
    x = case(lengths, Hq=Hq, Hkv=Hkv, Hs=Hs, T=T, D=D, dtype=torch.float64, keep=keep, seed=seed)
    x = poison(x if window == "lists" else dense(x, window))
    got = run(x)
    torch.testing.assert_close(got, oracle(x), rtol=1e-11, atol=1e-13)
    for b in range(len(lengths)):
        alone = run({name: value[b : b + 1] if isinstance(value, Tensor) else value for name, value in x.items()})
        torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-12, atol=1e-14)


def test_a_cache_expanded_over_heads_needs_no_copy():
    x = case([12], dtype=torch.float64)
    one = x["keys"][:, :, :1]
    shared = {"keys": one.expand(-1, -1, 2, -1), "values": one.expand(-1, -1, 2, -1)}
    torch.testing.assert_close(run(x | shared), oracle(x | shared), rtol=1e-12, atol=1e-14)


def test_arguments_are_left_as_they_were():
    x = case([0, 21])
    before = {name: value.clone() for name, value in x.items()}
    run(x)
    assert all(torch.equal(x[name], before[name]) for name in x)


@pytest.mark.parametrize("form", [lambda x: x, dense, lambda x: dense(x, 20)], ids=["lists", "dense", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_float8_caches_are_scaled_per_head(lay_out, dtype, form):
    x = form(case([0, 21, 33], dtype=dtype))
    factors = {"keys": torch.tensor([0.5, 3.0]), "values": torch.tensor([2.0, 0.25])}
    for name in factors:
        x[name] = x[name].to(FP8).to(dtype)
    wide = {name: x[name].double() * factor.double().view(2, 1) for name, factor in factors.items()}
    laid = {name: lay_out(poison(x)[name]) for name in factors}
    got = sparse_attention(
        **(x | {name: rows.to(FP8) for name, (rows, _) in laid.items()}),
        scale=SCALE,
        key_scale=factors["keys"],
        value_scale=factors["values"],
        page_table=laid["keys"][1],
    )
    assert got.dtype == dtype
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.double(), oracle(x | wide), rtol=rounding, atol=rounding / 8)


NO_LISTS = {"indices": None, "counts": None}
EIGHT_BITS = torch.zeros(1, 9, 2, 4).to(FP8)
BAD = [
    pytest.param({"queries": torch.zeros(1, 2, 3, 4)}, ValueError, "multiple of Hkv=2", id="heads"),
    pytest.param({"values": torch.zeros(1, 8, 2, 4)}, ValueError, r"values: .*N=9.*got \[1, 8, 2, 4\]", id="values"),
    pytest.param({"values": torch.zeros(1, 9, 2, 4).double()}, TypeError, "values: expected dtype float32", id="dtype"),
    pytest.param({"indices": torch.zeros(1, 2, 3).long()}, TypeError, "indices: expected dtype int32", id="indices_dtype"),
    pytest.param({"counts": torch.zeros(1, 1).int()}, ValueError, "counts: .* with B=1, Hs=2", id="counts_shape"),
    pytest.param(
        {"counts": torch.full((1, 2), 4).int()}, ValueError, r"counts: expected values in 0 \.\. 3", id="counts_value"
    ),
    pytest.param({"indices": torch.full((1, 2, 3), 5).int()}, ValueError, "indices: expected listed positions", id="in_tail"),
    pytest.param({"indices": torch.full((1, 2, 3), -1).int()}, ValueError, "indices: expected listed positions", id="negative"),
    pytest.param({"lengths": torch.tensor([8])}, ValueError, r"lengths: expected values in 0 \.\. 7", id="too_long"),
    pytest.param({"page_table": torch.zeros(2, 3).int()}, ValueError, "page_table: .* with B=1", id="page_table"),
    pytest.param({"backend": "numpy"}, ValueError, "backend: expected one of 'auto', .* got 'numpy'", id="backend"),
    pytest.param(
        {"indices": torch.zeros(1, 2, 10).int()}, ValueError, "indices: expected lists .* N=9 tokens, .* M=10", id="width"
    ),
    pytest.param(
        {"keys": torch.zeros(1, 9, 4, 2).transpose(2, 3)}, ValueError, "keys: expected a contiguous head dim", id="stride"
    ),
    pytest.param(
        {"values": torch.zeros(1, 9, 2, 8)[..., ::2]}, ValueError, "values: expected a contiguous head dim", id="v_stride"
    ),
    pytest.param({"value_scale": torch.ones(2)}, ValueError, "value_scale: expected None", id="no_scale"),
    pytest.param(
        {"keys": torch.zeros(1, 9, 2, 4).to(FP8)}, TypeError, "values: expected dtype float8_e4m3fn, got float32", id="one_fp8"
    ),
    pytest.param(
        {"keys": EIGHT_BITS, "values": EIGHT_BITS}, ValueError, r"key_scale: expected float32 \[Hkv\] .* got None", id="scale"
    ),
    pytest.param(
        {"keys": EIGHT_BITS, "values": EIGHT_BITS, "key_scale": torch.ones(2), "value_scale": torch.ones(2).double()},
        TypeError,
        "value_scale: expected dtype float32, got float64",
        id="scale_dtype",
    ),
    pytest.param(
        {"page_table": torch.tensor([[0, 1]]).int(), "lengths": torch.tensor([8])},
        ValueError,
        r"page_table: expected values in 0 \.\. 0, got 0 \.\. 1",
        id="page",
    ),
    pytest.param(
        {"indices": torch.zeros(1, 3, 3).int(), "counts": torch.zeros(1, 3).int()}, ValueError, "got Hs=3", id="list_owners"
    ),
    pytest.param(
        {"indices": None, "counts": torch.full((1, 2), 6).int()}, ValueError, r"counts: expected at most lengths", id="first"
    ),
    pytest.param({"counts": None}, ValueError, "counts: expected int32 lists with indices, .* got None", id="no_counts"),
    pytest.param({"unlisted_values": torch.ones(2, 4)}, ValueError, "unlisted_shares: expected both", id="no_share"),
    pytest.param({"unlisted_shares": torch.ones(1, 4)}, ValueError, "unlisted_shares: expected both", id="no_value"),
    pytest.param(
        NO_LISTS | {"unlisted_values": torch.ones(2, 4), "unlisted_shares": torch.ones(1, 4)},
        ValueError,
        "unlisted_values: expected both .* with token lists",
        id="unlisted_without_lists",
    ),
    pytest.param(
        {"unlisted_values": torch.ones(2, 4), "unlisted_shares": torch.ones(1, 2)},
        ValueError,
        "unlisted_shares: expected shape .* Hq=4",
        id="share_shape",
    ),
    pytest.param({"window": 7}, ValueError, "window: expected None with token lists, got 7", id="window_and_lists"),
    pytest.param(NO_LISTS | {"window": 0}, ValueError, "window: expected at least 1, got 0", id="window"),
    pytest.param(NO_LISTS | {"window": 1.5}, TypeError, "window: expected an int, got float", id="window_type"),
    pytest.param(
        NO_LISTS | {"lengths": torch.tensor([8])}, ValueError, r"lengths: expected values in 0 \.\. 7", id="dense_too_long"
    ),
    pytest.param({"logsumexp": torch.zeros(1, 4, 3)}, ValueError, r"logsumexp: .* T=2, got \[1, 4, 3\]", id="logsumexp"),
    pytest.param({"logsumexp": torch.zeros(1, 4, 2).double()}, TypeError, "logsumexp: expected dtype float32", id="lse_dtype"),
]


def good() -> dict[str, Tensor]:
    return {
        "queries": torch.zeros(1, 2, 4, 4),
        "keys": torch.zeros(1, 9, 2, 4),
        "values": torch.zeros(1, 9, 2, 4),
        "indices": torch.zeros(1, 2, 3, dtype=torch.int32),
        "counts": torch.ones(1, 2, dtype=torch.int32),
        "lengths": torch.tensor([5]),
    }


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    sparse_attention(**good(), scale=1.0)
    with pytest.raises(error, match=message):
        sparse_attention(**(good() | change), scale=1.0)


def test_a_backend_asked_for_by_name_is_not_exchanged():
    pytest.importorskip("triton", reason="kernels need triton")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this call: queries are float64"):
        sparse_attention(**case([9], dtype=torch.float64), scale=1.0, backend="triton")


WRONG_VALUES = [
    pytest.param({"lengths": torch.tensor([8])}, "lengths: expected values in", id="lengths"),
    pytest.param({"counts": torch.full((1, 2), 4).int()}, "counts: expected values in", id="counts"),
    pytest.param({"counts": torch.full((1, 2), 6).int(), "indices": None}, "counts: expected at most lengths", id="first"),
    pytest.param({"indices": torch.full((1, 2, 3), 5).int()}, "indices: expected listed positions in", id="indices"),
    pytest.param({"page_table": torch.tensor([[3]]).int()}, "page_table: expected values in", id="page_table"),
    pytest.param(
        {"indices": torch.tensor([[[0, 1, 2], [0, 2, 1]]]).int(), "counts": torch.full((1, 2), 3).int()},
        "indices: expected ascending positions",
        id="unsorted",
    ),
    pytest.param(
        {"indices": torch.tensor([[[0, 1, 1], [0, 1, 2]]]).int(), "counts": torch.full((1, 2), 3).int()},
        "indices: expected ascending positions",
        id="twice",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_VALUES)
def test_kernels_check_values_when_debugging(monkeypatch, change, message):
    """A kernel cannot look at values without waiting for the device, so only OUTRIDER_DEBUG=1 makes it."""
    kernel = SimpleNamespace(obstacle=lambda *_: None, sparse_attention=lambda *_, **__: "result")
    monkeypatch.setattr(api, "_triton", lambda: kernel)
    for value in ("", "0"):
        monkeypatch.setenv("OUTRIDER_DEBUG", value)
        assert sparse_attention(**(good() | change), scale=1.0, backend="triton") == "result"
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        sparse_attention(**(good() | change), scale=1.0, backend="triton")


def test_unsorted_slots_behind_the_count_are_no_error(monkeypatch):
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    lists = {"indices": torch.tensor([[[0, 3, -1], [2, 1, 4]]]).int(), "counts": torch.tensor([[2, 1]]).int()}
    sparse_attention(**(good() | lists), scale=1.0)
