"""block_mass against a loop over single queries in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import attention_mass, block_mass

HEADS = [pytest.param(4, 4, id="mha"), pytest.param(6, 2, id="gqa"), pytest.param(5, 1, id="mqa")]
LENGTHS = [0, 20, 33]
T, BLOCK, SCALE = 11, 4, 0.3  # blocks of 4, 4 and 3 queries
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
    block: int = BLOCK,
    dtype: torch.dtype = torch.float64,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masses `[B, NB, Hq, N]` and logsumexp `[B, Hq, T]`, or the given one, one query after the other, computed in `dtype`."""
    B, T, Hq, _ = queries.shape
    group = Hq // keys.shape[2]
    mass = torch.zeros(B, -(-T // block), Hq, keys.shape[1], dtype=dtype)
    logsumexp = torch.zeros(B, Hq, T, dtype=dtype)
    for b, length in enumerate(lengths.tolist()):
        for t in range(T):
            i = t // block
            start, size = length + i * block, min(block, T - i * block)
            for h in range(Hq):
                logits = keys[b, : length + t + 1, h // group].to(dtype) @ queries[b, t, h].to(dtype) * SCALE
                logsumexp[b, h, t] = logits.logsumexp(-1)
                weights = logits.softmax(-1) if given is None else (logits - given[b, h, t]).exp()
                mass[b, i, h, :start] += weights[:start] / size
    return mass, logsumexp


@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("Hq", "Hkv"), HEADS)
def test_error_is_at_most_twice_that_of_torch(assert_as_good_as_torch, Hq, Hkv, dtype, given):
    queries, keys, lengths = make(dtype, Hq, Hkv)
    exact, logsumexp = oracle(queries, keys, lengths)
    logsumexp = logsumexp.float() if given else None
    rounded, _ = oracle(queries, keys, lengths, dtype=dtype, given=logsumexp)
    got = block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE, logsumexp=logsumexp)
    assert got.dtype == torch.float32
    assert_as_good_as_torch(got, rounded, exact)


@pytest.mark.parametrize("block", [1, 4, 11, 100], ids="block{}".format)
def test_float64_is_computed_in_float64(block):
    queries, keys, lengths = make(torch.float64)
    got = block_mass(queries, keys, lengths, block=block, scale=SCALE)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, oracle(queries, keys, lengths, block)[0], rtol=1e-13, atol=1e-15)


def test_there_is_mass_before_a_block_and_none_from_its_start_on():
    queries, keys, lengths = make(torch.float32)
    mass = block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE)
    for b, length in enumerate(LENGTHS):
        for i in range(3):
            assert (mass[b, i, :, : length + i * BLOCK] > 0).all()
            assert (mass[b, i, :, length + i * BLOCK :] == 0).all()


def test_own_block_counts_in_the_denominator_only():
    """With all logits equal, query t gives 1 / (length + t + 1) to each token, and a short block divides by its own size."""
    mass = block_mass(torch.zeros(1, 5, 1, 4), torch.randn(1, 12, 1, 4), torch.tensor([7]), block=3, scale=1.0)
    for i, steps in enumerate([[0, 1, 2], [3, 4]]):
        expected = sum(1 / (7 + t + 1) for t in steps) / len(steps)
        torch.testing.assert_close(mass[0, i, 0, : 7 + 3 * i], torch.full((7 + 3 * i,), expected))


def test_one_block_is_the_attention_mass_of_the_chunk():
    queries, keys, lengths = make(torch.float64)
    got = block_mass(queries, keys, lengths, block=T, scale=SCALE)
    torch.testing.assert_close(got[:, 0], attention_mass(queries, keys, lengths, scale=SCALE))


def test_a_later_key_does_not_reach_earlier_blocks():
    queries, keys, lengths = make(torch.float32)
    clean = block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE)
    for b, length in enumerate(LENGTHS):
        keys[b, length + BLOCK :] = torch.nan
    dirty = block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE)
    assert torch.equal(dirty[:, 0], clean[:, 0])
    assert dirty[1, 1].isnan().any(), "what a query does see is not hidden"


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    T=st.integers(1, 9),
    D=st.sampled_from([1, 3, 8]),
    block=st.integers(1, 10),
)
def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(lengths, T, D, block):
    queries, keys, lengths = make(torch.float64, T=T, D=D, lengths=lengths)
    together = block_mass(queries, keys, lengths, block=block, scale=SCALE)
    for b in range(len(lengths)):
        alone = block_mass(queries[b : b + 1], keys[b : b + 1], lengths[b : b + 1], block=block, scale=SCALE)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("chosen", [[], [4], [0, 2, 3, 5]], ids=str)
