"""chunk_attention against a loop over single queries in fp64, with every row that must not be read set to NaN."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from outrider.ops import chunk_attention

SCALE = 0.3
FP8 = torch.float8_e4m3fn
api = importlib.import_module("outrider.ops.chunk_attention.api")


def case(
    lengths: list[int], *, Hq: int = 6, Hkv: int = 2, Hs: int = 2, T: int = 7, block: int = 3, D: int = 8, dtype=torch.float32,
    keep=0.4, seed=0,
) -> dict[str, Any]:  # fmt: skip
    """Random arguments; a list keeps about a share `keep` of what lies before its block. Padded slots hold junk positions."""
    generator = torch.Generator().manual_seed(seed)
    B, N, NB = len(lengths), max(lengths) + T + 3, -(-T // block)

    def draw(end: int) -> Tensor:
        return (torch.rand(end, generator=generator) < keep).nonzero()[:, 0].int()

    lists = [[[draw(length + i * block) for _ in range(Hs)] for i in range(NB)] for length in lengths]
    counts = torch.tensor([[[len(x) for x in row] for row in sequence] for sequence in lists], dtype=torch.int32)
    indices = torch.full((B, NB, Hs, int(counts.max()) + 2), -1, dtype=torch.int32)
    indices[..., -1] = 2**31 - 1
    for b in range(B):
        for i in range(NB):
            for h in range(Hs):
                indices[b, i, h, : counts[b, i, h]] = lists[b][i][h]
    return {
        "queries": (3 * torch.randn(B, T, Hq, D, generator=generator)).to(dtype),
        "keys": torch.randn(B, N, Hkv, D, generator=generator).to(dtype),
        "values": torch.randn(B, N, Hkv, D, generator=generator).to(dtype),
        "indices": indices,
        "counts": counts,
        "lengths": torch.tensor(lengths),
        "block": block,
    }


def dense(x: dict[str, Any], window: int | None = None) -> dict[str, Any]:
    """Without lists."""
    return x | {"indices": None, "counts": None, "window": window}


def visible(x: dict[str, Any]) -> Tensor:
    """`[B, T, Hq, N]` bool: what each query attends to."""
    B, T, Hq, _ = x["queries"].shape
    mask = torch.zeros(B, T, Hq, x["keys"].shape[1], dtype=torch.bool)
    for b, length in enumerate(x["lengths"].tolist()):
        for t in range(T):
            if x["indices"] is None:
                first = 0 if x["window"] is None else max(length + t + 1 - x["window"], 0)
                mask[b, t, :, first : length + t + 1] = True
                continue
            i, Hs = t // x["block"], x["counts"].shape[2]
            for h in range(Hq):
                owner = h * Hs // Hq
                mask[b, t, h, x["indices"][b, i, owner, : x["counts"][b, i, owner]].long()] = True
                mask[b, t, h, length + i * x["block"] : length + t + 1] = True
    return mask


def oracle(x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One query after the other in fp64: outputs `[B, T, Hq, D]`, and logarithms of the denominators `[B, Hq, T]`."""
    mask = visible(x)
    B, T, Hq, _ = x["queries"].shape
    group = Hq // x["keys"].shape[2]
    out, logsumexp = torch.zeros(x["queries"].shape, dtype=torch.float64), torch.zeros(B, Hq, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for h in range(Hq):
                keys, values = (x[name][b, mask[b, t, h], h // group].double() for name in ("keys", "values"))
                logits = keys @ x["queries"][b, t, h].double() * SCALE
                out[b, t, h] = logits.softmax(-1) @ values
                logsumexp[b, h, t] = logits.exp().sum().log()
    return out, logsumexp


def by_torch(x: dict[str, Any]) -> Tensor:
    """PyTorch's own attention in the dtype of the arguments."""
    q, k, v = (x[name].transpose(1, 2) for name in ("queries", "keys", "values"))
    out = scaled_dot_product_attention(q, k, v, attn_mask=visible(x).transpose(1, 2), scale=SCALE, enable_gqa=True)
    return out.transpose(1, 2)


def poison(x: dict[str, Any]) -> dict[str, Any]:
    """Every row that no query of its KV head attends to becomes NaN."""
    mask = visible(x).any(1)  # [B, Hq, N]
    B, N, Hkv, _ = x["keys"].shape
    unread = ~mask.view(B, Hkv, -1, N).any(2).transpose(1, 2).unsqueeze(-1)  # [B, N, Hkv, 1]
    return x | {name: x[name].masked_fill(unread, torch.nan) for name in ("keys", "values")}


def run(x: dict[str, Any], **options: Any) -> Tensor:
    return chunk_attention(**(x | options), scale=SCALE)


HEADS = [
    pytest.param(6, 2, 1, id="gqa_one_list"),
    pytest.param(6, 2, 2, id="gqa_list_per_kv_head"),
    pytest.param(6, 2, 6, id="gqa_list_per_query_head"),
    pytest.param(3, 3, 3, id="mha"),
    pytest.param(5, 1, 5, id="mqa_list_per_query_head"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("Hq", "Hkv", "Hs"), HEADS)
def test_error_is_at_most_twice_that_of_torch(assert_as_good_as_torch, Hq, Hkv, Hs, dtype):
    x = case([0, 21, 33], Hq=Hq, Hkv=Hkv, Hs=Hs, dtype=dtype)
    got = run(poison(x))
    assert got.dtype == dtype
    assert_as_good_as_torch(got, by_torch(x), oracle(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 1, 3, 20, 1000])
def test_without_lists_the_error_is_at_most_twice_that_of_torch(assert_as_good_as_torch, window, dtype):
    x = dense(case([0, 21, 33], dtype=dtype), window)
    got = run(poison(x))
    assert got.dtype == dtype
    assert_as_good_as_torch(got, by_torch(x), oracle(x)[0])


@pytest.mark.parametrize(("Hq", "Hkv", "Hs"), HEADS)
def test_float64_is_computed_in_float64(Hq, Hkv, Hs):
    x = case([0, 21, 33], Hq=Hq, Hkv=Hkv, Hs=Hs, dtype=torch.float64)
    torch.testing.assert_close(run(poison(x)), oracle(x)[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", [1, 3, 7, 20])
def test_with_everything_before_a_block_listed_it_is_dense_causal_attention(block):
    x = case([0, 1, 64], keep=2.0, block=block, dtype=torch.float64)
    assert (x["counts"] == x["lengths"].view(3, 1, 1) + block * torch.arange(x["counts"].shape[1]).view(-1, 1)).all()
    listed = run(poison(x))
    for b, length in enumerate(x["lengths"].tolist()):
        end = length + x["queries"].shape[1]
        q, k, v = (x[name][b : b + 1].transpose(1, 2) for name in ("queries", "keys", "values"))
        causal = torch.ones(end, end, dtype=torch.bool).tril()[length:]
        wanted = scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end], causal, scale=SCALE, enable_gqa=True)
        torch.testing.assert_close(listed[b : b + 1], wanted.transpose(1, 2), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(run(poison(dense(x))), listed, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", [lambda x: x, dense, lambda x: dense(x, 4)], ids=["lists", "dense", "window"])
def test_logsumexp_is_that_of_what_a_query_reads(form):
    x = form(case([0, 21, 33], dtype=torch.float64))
    filled = torch.full((3, 7, 6), torch.nan).transpose(1, 2)  # of any strides
    got = run(poison(x), logsumexp=filled)
    out, logsumexp = oracle(x)
    torch.testing.assert_close(filled, logsumexp.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(got, run(poison(x))), "asking for it changes no output"
    torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("width", [0, 3], ids=["no_slots", "padded_slots"])
def test_empty_lists_leave_the_block(width):
    x = case([0, 9], dtype=torch.float64) | {
        "indices": torch.full((2, 3, 2, width), -1, dtype=torch.int32),
        "counts": torch.zeros(2, 3, 2, dtype=torch.int32),
    }
    got = run(poison(x))
    torch.testing.assert_close(got, oracle(x)[0], rtol=1e-12, atol=1e-14)
    for first in (0, 3, 6):  # the first query of a block sees itself alone
        own = torch.stack([x["values"][b, length + first] for b, length in enumerate([0, 9])])
        torch.testing.assert_close(got[:, first], own.repeat_interleave(3, dim=1), rtol=1e-12, atol=1e-14)


def test_the_order_of_a_list_does_not_matter():
    x = case([40], dtype=torch.float64)
    swapped = x["indices"].clone()
    for i in range(3):
        for h, count in enumerate(x["counts"][0, i].tolist()):
            swapped[0, i, h, :count] = x["indices"][0, i, h, :count].flip(0)
    torch.testing.assert_close(run(x | {"indices": swapped}), run(x), rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    T=st.integers(1, 9),
    block=st.integers(1, 10),
    D=st.sampled_from([1, 3, 8]),
    heads=st.sampled_from([(6, 2, 1), (6, 2, 2), (6, 2, 6), (1, 1, 1), (5, 1, 5)]),
    keep=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    seed=st.integers(0, 999),
    window=st.sampled_from(["lists", None, 1, 2, 7, 30]),
)
def test_any_shape_matches_the_oracle_and_the_sequence_alone(lengths, T, block, D, heads, keep, seed, window):
    Hq, Hkv, Hs = heads
    x = case(lengths, Hq=Hq, Hkv=Hkv, Hs=Hs, T=T, block=block, D=D, dtype=torch.float64, keep=keep, seed=seed)
    x = poison(x if window == "lists" else dense(x, window))
    got = run(x)
    torch.testing.assert_close(got, oracle(x)[0], rtol=1e-11, atol=1e-13)
    for b in range(len(lengths)):
        alone = run({name: value[b : b + 1] if isinstance(value, Tensor) else value for name, value in x.items()})
        torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-12, atol=1e-14)


def test_caches_and_lists_may_have_any_strides():
    x = case([0, 21], dtype=torch.float64)
    plain = run(poison(x))
    laid = poison(x)
    for name in ("keys", "values"):  # gaps between rows, heads and sequences
        B, N, Hkv, D = laid[name].shape
        storage = torch.full((B + 1, Hkv + 1, N + 2, D + 3), torch.nan, dtype=torch.float64)
        laid[name] = storage[1:, :Hkv, 1:-1, 2:-1].transpose(1, 2).copy_(laid[name])
    for name in ("queries", "indices", "counts", "lengths"):
        laid[name] = torch.stack([laid[name], laid[name]], -1)[..., 0]
    torch.testing.assert_close(run(laid), plain, rtol=1e-14, atol=0)


def test_arguments_are_left_as_they_were():
    x = case([0, 21])
    before = {name: value.clone() for name, value in x.items() if isinstance(value, Tensor)}
    run(x)
    assert all(torch.equal(x[name], value) for name, value in before.items())


@pytest.mark.parametrize("form", [lambda x: x, dense, lambda x: dense(x, 20)], ids=["lists", "dense", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_float8_caches_are_scaled_per_head(dtype, form):
    x = form(case([0, 21, 33], dtype=dtype))
    factors = {"keys": torch.tensor([0.5, 3.0]), "values": torch.tensor([2.0, 0.25])}
    for name in factors:
        x[name] = x[name].to(FP8).to(dtype)
    wide = {name: x[name].double() * factor.double().view(2, 1) for name, factor in factors.items()}
    laid = poison(x)
    laid |= {name: laid[name].to(FP8) for name in factors}
    got = run(laid, key_scale=factors["keys"], value_scale=factors["values"])
    assert got.dtype == dtype
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.double(), oracle(x | wide)[0], rtol=rounding, atol=rounding / 8)


NO_LISTS = {"indices": None, "counts": None}
EIGHT_BITS = torch.zeros(1, 9, 2, 4).to(FP8)
BAD = [
    pytest.param({"queries": torch.zeros(1, 3, 3, 4)}, ValueError, "multiple of Hkv=2", id="heads"),
    pytest.param({"values": torch.zeros(1, 8, 2, 4)}, ValueError, r"values: .*N=9.*got \[1, 8, 2, 4\]", id="values"),
    pytest.param({"values": torch.zeros(1, 9, 2, 4).double()}, TypeError, "values: expected dtype float32", id="dtype"),
    pytest.param({"block": 0}, ValueError, "block: expected at least 1, got 0", id="block"),
    pytest.param({"block": 2.0}, TypeError, "block: expected an int, got float", id="block_type"),
    pytest.param({"block": 3}, ValueError, r"indices: .* with B=1, NB=1, got \[1, 2, 2, 3\]", id="blocks"),
    pytest.param({"indices": torch.zeros(1, 2, 2, 3).long()}, TypeError, "indices: expected dtype int32", id="indices_dtype"),
    pytest.param({"counts": torch.zeros(1, 2, 1).int()}, ValueError, "counts: .* with B=1, NB=2, Hs=2", id="counts_shape"),
    pytest.param(
        {"counts": torch.full((1, 2, 2), 4).int()}, ValueError, r"counts: expected values in 0 \.\. 3", id="counts_value"
    ),
    pytest.param(
        {"indices": torch.tensor([0, 1, 5]).int().expand(1, 2, 2, 3), "counts": torch.full((1, 2, 2), 3).int()},
        ValueError,
        "indices: expected listed positions in",
        id="in_its_block",
    ),
    pytest.param({"indices": torch.full((1, 2, 2, 3), -1).int()}, ValueError, "indices: expected listed pos", id="negative"),
    pytest.param({"lengths": torch.tensor([7])}, ValueError, r"lengths: expected values in 0 \.\. 6", id="too_long"),
    pytest.param({"backend": "vulkan"}, ValueError, "backend: expected one of 'auto', .* got 'vulkan'", id="backend"),
    pytest.param({"backend": "cuda"}, ValueError, "backend: 'cuda' cannot run this call: it takes bfloat16", id="kernel"),
    pytest.param(
        {"indices": torch.zeros(1, 2, 2, 10).int()}, ValueError, "indices: expected lists .* N=9 tokens, .* M=10", id="width"
    ),
    pytest.param(
        {"keys": torch.zeros(1, 9, 4, 2).transpose(2, 3)}, ValueError, "keys: expected a contiguous head dim", id="stride"
    ),
    pytest.param(
        {"values": torch.zeros(1, 9, 2, 8)[..., ::2]}, ValueError, "values: expected a contiguous head dim", id="v_stride"
    ),
    pytest.param({"value_scale": torch.ones(2)}, ValueError, "value_scale: expected None", id="no_scale"),
    pytest.param({"keys": EIGHT_BITS}, TypeError, "values: expected dtype float8_e4m3fn, got float32", id="one_fp8"),
    pytest.param(
        {"keys": EIGHT_BITS, "values": EIGHT_BITS}, ValueError, r"key_scale: expected float32 \[Hkv\] .* got None", id="scale"
    ),
    pytest.param(
        {"indices": torch.zeros(1, 2, 3, 3).int(), "counts": torch.zeros(1, 2, 3).int()}, ValueError, "got Hs=3", id="owners"
    ),
    pytest.param({"indices": None}, ValueError, "indices: expected int32 lists with counts, .* got None", id="no_indices"),
    pytest.param({"counts": None}, ValueError, "counts: expected int32 lists with indices, .* got None", id="no_counts"),
    pytest.param({"window": 7}, ValueError, "window: expected None with token lists, got 7", id="window_and_lists"),
    pytest.param(NO_LISTS | {"window": 0}, ValueError, "window: expected at least 1, got 0", id="window"),
    pytest.param(NO_LISTS | {"window": 1.5}, TypeError, "window: expected an int, got float", id="window_type"),
    pytest.param({"logsumexp": torch.zeros(1, 4, 2)}, ValueError, r"logsumexp: .* T=3, got \[1, 4, 2\]", id="logsumexp"),
    pytest.param({"logsumexp": torch.zeros(1, 4, 3).double()}, TypeError, "logsumexp: expected dtype float32", id="lse_dtype"),
]


def good() -> dict[str, Any]:
    return {
        "queries": torch.zeros(1, 3, 4, 4),
        "keys": torch.zeros(1, 9, 2, 4),
        "values": torch.zeros(1, 9, 2, 4),
        "indices": torch.zeros(1, 2, 2, 3, dtype=torch.int32),
        "counts": torch.ones(1, 2, 2, dtype=torch.int32),
        "lengths": torch.tensor([5]),
        "block": 2,
    }


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    run(good())
    with pytest.raises(error, match=message):
        run(good() | change)


def test_a_backend_asked_for_by_name_is_not_exchanged():
    pytest.importorskip("triton", reason="kernels need triton")
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this call: queries are float64"):
        run(case([9], dtype=torch.float64), backend="triton")


WRONG_VALUES = [
    pytest.param({"lengths": torch.tensor([7])}, "lengths: expected values in", id="lengths"),
    pytest.param({"counts": torch.full((1, 2, 2), 4).int()}, "counts: expected values in", id="counts"),
    pytest.param({"indices": torch.full((1, 2, 2, 3), 5).int()}, "indices: expected listed positions in", id="indices"),
    pytest.param(
        {"indices": torch.tensor([0, 2, 1]).int().expand(1, 2, 2, 3), "counts": torch.full((1, 2, 2), 3).int()},
        "indices: expected ascending positions",
        id="unsorted",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_VALUES)
def test_kernels_check_values_when_debugging(monkeypatch, change, message):
    """A kernel cannot look at values without waiting for the device, so only OUTRIDER_DEBUG=1 makes it."""
    kernel = SimpleNamespace(obstacle=lambda *_: None, chunk_attention=lambda *_, **__: "result")
    monkeypatch.setattr(api, "_triton", lambda: kernel)
    for value in ("", "0"):
        monkeypatch.setenv("OUTRIDER_DEBUG", value)
        assert run(good() | change, backend="triton") == "result"
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        run(good() | change, backend="triton")


def test_unsorted_slots_behind_the_count_are_no_error(monkeypatch):
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    lists = {"indices": torch.tensor([[0, 3, -1], [2, 1, 4]]).int().expand(1, 2, 2, 3), "counts": torch.tensor([2, 1]).int()}
    run(good() | lists | {"counts": lists["counts"].expand(1, 2, 2)})


def test_positions_in_earlier_blocks_of_the_chunk_may_be_listed():
    lists = {"indices": torch.tensor([[0, 1, 4], [4, 5, 6]]).int().view(1, 2, 1, 3).expand(1, 2, 2, 3)}
    x = good() | lists | {"counts": torch.full((1, 2, 2), 3).int(), "queries": torch.randn(1, 3, 4, 4)}
    x |= {name: torch.randn(1, 9, 2, 4) for name in ("keys", "values")}
    torch.testing.assert_close(run(poison(x)).double(), oracle(x)[0], rtol=1e-5, atol=1e-6)
