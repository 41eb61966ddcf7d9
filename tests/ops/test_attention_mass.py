"""attention_mass against a loop over single queries in fp64."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import attention_mass

HEADS = [pytest.param(4, 4, id="mha"), pytest.param(6, 2, id="gqa"), pytest.param(5, 1, id="mqa")]
LENGTHS = [0, 20, 33]
FP8 = torch.float8_e4m3fn
api = importlib.import_module("outrider.ops.attention_mass.api")


def make(dtype: torch.dtype, Hq: int = 6, Hkv: int = 2, T: int = 4, D: int = 8, lengths: list[int] | None = None):
    """Queries, a cache whose rows behind the tail are NaN, lengths."""
    torch.manual_seed(0)
    lengths = LENGTHS if lengths is None else lengths
    B, N = len(lengths), max(lengths) + T + 5
    queries = (3 * torch.randn(B, T, Hq, D)).to(dtype)
    keys = torch.randn(B, N, Hkv, D).to(dtype)
    for b, length in enumerate(lengths):
        keys[b, length + T :] = torch.nan
    return queries, keys, torch.tensor(lengths)


def oracle(queries: Tensor, keys: Tensor, lengths: Tensor, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[B, T, Hq, N]`, one query after the other, computed in `dtype`."""
    B, T, Hq, _ = queries.shape
    group = Hq // keys.shape[2]
    mass = torch.zeros(B, T, Hq, keys.shape[1], dtype=dtype)
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            for h in range(Hq):
                logits = keys[b, : length + t + 1, h // group].to(dtype) @ queries[b, t, h].to(dtype) * scale
                mass[b, t, h, :length] = logits.softmax(-1)[:length]
    return mass


def reduced(mass: Tensor, how: str) -> Tensor:
    return {"mean": mass.mean(1), "max": mass.amax(1), "none": mass}[how]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("Hq", "Hkv"), HEADS)
def test_error_is_at_most_twice_that_of_torch(lay_out, assert_as_good_as_torch, Hq, Hkv, dtype):
    queries, rows, lengths = make(dtype, Hq, Hkv)
    keys, page_table = lay_out(rows)
    exact = oracle(queries, rows, lengths, 0.3)
    rounded = oracle(queries, rows, lengths, 0.3, dtype)
    for how in ("mean", "max", "none"):
        got = attention_mass(queries, keys, lengths, scale=0.3, reduce=how, page_table=page_table)
        assert got.dtype == torch.float32
        got, spare = got[..., : rows.shape[1]], got[..., rows.shape[1] :]
        assert not spare.any(), "N is rounded up to pages; what is behind the last row has no mass"
        assert_as_good_as_torch(got, reduced(rounded, how), reduced(exact, how))


def test_float64_is_computed_in_float64(lay_out):
    queries, rows, lengths = make(torch.float64)
    keys, page_table = lay_out(rows)
    got = attention_mass(queries, keys, lengths, scale=0.3, page_table=page_table)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got[..., : rows.shape[1]], oracle(queries, rows, lengths, 0.3).mean(1), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("how", ["mean", "max", "none"])
def test_no_mass_at_and_behind_the_length(how):
    queries, keys, lengths = make(torch.float32)
    mass = attention_mass(queries, keys, lengths, scale=0.3, reduce=how)
    for b, length in enumerate(LENGTHS):
        assert (mass[b, ..., length:] == 0).all()
        assert (mass[b, ..., :length] > 0).all()


def test_tail_counts_in_the_denominator_only():
    """With all logits equal, query t gives 1 / (length + t + 1) to each past key."""
    lengths = torch.tensor([7])
    mass = attention_mass(torch.zeros(1, 3, 1, 4), torch.randn(1, 10, 1, 4), lengths, scale=1.0, reduce="none")
    for t in range(3):
        torch.testing.assert_close(mass[0, t, 0, :7], torch.full((7,), 1 / (7 + t + 1)))


def test_later_tail_keys_do_not_reach_earlier_queries():
    queries, keys, lengths = make(torch.float32)
    clean = attention_mass(queries, keys, lengths, scale=0.3, reduce="none")
    for b, length in enumerate(LENGTHS):
        keys[b, length + 2 :] = torch.nan
    dirty = attention_mass(queries, keys, lengths, scale=0.3, reduce="none")
    assert torch.equal(clean[:, :2], dirty[:, :2])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    T=st.integers(1, 6),
    D=st.sampled_from([1, 3, 8]),
    how=st.sampled_from(["mean", "max", "none"]),
)
def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(lengths, T, D, how):
    queries, keys, lengths = make(torch.float64, T=T, D=D, lengths=lengths)
    together = attention_mass(queries, keys, lengths, scale=0.3, reduce=how)
    for b in range(len(lengths)):
        alone = attention_mass(queries[b : b + 1], keys[b : b + 1], lengths[b : b + 1], scale=0.3, reduce=how)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("junk", [-1, 2**31 - 1], ids=["negative", "huge"])
