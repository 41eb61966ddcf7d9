"""span_mass against a loop over single queries and pages in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import span_mass

LENGTHS = [0, 21, 36]
T, BLOCK, PAGE, SPAN, SCALE = 11, 4, 4, 8, 0.3  # blocks of 4, 4 and 3 queries
FP8 = torch.float8_e4m3fn


def make(dtype: torch.dtype, Hq: int = 6, Hkv: int = 2, D: int = 8, lengths: list[int] | None = None, T: int = T):
    """Queries, keys whose rows behind the chunk are NaN, lengths."""
    torch.manual_seed(0)
    lengths = LENGTHS if lengths is None else lengths
    B, N = len(lengths), max(lengths) + T + 5
    queries = (3 * torch.randn(B, T, Hq, D)).to(dtype)
    keys = torch.randn(B, N, Hkv, D).to(dtype)
    for b, length in enumerate(lengths):
        keys[b, length + T :] = torch.nan
    return queries, keys, torch.tensor(lengths)


def oracle(queries: Tensor, keys: Tensor, lengths: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[B, NB, Hq, NS]`, one query after the other, the bound of a page as the definition has it, computed in `dtype`."""
    B, T, Hq, _ = queries.shape
    N, Hkv = keys.shape[1:3]
    result = torch.zeros(B, -(-T // BLOCK), Hq, -(-N // SPAN), dtype=dtype)
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            i = t // BLOCK
            pages, size = (length + i * BLOCK) // PAGE, min(BLOCK, T - i * BLOCK)
            for h in range(Hq if pages else 0):
                rows = keys[b, : pages * PAGE, h // (Hq // Hkv)].to(dtype).view(pages, PAGE, -1)
                products = torch.stack([rows.amin(1), rows.amax(1)]) * queries[b, t, h].to(dtype)
                bounds = products.amax(0).sum(-1) * SCALE
                for page, mass in enumerate(bounds.softmax(0)):
                    result[b, i, h, page * PAGE // SPAN] += mass / size
    return result


def run(*arguments, **options):
    return span_mass(*arguments, **({"block": BLOCK, "span": SPAN, "page": PAGE, "scale": SCALE} | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("Hq", "Hkv"), [(4, 4), (6, 2), (5, 1)])
def test_error_is_at_most_twice_that_of_torch(assert_as_good_as_torch, Hq, Hkv, dtype):
    arguments = make(dtype, Hq, Hkv)
    got = run(*arguments)
    assert got.dtype == torch.float32
    assert_as_good_as_torch(got, oracle(*arguments, dtype=dtype), oracle(*arguments))


def test_float64_is_computed_in_float64():
    arguments = make(torch.float64)
    got = run(*arguments)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, oracle(*arguments), rtol=1e-13, atol=1e-15)


def test_rows_sum_to_one_where_a_page_ends_before_the_block():
    got = run(*make(torch.float64))
    for b, length in enumerate(LENGTHS):
        for i in range(3):
            pages = (length + i * BLOCK) // PAGE
            torch.testing.assert_close(got[b, i].sum(-1), torch.full((6,), float(pages > 0), dtype=torch.float64))
            assert (got[b, i, :, -(-pages * PAGE // SPAN) :] == 0).all()


def test_a_page_of_one_token_is_exact():
    """Bounds of single tokens are their logits: masses are those of a softmax over the block's past."""
    queries, keys, lengths = make(torch.float64, lengths=[21])
    got = run(queries, keys, lengths, span=1, page=1)
    past = (keys[0, :21].repeat_interleave(3, 1) * queries[0, :BLOCK, None]).sum(-1) * SCALE  # [t, 21, Hq]
    torch.testing.assert_close(got[0, 0, :, :21], past.softmax(1).mean(0).T)


def test_a_needle_is_not_diluted():
    """One key that one query of the block looks at: its span gets the query's whole vote."""
    queries, keys = torch.zeros(1, 16, 1, 8), torch.full((1, 400, 1, 8), 0.01)
    queries[0, 5, 0, 3], keys[0, 137, 0, 3] = 40.0, 1.0
    got = span_mass(queries, keys, torch.tensor([384]), block=16, span=64, scale=1.0)[0, 0, 0]
    assert got.argmax() == 137 // 64 and got[137 // 64] > 1 / 16 + 15 / 16 / 6 - 0.01


def test_what_no_block_may_use_does_not_matter():
    """The last block's own tokens, and a page that does not end before it."""
    queries, keys, lengths = make(torch.float32)
    clean = run(queries, keys, lengths)
    for b, length in enumerate(LENGTHS):
        keys[b, (length + 2 * BLOCK) // PAGE * PAGE :] = torch.nan
    assert torch.equal(run(queries, keys, lengths), clean)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), T=st.integers(1, 9), D=st.sampled_from([1, 3, 8]))
def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(lengths, T, D):
    queries, keys, lengths = make(torch.float64, T=T, D=D, lengths=lengths)
    together = run(queries, keys, lengths)
    for b in range(len(lengths)):
        alone = run(queries[b : b + 1], keys[b : b + 1], lengths[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-15)


def test_float8_keys_are_scaled_per_head():
    queries, rows, lengths = make(torch.float64)
    key_scale = torch.tensor([0.5, 3.0])
    got = run(queries, rows.to(FP8), lengths, key_scale=key_scale)
    torch.testing.assert_close(got, oracle(queries, rows.to(FP8).double() * key_scale.double().view(2, 1), lengths))


BAD = [
    pytest.param({"queries": torch.zeros(1, 2, 3, 4)}, ValueError, "multiple of Hkv=2", id="heads"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 5)}, ValueError, r"keys: .* with B=1, D=4, got \[1, 9, 2, 5\]", id="head_dim"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 4).half()}, TypeError, "keys: expected dtype float32 or float8", id="dtype"),
    pytest.param(
        {"keys": torch.zeros(1, 9, 2, 4).to(FP8)}, ValueError, r"key_scale: expected float32 .* got None", id="scale8"
    ),
    pytest.param({"lengths": torch.tensor([8])}, ValueError, r"lengths: expected values in 0 \.\. 7", id="too_long"),
    pytest.param({"block": 0}, ValueError, "block: expected at least 1, got 0", id="block"),
    pytest.param({"page": 3, "span": 3}, ValueError, "page: expected a power of 2, got 3", id="page"),
    pytest.param({"page": 4, "span": 6}, ValueError, "span: expected a multiple of page=4, got 6", id="span"),
    pytest.param({"scale": -1.0}, ValueError, "scale: expected at least 0, got -1.0", id="scale"),
    pytest.param({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', .* got 'cuda'", id="backend"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    good = {"queries": torch.zeros(1, 2, 4, 4), "keys": torch.zeros(1, 9, 2, 4), "lengths": torch.tensor([5]), "scale": 1.0}
    with pytest.raises(error, match=message):
        span_mass(**(good | {"block": 2, "span": 4, "page": 4} | change))