def test_only_the_rows_asked_for(chosen):
    queries, keys, lengths = make(torch.float64)
    mass, logsumexp = oracle(queries, keys, lengths)
    others = [h for h in range(6) if h not in chosen]
    logsumexp = logsumexp.float()
    logsumexp[:, others] = torch.nan
    heads = torch.tensor(chosen, dtype=torch.int64)
    for known in (None, logsumexp):
        got = block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE, heads=heads, logsumexp=known)
        torch.testing.assert_close(got, mass[:, :, chosen], rtol=1e-13 if known is None else 1e-5, atol=1e-15)


@pytest.mark.parametrize("Hs", [1, 2])
@pytest.mark.parametrize("span", [1, 5, 64])
def test_what_is_not_listed_has_no_mass(span, Hs):
    """Runs of `span` tokens, the last one cut; keys of the others may hold anything."""
    queries, keys, lengths = make(torch.float64)
    mass, logsumexp = oracle(queries, keys, lengths)
    generator = torch.Generator().manual_seed(span)
    listed = torch.rand(3, 3, Hs, -(-keys.shape[1] // span), generator=generator) < 0.5
    tokens = listed.repeat_interleave(span, -1)[..., : keys.shape[1]].repeat_interleave(6 // Hs, 2)  # [B, NB, Hq, N]
    arguments = {"block": BLOCK, "scale": SCALE, "logsumexp": logsumexp.float(), "listed": listed, "span": span}
    got = block_mass(queries, keys, lengths, **arguments)
    torch.testing.assert_close(got, mass * tokens, rtol=1e-5, atol=1e-15)
    assert (got[~tokens] == 0).all() and (got[tokens & (mass > 0)] > 0).all()
    unread = ~tokens.unflatten(2, (2, 3)).any((1, 3)).transpose(1, 2)  # [B, N, Hkv]: by no block
    own = torch.arange(keys.shape[1]) >= lengths[:, None]  # of the chunk: in the products of its queries
    keys[unread & ~own[..., None]] = torch.nan
    assert torch.equal(block_mass(queries, keys, lengths, **arguments), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_float8_keys_are_scaled_per_head(dtype):
    queries, rows, lengths = make(dtype)
    keys, key_scale = rows.to(FP8), torch.tensor([0.5, 3.0])
    got = block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE, key_scale=key_scale)
    exact, _ = oracle(queries.double(), keys.double() * key_scale.double().view(2, 1), lengths)
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=rounding, atol=rounding / 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
def test_the_result_has_the_dtype_asked_for_and_goes_to_out(dtype):
    queries, keys, lengths = make(torch.float32)
    exact = block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE, dtype=torch.float64)
    torch.testing.assert_close(exact, oracle(queries, keys, lengths)[0], rtol=1e-13, atol=1e-15)
    plain = exact.to(dtype)
    assert torch.equal(block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE, dtype=dtype), plain)
    storage = torch.full((3, 3, 18, 60), torch.nan, dtype=dtype)
    out = storage[:, :, 6:12, 2 : 2 + keys.shape[1]]
    assert block_mass(queries, keys, lengths, block=BLOCK, scale=SCALE, dtype=dtype, out=out) is out
    assert torch.equal(out, plain)
    out.fill_(torch.nan)
    assert storage.isnan().all()


def test_arguments_are_left_as_they_were():
    args = make(torch.float32)
    before = [x.clone() for x in args]
    block_mass(*args, block=BLOCK, scale=SCALE)
    assert all(torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in zip(args, before, strict=True))


BAD = [
    pytest.param({"queries": torch.zeros(1, 2, 3, 4)}, ValueError, "multiple of Hkv=2", id="heads"),
    pytest.param({"queries": torch.zeros(1, 0, 4, 4)}, ValueError, "T=0", id="no_query"),
    pytest.param({"queries": [1.0]}, TypeError, "queries: expected a torch.Tensor, got list", id="no_tensor"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 5)}, ValueError, r"keys: .* with B=1, D=4, got \[1, 9, 2, 5\]", id="head_dim"),
    pytest.param({"keys": torch.zeros(1, 9, 2, 4).half()}, TypeError, "keys: expected dtype float32 or float8", id="dtype"),
    pytest.param(
        {"keys": torch.zeros(1, 9, 4, 2).transpose(2, 3)}, ValueError, "keys: expected a contiguous head dim", id="stride"
    ),
    pytest.param({"keys": torch.zeros(1, 9, 2, 4).to(FP8)}, ValueError, r"key_scale: expected float32 .* got None", id="scale"),
    pytest.param({"lengths": torch.tensor([2.0])}, TypeError, "lengths: expected dtype int32 or int64", id="lengths_dtype"),
    pytest.param({"lengths": torch.tensor([8])}, ValueError, r"lengths: expected values in 0 \.\. 7", id="too_long"),
    pytest.param({"lengths": torch.tensor([-1])}, ValueError, "lengths", id="negative_length"),
    pytest.param({"block": 0}, ValueError, "block: expected at least 1, got 0", id="block"),
    pytest.param({"block": 2.0}, TypeError, "block: expected an int, got float", id="block_type"),
    pytest.param({"heads": torch.zeros(2)}, TypeError, "heads: expected dtype int64, got float32", id="heads_dtype"),
    pytest.param({"heads": torch.zeros(1, 2).long()}, ValueError, r"heads: expected shape \[R\]", id="heads_shape"),
    pytest.param({"heads": torch.tensor([1, 4])}, ValueError, r"heads: expected values in 0 \.\. 3, got 1 \.\. 4", id="head"),
    pytest.param({"heads": torch.tensor([1, 1])}, ValueError, r"heads: expected ascending heads, got \[1, 1\]", id="order"),
    pytest.param({"logsumexp": torch.zeros(1, 4, 3)}, ValueError, "logsumexp: .* with B=1, Hq=4, T=2", id="logsumexp"),
    pytest.param({"logsumexp": torch.zeros(1, 4, 2).half()}, TypeError, "logsumexp: expected dtype float32", id="lse_dtype"),
    pytest.param({"listed": torch.ones(1, 1, 2, 1).bool()}, ValueError, "logsumexp: expected .* got None", id="listed_alone"),
    pytest.param({"listed": torch.ones(1, 1, 2, 2).bool()}, ValueError, "listed: .* with B=1, NB=1, NS=1", id="listed_shape"),
    pytest.param({"listed": torch.ones(1, 1, 2, 1)}, TypeError, "listed: expected dtype bool, got float32", id="listed_dtype"),
    pytest.param(
        {"listed": torch.ones(1, 1, 4, 1).bool()}, ValueError, "listed: expected Hs of 1 or Hkv=2, got Hs=4", id="listed_heads"
    ),
    pytest.param({"span": 0}, ValueError, "span: expected at least 1, got 0", id="span"),
    pytest.param({"dtype": torch.float16}, TypeError, "dtype: expected one of .*bfloat16.* got torch.float16", id="output"),
    pytest.param({"out": torch.zeros(1, 2, 4, 8)}, ValueError, r"out: .* with B=1, NB=1, R=4, N=9, got", id="out_shape"),
    pytest.param(
        {"out": torch.zeros(1, 1, 4, 9).half()}, TypeError, "out: expected dtype float32, got float16", id="out_dtype"
    ),
    pytest.param({"out": torch.zeros(1, 1, 9, 4).mT}, ValueError, "out: expected rows without gaps .* stride 4", id="gaps"),
    pytest.param({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', .* got 'cuda'", id="backend"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(change, error, message):
    good = {"queries": torch.zeros(1, 2, 4, 4), "keys": torch.zeros(1, 9, 2, 4), "lengths": torch.tensor([5]), "block": 2}
    with pytest.raises(error, match=message):
        block_mass(**(good | change), scale=1.0)
