"""span_mass against a loop over single queries and pages in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import span_mass
from outrider.ops.span_mass import PAGE as DEFAULT_PAGE

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


def oracle(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    dtype: torch.dtype = torch.float64,
    block: int = BLOCK,
    span: int = SPAN,
    page: int = PAGE,
) -> Tensor:
    """`[B, NB, Hq, NS]`, one query after the other, the bound of a page as the definition has it, computed in `dtype`."""
    B, T, Hq, _ = queries.shape
    N, Hkv = keys.shape[1:3]
    result = torch.zeros(B, -(-T // block), Hq, -(-N // span), dtype=dtype)
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            i = t // block
            pages, size = (length + i * block) // page, min(block, T - i * block)
            for h in range(Hq if pages else 0):
                rows = keys[b, : pages * page, h // (Hq // Hkv)].to(dtype).view(pages, page, -1)
                products = torch.stack([rows.amin(1), rows.amax(1)]) * queries[b, t, h].to(dtype)
                bounds = products.amax(0).sum(-1) * SCALE
                for p, mass in enumerate(bounds.softmax(0)):
                    result[b, i, h, p * page // span] += mass / size
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


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param({}, id="two_pages_a_span"),
        pytest.param({"block": 1, "span": 4, "page": 4}, id="one_query_a_block_one_page_a_span"),
        pytest.param({"block": 5, "span": 12, "page": 4}, id="three_pages_a_span"),
        pytest.param({"block": 3, "span": 64, "page": 2}, id="one_span_for_all"),
        pytest.param({"block": 100, "span": 16, "page": 16}, id="one_block"),
        pytest.param({"block": 4, "span": 3, "page": 1}, id="one_token_a_page"),
    ],
)
def test_float64_is_computed_in_float64(cut):
    arguments = make(torch.float64)
    got = run(*arguments, **cut)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, oracle(*arguments, **cut), rtol=1e-13, atol=1e-15)


def test_float32_is_computed_in_float64_and_rounded():
    arguments = make(torch.float32)
    torch.testing.assert_close(run(*arguments), oracle(*arguments).float(), rtol=2**-23, atol=0)


def test_a_page_has_16_tokens_unless_told():
    arguments, cut = make(torch.float32, lengths=[70, 90]), {"block": 5, "span": 32, "scale": SCALE}
    got = span_mass(*arguments, **cut)
    assert DEFAULT_PAGE == 16
    assert torch.equal(got, span_mass(*arguments, **cut, page=16))
    assert not torch.equal(got, span_mass(*arguments, **cut, page=8))


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


@settings(max_examples=30, deadline=None)
@given(length=st.integers(8, 60), page=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 1000))
def test_no_token_is_above_the_bound_of_its_page(length, page, seed):
    """Zero keys in the first page make its bound 0: the log of how much more the others have than it is their bound."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(1, n, 2, 8, dtype=torch.float64, generator=generator) for n in (3, length + 3))
    keys[:, :page] = 0
    mass = run(queries, keys, torch.tensor([length]), block=1, span=page, page=page)
    for t in range(3):
        pages = (length + t) // page
        bound = (mass[0, t, :, :pages] / mass[0, t, :, :1]).log()  # [Hq, pages]
        rows = keys[0, : pages * page].unflatten(0, (pages, page))
        highest = torch.einsum("hd,pjhd->hpj", queries[0, t], rows).amax(-1) * SCALE
        assert (bound >= highest - 1e-9).all()


def test_equal_keys_share_equally():
    """Pages count: a span that is only partly before the block has as much less."""
    mass = run(torch.randn(1, 2, 1, 4), torch.ones(1, 60, 1, 4), torch.tensor([39]))
    expected = torch.tensor([2.0, 2, 2, 2, 1, 0, 0, 0]) / 9  # tokens 36 .. 38 are in no page that has ended
    torch.testing.assert_close(mass[0, 0, 0], expected)


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


def test_keys_from_a_block_on_do_not_reach_it():
    queries, keys, lengths = make(torch.float32)
    clean = run(queries, keys, lengths)
    for b, length in enumerate(LENGTHS):
        keys[b, length // PAGE * PAGE :] = torch.nan
    dirty = run(queries, keys, lengths)
    assert torch.equal(dirty[:, 0], clean[:, 0])
    assert dirty[1, 1].isnan().any(), "what is before a block is not hidden"


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), T=st.integers(1, 9), D=st.sampled_from([1, 3, 8]))
def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(lengths, T, D):
    queries, keys, lengths = make(torch.float64, T=T, D=D, lengths=lengths)
    together = run(queries, keys, lengths)
    for b in range(len(lengths)):
        alone = run(queries[b : b + 1], keys[b : b + 1], lengths[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_float8_keys_are_scaled_per_head(dtype):
    queries, rows, lengths = make(dtype)
    key_scale = torch.tensor([0.5, 3.0])
    got = run(queries, rows.to(FP8), lengths, key_scale=key_scale)
    exact = oracle(queries.double(), rows.to(FP8).double() * key_scale.double().view(2, 1), lengths)
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=rounding / 100)


def test_lengths_may_be_int32_and_strides_any():
    queries, keys, lengths = make(torch.float32)
    plain = run(queries, keys, lengths)
    queries, lengths = (torch.stack([x, x], -1)[..., 0] for x in (queries, lengths.int()))
    keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert not queries.is_contiguous() and not keys.is_contiguous()
    torch.testing.assert_close(run(queries, keys, lengths), plain, rtol=1e-6, atol=0)


def test_arguments_are_left_as_they_were():
    arguments = make(torch.float32)
    before = [x.clone() for x in arguments]
    run(*arguments)
    for x, y in zip(arguments, before, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


BAD = [
    pytest.param({"queries": torch.zeros(1, 2, 3, 4)}, ValueError, "multiple of Hkv=2", id="heads"),
    pytest.param({"queries": torch.zeros(1, 0, 4, 4)}, ValueError, "T=0", id="no_query"),
    pytest.param({"queries": [1.0]}, TypeError, "queries: expected a torch.Tensor, got list", id="no_tensor"),
    pytest.param({"queries": torch.zeros(1, 2, 4)}, ValueError, r"queries: expected shape \[B, T, Hq, D\]", id="axes"),
    pytest.param(
        {"keys": torch.zeros(1, 9, 4, 2).transpose(2, 3)}, ValueError, "keys: expected a contiguous head dim", id="stride"
    ),
    pytest.param({"key_scale": torch.ones(2)}, ValueError, "key_scale: expected None with a cache of float32", id="no_factor"),
    pytest.param({"lengths": torch.tensor([2.0])}, TypeError, "lengths: expected dtype int32 or int64", id="lengths_dtype"),
    pytest.param({"lengths": torch.tensor([2, 2])}, ValueError, r"lengths: expected shape \[B\] with B=1", id="lengths_shape"),
    pytest.param({"lengths": torch.tensor([-1])}, ValueError, r"lengths: expected values in 0 \.\. 7", id="negative_length"),
    pytest.param({"block": 2.0}, TypeError, "block: expected an int, got float", id="block_type"),
    pytest.param({"page": 0}, ValueError, "page: expected at least 1, got 0", id="no_page"),
    pytest.param({"page": True}, TypeError, "page: expected an int, got bool", id="page_type"),
    pytest.param({"span": 0}, ValueError, "span: expected at least 1, got 0", id="no_span"),
    pytest.param({"span": 8.0}, TypeError, "span: expected an int, got float", id="span_type"),
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
