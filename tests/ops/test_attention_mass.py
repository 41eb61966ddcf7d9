"""attention_mass against a loop over single queries in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import attention_mass

HEADS = [pytest.param(4, 4, id="mha"), pytest.param(6, 2, id="gqa"), pytest.param(5, 1, id="mqa")]
LENGTHS = [0, 20, 33]


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


BAD = [
    pytest.param({"queries": torch.zeros(1, 2, 3, 4)}, ValueError, "multiple of Hkv=2", id="heads"),
    pytest.param({"queries": torch.zeros(1, 0, 4, 4)}, ValueError, "T=0", id="no_query"),
    pytest.param({"queries": torch.zeros(2, 4, 4)}, ValueError, r"queries: expected shape \[B, T, Hq, D\]", id="rank"),
    pytest.param({"queries": [1.0]}, TypeError, "queries: expected a torch.Tensor, got list", id="no_tensor"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 5)}, ValueError, r"keys: .* with B=1, D=4, got \[1, 9, 2, 5\]", id="head_dim"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 4).half()}, TypeError, "keys: expected dtype float32, got float16", id="dtype"),
    pytest.param({"lengths": torch.tensor([2.0])}, TypeError, "lengths: expected dtype int32 or int64", id="lengths_dtype"),
    pytest.param({"lengths": torch.tensor([8])}, ValueError, r"lengths: expected values in 0 \.\. 7", id="too_long"),
    pytest.param({"lengths": torch.tensor([-1])}, ValueError, "lengths", id="negative_length"),
    pytest.param({"page_table": torch.zeros(1, 3)}, TypeError, "page_table: expected dtype int32", id="page_table"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 4, device="meta")}, ValueError, "keys: expected device cpu", id="device"),
    pytest.param({"reduce": "sum"}, ValueError, "reduce: expected one of 'mean', 'max', 'none', got 'sum'", id="reduce"),
    pytest.param({"backend": "triton"}, ValueError, "backend: expected one of 'auto', 'reference'", id="no_fall_back"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    good = {"queries": torch.zeros(1, 2, 4, 4), "keys": torch.zeros(1, 9, 2, 4), "lengths": torch.tensor([5])}
    attention_mass(**good, scale=1.0)
    with pytest.raises(error, match=message):
        attention_mass(**(good | change), scale=1.0)