def test_unused_page_table_entries_may_hold_anything(junk):
    queries, keys, lengths = make(torch.float32, lengths=[4, 30])
    keys = keys[:, :36]  # 9 pages of 4 a sequence
    pages = keys.reshape(-1, 4, *keys.shape[2:])
    page_table = torch.arange(len(pages), dtype=torch.int32).view(2, -1)
    expected = attention_mass(queries, pages, lengths, scale=0.3, page_table=page_table)
    page_table[0, 2:] = junk  # tokens 0 .. 7 are in use
    assert torch.equal(attention_mass(queries, pages, lengths, scale=0.3, page_table=page_table), expected)


def test_arguments_are_left_as_they_were():
    args = make(torch.float32)
    before = [x.clone() for x in args]
    attention_mass(*args, scale=0.3)
    assert all(torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in zip(args, before, strict=True))


@pytest.mark.parametrize("how", ["mean", "max", "none"])
def test_heads_are_summed_after_the_reduction(lay_out, how):
    queries, rows, lengths = make(torch.float64)
    keys, page_table = lay_out(rows)
    heads = torch.tensor([[0, 5, 2], [3, 3, 1]])
    got = attention_mass(queries, keys, lengths, scale=0.3, reduce=how, heads=heads, page_table=page_table)
    mass = reduced(oracle(queries, rows, lengths, 0.3), how)
    expected = torch.stack([sum(mass[..., h, :] for h in group) for group in heads.tolist()], -2)
    torch.testing.assert_close(got[..., : rows.shape[1]], expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_asked_for(dtype):
    queries, keys, lengths = make(torch.float32)
    got = attention_mass(queries, keys, lengths, scale=0.3, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, attention_mass(queries, keys, lengths, scale=0.3).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_float8_keys_are_scaled_per_head(lay_out, dtype):
    queries, rows, lengths = make(dtype)
    rows, key_scale = rows.to(FP8), torch.tensor([0.5, 3.0])
    wide = rows.double() * key_scale.double().view(2, 1)
    keys, page_table = lay_out(rows.to(dtype))
    got = attention_mass(queries, keys.to(FP8), lengths, scale=0.3, key_scale=key_scale, page_table=page_table)
    exact = oracle(queries.double(), wide, lengths, 0.3).mean(1)
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got[..., : rows.shape[1]].double(), exact, rtol=rounding, atol=rounding / 100)


BAD = [
    pytest.param({"queries": torch.zeros(1, 2, 3, 4)}, ValueError, "multiple of Hkv=2", id="heads"),
    pytest.param({"queries": torch.zeros(1, 0, 4, 4)}, ValueError, "T=0", id="no_query"),
    pytest.param({"queries": torch.zeros(2, 4, 4)}, ValueError, r"queries: expected shape \[B, T, Hq, D\]", id="rank"),
    pytest.param({"queries": [1.0]}, TypeError, "queries: expected a torch.Tensor, got list", id="no_tensor"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 5)}, ValueError, r"keys: .* with B=1, D=4, got \[1, 9, 2, 5\]", id="head_dim"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 4).half()}, TypeError, "keys: expected dtype float32 or float8", id="dtype"),
    pytest.param({"lengths": torch.tensor([2.0])}, TypeError, "lengths: expected dtype int32 or int64", id="lengths_dtype"),
    pytest.param({"lengths": torch.tensor([8])}, ValueError, r"lengths: expected values in 0 \.\. 7", id="too_long"),
    pytest.param({"lengths": torch.tensor([-1])}, ValueError, "lengths", id="negative_length"),
    pytest.param({"page_table": torch.zeros(1, 3)}, TypeError, "page_table: expected dtype int32", id="page_table"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 4, device="meta")}, ValueError, "keys: expected device cpu", id="device"),
    pytest.param({"reduce": "sum"}, ValueError, "reduce: expected one of 'mean', 'max', 'none', got 'sum'", id="reduce"),
    pytest.param({"backend": "numpy"}, ValueError, "backend: expected one of 'auto', .* got 'numpy'", id="backend"),
    pytest.param({"dtype": torch.float16}, TypeError, "dtype: expected one of .*bfloat16.* got torch.float16", id="output"),
    pytest.param({"heads": torch.zeros(2)}, TypeError, "heads: expected dtype int64, got float32", id="heads_dtype"),
    pytest.param({"heads": torch.zeros(2).long()}, ValueError, r"heads: expected shape \[R, G\], got \[2\]", id="heads_shape"),
    pytest.param({"heads": torch.tensor([[0, 4]])}, ValueError, r"heads: expected values in 0 \.\. 3, got 0 \.\. 4", id="head"),
    pytest.param(
        {"keys": torch.zeros(1, 9, 4, 2).transpose(2, 3)}, ValueError, "keys: expected a contiguous head dim", id="stride"
    ),
    pytest.param({"key_scale": torch.ones(2)}, ValueError, "key_scale: expected None with a cache of float32", id="no_scale"),
    pytest.param(
        {"keys": torch.zeros(1, 9, 2, 4).to(FP8)}, ValueError, r"key_scale: expected float32 \[Hkv\] .* got None", id="scale"
    ),
    pytest.param(
        {"keys": torch.zeros(1, 9, 2, 4).to(FP8), "key_scale": torch.ones(3)},
        ValueError,
        r"key_scale: expected shape \[Hkv\] with Hkv=2, got \[3\]",
        id="scale_shape",
    ),
    pytest.param({"page_table": torch.tensor([[0, 1]]).int()}, ValueError, r"page_table: .* 0 \.\. 0, got 0 \.\. 1", id="page"),
]


BAD_OUT = [
    pytest.param({}, torch.zeros(1, 4, 8), ValueError, r"out: .* with B=1, Hq=4, N=9, got \[1, 4, 8\]", id="shape"),
    pytest.param({"reduce": "none"}, torch.zeros(1, 4, 9), ValueError, r"out: expected shape \[B, T, Hq, N\]", id="axes"),
    pytest.param({"heads": torch.tensor([[0, 1]])}, torch.zeros(1, 4, 9), ValueError, "out: .* R=1, N=9, got", id="rows"),
    pytest.param({"page_table": torch.tensor([[0, 0]]).int()}, torch.zeros(1, 4, 9), ValueError, "out: .* N=18", id="pages"),
    pytest.param({}, torch.zeros(1, 4, 9).bfloat16(), TypeError, "out: expected dtype float32, got bfloat16", id="dtype"),
    pytest.param({"dtype": torch.bfloat16}, torch.zeros(1, 4, 9), TypeError, "out: expected dtype bfloat16", id="other_dtype"),
    pytest.param({}, torch.zeros(1, 4, 9, device="meta"), ValueError, "out: expected device cpu, got meta", id="device"),
    pytest.param({}, torch.zeros(1, 9, 4).mT, ValueError, "out: expected rows without gaps .* got stride 4", id="stride"),
]


@pytest.mark.parametrize(("change", "out", "error", "message"), BAD_OUT)
def test_bad_out_is_named(change, out, error, message):
    good = {"queries": torch.zeros(1, 2, 4, 4), "keys": torch.zeros(1, 9, 2, 4), "lengths": torch.tensor([5])}
    with pytest.raises(error, match=message):
        attention_mass(**(good | change), out=out, scale=1.0)


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    good = {"queries": torch.zeros(1, 2, 4, 4), "keys": torch.zeros(1, 9, 2, 4), "lengths": torch.tensor([5])}
    attention_mass(**good, scale=1.0)
    if change.keys() == {"page_table"}:
        change = change | {"lengths": torch.tensor([8])}  # two pages of 9 tokens are in use, of which there is one
    with pytest.raises(error, match=message):
        attention_mass(**(good | change), scale=1.0)


def test_a_backend_asked_for_by_name_is_not_exchanged():
    pytest.importorskip("triton", reason="kernels need triton")
    queries, keys, lengths = make(torch.float64)
    with pytest.raises(ValueError, match="backend: 'triton' cannot run this call: queries are float64"):
        attention_mass(queries, keys, lengths, scale=1.0, backend="triton")


WRONG_VALUES = [
    pytest.param({"lengths": torch.tensor([8])}, "lengths: expected values in", id="lengths"),
    pytest.param({"heads": torch.tensor([[-1]])}, "heads: expected values in", id="heads"),
    pytest.param({"page_table": torch.tensor([[3]]).int()}, "page_table: expected values in", id="page_table"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_VALUES)
def test_kernels_check_values_when_debugging(monkeypatch, change, message):
    """A kernel cannot look at values without waiting for the device, so only OUTRIDER_DEBUG=1 makes it."""
    kernel = SimpleNamespace(obstacle=lambda *_: None, attention_mass=lambda *_, **__: "result")
    monkeypatch.setattr(api, "_triton", lambda: kernel)
    arguments = {"queries": torch.zeros(1, 2, 4, 4), "keys": torch.zeros(1, 9, 2, 4), "lengths": torch.tensor([5])} | change
    for value in ("", "0"):
        monkeypatch.setenv("OUTRIDER_DEBUG", value)
        assert attention_mass(**arguments, scale=1.0, backend="triton") == "result"
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        attention_mass(**arguments, scale=1.0, backend="triton")
