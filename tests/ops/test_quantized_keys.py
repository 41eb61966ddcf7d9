"""The contract of quantized_keys: what is refused, by name; how records lie in memory and how near they are; the masses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import attention_mass, quantize_keys, quantized_mass
from outrider.ops.quantized_keys import BITS, record_words
from outrider.ops.quantized_keys.layout import LARGEST_STEP, coded_blocks, decode, encode

FP8, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16
WORDS = record_words(64, 4)
SHAPES = [(32, 4), (64, 4), (96, 4), (128, 4), (256, 4), (64, 2), (128, 2), (192, 2)]  # head dim, bits
shapes = st.sampled_from(SHAPES)


def of_keys(B=2, N=200, Hkv=2, D=64, L=2, bits=4, dtype=torch.float32, **changes):
    made = {
        "keys": [torch.randn(B, N, Hkv, D).to(dtype) for _ in range(L)],
        "lengths": torch.tensor([190, 70])[:B],
        "records": torch.zeros(L, B, Hkv, max(N // 64 - 1, 0), record_words(D, bits), dtype=torch.int32),
        "bits": bits,
    }
    return made | changes


def of_masses(B=2, T=3, Hq=4, D=64, L=2, dtype=torch.float32, cache=None, **changes):
    made = of_keys(B=B, D=D, L=L, dtype=cache or dtype)
    made |= {"queries": [torch.randn(B, T, Hq, D).to(dtype) for _ in range(L)], "scales": [D**-0.5] * L}
    return made | changes


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


ones = torch.ones(2)
BAD_KEYS = [  # of either entry
    ({"keys": []}, ValueError, "keys: expected one tensor for every layer, at least one, got none"),
    ({"keys": [[1.0], [1.0]]}, TypeError, r"keys\[0\]: expected a torch.Tensor, got list"),
    (
        {"keys": [zeros(2, 200, 2, 64, dtype=torch.int32)] * 2},
        TypeError,
        r"keys\[0\]: expected dtype .*float8_e4m3fn, got int32",
    ),
    ({"keys": [zeros(2, 200, 64)] * 2}, ValueError, r"keys\[0\]: expected shape \[B, N, Hkv, D\].*, got \[2, 200, 64\]"),
    (
        {"keys": [zeros(2, 200, 2, 64), zeros(2, 264, 2, 64)]},
        ValueError,
        r"keys\[1\]: expected shape \[B, N, Hkv, D\] with .*264",
    ),
    (
        {"keys": [zeros(2, 200, 2, 64), zeros(2, 200, 2, 64, dtype=BF16)]},
        TypeError,
        r"keys\[1\]: expected dtype float32, got bf",
    ),
    (
        {"keys": [zeros(2, 200, 2, 64), zeros(2, 2, 200, 64).transpose(1, 2)]},
        ValueError,
        r"keys\[1\]: expected the strides and device of the first layer, \(25600, 128, 64, 1\) on cpu, got \(25600, 64, 12800",
    ),
    (
        {"keys": [zeros(2, 200, 64, 2).transpose(2, 3)] * 2},
        ValueError,
        r"keys\[0\]: expected a contiguous head dim \(stride 1\)",
    ),
    ({"key_scales": [ones]}, ValueError, "key_scales: expected one for each of 2 layers, got 1"),
    ({"key_scales": [None, ones]}, ValueError, r"key_scales\[1\]: expected None with a cache of float32"),
    ({"lengths": [190, 70]}, TypeError, "lengths: expected a torch.Tensor, got list"),
    ({"lengths": zeros(2)}, TypeError, "lengths: expected dtype int32 or int64, got float32"),
    ({"lengths": torch.tensor([5])}, ValueError, r"lengths: expected shape \[B\] with B=2, got \[1\]"),
    ({"bits": 3}, ValueError, "bits: expected one of 2, 4, got 3"),
    ({"records": zeros(2, 2, 2, 2, WORDS)}, TypeError, "records: expected dtype int32, got float32"),
    (
        {"bits": 2, "records": zeros(2, 2, 2, 2, WORDS, dtype=torch.int32)},
        ValueError,
        r"records: expected shape \[L, B, Hkv, blocks, W\] with .*W=320, got \[2, 2, 2, 2, 576\]",
    ),
    (
        {"records": zeros(1, 2, 2, 2, WORDS, dtype=torch.int32)},
        ValueError,
        r"records: expected shape .* with L=2, B=2, Hkv=2, W=576",
    ),
    (
        {"records": zeros(2, 2, 2, 1, WORDS, dtype=torch.int32)},
        ValueError,
        "records: expected room for 2 blocks of 200 tokens, got 1",
    ),
    (
        {"records": zeros(2, 2, 2, WORDS, 2, dtype=torch.int32).transpose(3, 4)},
        ValueError,
        r"records: expected records without gaps \(stride 1\), got stride 2",
    ),
    ({"lengths": torch.tensor([-1, 7])}, ValueError, r"lengths: expected values in 0 \.\. \d+, got -1 \.\. 7"),
    ({"backend": "triton"}, ValueError, "backend: expected one of 'auto', 'reference', 'cuda', got 'triton'"),
]
BAD_MASSES = [
    ({"queries": []}, ValueError, "queries, keys, scales: expected one of each for every layer, got 0, 2 and 2"),
    ({"scales": [1.0]}, ValueError, "queries, keys, scales: expected one of each for every layer, got 2, 2 and 1"),
    ({"queries": [None, None]}, TypeError, r"queries\[0\]: expected a torch.Tensor, got NoneType"),
    ({"queries": [zeros(2, 3, 4, 64).to(FP8)] * 2}, TypeError, r"queries\[0\]: expected dtype .*, got float8_e4m3fn"),
    (
        {"queries": [zeros(2, 3, 4, 64), zeros(2, 3, 4, 64, dtype=BF16)]},
        TypeError,
        r"queries\[1\]: expected dtype float32, got bfl",
    ),
    ({"queries": [zeros(2, 3, 256)] * 2}, ValueError, r"queries\[0\]: expected shape \[B, T, Hq, D\], got \[2, 3, 256\]"),
    (
        {"queries": [zeros(2, 3, 4, 64), zeros(2, 2, 4, 64)]},
        ValueError,
        r"queries\[1\]: expected shape \[B, T, Hq, D\] with .*T=3",
    ),
    (
        {"queries": [zeros(2, 3, 4, 64), zeros(2, 4, 3, 64).transpose(1, 2)]},
        ValueError,
        r"queries\[1\]: expected the strides and device of the first layer",
    ),
    ({"queries": [zeros(2, 3, 4, 32)] * 2}, ValueError, r"keys\[0\]: expected shape \[B, N, Hkv, D\] with B=2, D=32"),
    (
        {"queries": [zeros(2, 3, 4, 64, dtype=BF16)] * 2},
        TypeError,
        r"keys\[0\]: expected dtype bfloat16 or float8_e4m3fn, got fl",
    ),
    ({"queries": [zeros(2, 3, 3, 64)] * 2}, ValueError, "queries: expected a multiple of Hkv=2 query heads, got Hq=3"),
    (
        {"queries": [zeros(2, 0, 4, 64)] * 2},
        ValueError,
        "queries: expected at least one sequence and query token, got B=2, T=0",
    ),
    ({"reduce": "max"}, ValueError, "reduce: expected one of 'mean', 'none', got 'max'"),
    ({"out": zeros(2, 8, 200, dtype=BF16)}, TypeError, "out: expected dtype float32, got bfloat16"),
    ({"out": zeros(2, 4, 200)}, ValueError, r"out: expected shape \[B, R, N\] with B=2, R=8, N=200, got \[2, 4, 200\]"),
    ({"out": zeros(2, 8, 200), "reduce": "none"}, ValueError, r"out: expected shape \[B, T, R, N\] with .*T=3"),
    ({"out": zeros(2, 200, 8).transpose(1, 2)}, ValueError, r"out: expected rows without gaps \(stride 1\), got stride 8"),
    ({"lengths": torch.tensor([0, 198])}, ValueError, r"lengths: expected values in 0 \.\. 197, got 0 \.\. 198"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_KEYS)
def test_bad_keys_are_named(changes, error, message):
    given = of_keys(**changes)
    with pytest.raises(error, match=message):
        quantize_keys(**given)
    assert not given["records"].any()
    if changes.get("keys") != []:
        with pytest.raises(error, match=message):
            quantized_mass(**of_masses(**changes))


@pytest.mark.parametrize(("changes", "error", "message"), BAD_MASSES)
def test_bad_arguments_of_masses_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        quantized_mass(**of_masses(**changes))


def test_more_bad_arguments():
    with pytest.raises(
        TypeError, match=r"dtype: expected one of torch.bfloat16, torch.float32, torch.float64, got torch.float16"
    ):
        quantized_mass(**of_masses(), dtype=FP16)
    with pytest.raises(ValueError, match=r"lengths: expected values in 0 \.\. 200, got 0 \.\. 201"):
        quantize_keys(**of_keys(lengths=torch.tensor([0, 201])))
    for bits, D, multiple in ((4, 48, 32), (2, 96, 64)):
        message = f"keys: expected a head dim that is a multiple of {multiple} for {bits} bits, got {D}"
        with pytest.raises(ValueError, match=message):
            quantize_keys(**of_keys(D=D, bits=bits))
    narrow = [x.to(FP8) for x in of_keys()["keys"]]
    for scales, error, message in (
        (None, ValueError, r"key_scales\[0\]: expected float32 \[Hkv\] with a cache of float8_e4m3fn, got None"),
        ([ones, None], ValueError, r"key_scales\[1\]: expected float32 \[Hkv\]"),
        ([ones, ones[:1]], ValueError, r"key_scales\[1\]: expected shape \[Hkv\]"),
        ([ones.to(BF16)] * 2, TypeError, r"key_scales\[0\]: expected dtype float32, got bfloat16"),
    ):
        with pytest.raises(error, match=message):
            quantize_keys(**of_keys(keys=narrow, key_scales=scales))


OBSTACLES = [
    ({"dtype": torch.float32}, "it takes keys in bfloat16, float16 or float8_e4m3fn, got torch.float32"),
    ({"D": 256}, "it takes a head dim of 64 or 128, got 256"),
    ({"L": 65, "B": 1, "N": 130}, "it takes at most 64 layers, got 65"),
    (
        {"keys": [zeros(2, 200, 2, 68, dtype=BF16)[..., :64]] * 2},
        r"multiples of 16 bytes, which keys\[0\] with strides .* does not",
    ),
    (
        {"keys": [zeros(2 * 200 * 128 + 1, dtype=BF16)[1:].view(2, 200, 2, 64)] * 2},
        r"multiples of 16 bytes, which keys\[0\] with",
    ),
    (
        {"records": zeros(2, 2, 2, 2, WORDS + 1, dtype=torch.int32)[..., 1:]},
        "multiples of 16 bytes, which records with strides",
    ),
    ({}, "it needs a CUDA device, got cpu"),
]


@pytest.mark.parametrize(("changes", "reason"), OBSTACLES)
def test_what_the_kernel_for_records_does_not_take_is_named(changes, reason):
    given = of_keys(**{"dtype": BF16} | changes)
    with pytest.raises(ValueError, match=f"backend: 'cuda' cannot run this call: .*{reason}"):
        quantize_keys(**given, backend="cuda")
    assert not given["records"].any()


OBSTACLES_OF_MASSES = [
    ({"dtype": torch.float64, "cache": torch.float64}, "it takes bfloat16 or float16 queries, got torch.float64"),
    ({"T": 16, "Hq": 10}, r"at most 64 queries per KV head, with heads padded to a power of two, got 16 x 5 \(128\)"),
    ({"output": torch.float64}, "it writes float32 or bfloat16, got torch.float64"),
    ({"queries": [zeros(2, 3, 4, 65, dtype=BF16)[..., 1:]] * 2}, r"multiples of 16 bytes, which queries\[0\] with strides"),
    ({"out": zeros(2, 8, 202)[..., :200]}, r"rows of a multiple of 8 masses at multiples of 16 bytes, got 200, strides \(1616"),
    (
        {"keys": [zeros(2, 197, 2, 64, dtype=BF16)] * 2},
        "rows of a multiple of 8 masses at multiples of 16 bytes, got 197, strides None",
    ),
    ({}, "it needs a CUDA device, got cpu"),
]


@pytest.mark.parametrize(("changes", "reason"), OBSTACLES_OF_MASSES)
def test_what_the_kernels_for_masses_do_not_take_is_named(changes, reason):
    given = of_masses(**{"dtype": BF16} | {name: x for name, x in changes.items() if name != "output"})
    with pytest.raises(ValueError, match=f"backend: 'cuda' cannot run this call: .*{reason}"):
        quantized_mass(**given, dtype=changes.get("output"), backend="cuda")


def test_record_words_and_coded_blocks():
    assert BITS == (2, 4)
    for D, bits in SHAPES:
        assert 32 * record_words(D, bits) == 64 * D * bits + 2 * 16 * D  # codes, and two float16 a channel
    lengths = torch.tensor([0, 1, 63, 64, 127, 128, 129, 191, 192, 255, 256, 100_000])
    coded = coded_blocks(lengths)
    assert coded.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 1561]
    exact = (lengths - 64 * coded)[lengths >= 64]
    assert exact.min() == 64
    assert exact.max() == 127


@pytest.mark.parametrize(("D", "bits"), SHAPES)
def test_a_record_lies_in_memory_as_the_layout_says(D, bits):
    """Its docstring, number by number."""
    codes = torch.randint(2**bits, (64, D), generator=torch.Generator().manual_seed(0))
    codes[0], codes[1] = 0, 2**bits - 1
    low, step = torch.arange(D) / 8 - 4, 2.0 ** (torch.arange(D) % 7 - 5)
    record = encode((low + codes * step).view(64, D), bits)
    assert record.shape == (record_words(D, bits),)
    words = [word % 2**32 for word in record.tolist()]
    ranges = record[D * 2 * bits :].view(FP16).float()
    assert torch.equal(ranges[:D], low)
    for lane in range(32):
        g, q = divmod(lane, 4)
        for token in range(8):  # of the lane: 2 i + r
            for s in range(D // 16):
                for h in range(2):
                    for e in range(2):
                        place, dim = (2 * s + h) * bits, D // 4 * q + 4 * s + 2 * h + e
                        word = token * (D * bits // 128) + place // 16  # of the lane
                        found = words[word // 4 * 128 + 4 * lane + word % 4] >> (16 * e + place % 16) & 2**bits - 1
                        assert found == codes[8 * g + token, dim]
                        assert ranges[D + dim] == step[dim] * 2 ** (5 - place % 8)


@settings(max_examples=100, deadline=None)
@given(
    shapes, st.integers(0, 2**31), st.integers(-30, 12), st.integers(-30, 12), st.sampled_from(["normal", "uniform", "spikes"])
)
def test_a_decoded_key_is_half_a_step_away(shape, seed, size, offset, kind):
    """And what float16 makes of the smallest value, of which it keeps 11 bits, and of the steps between."""
    (D, bits), generator = shape, torch.Generator().manual_seed(seed)
    x = torch.rand(3, 64, D, generator=generator) if kind == "uniform" else torch.randn(3, 64, D, generator=generator)
    x = (x**5 if kind == "spikes" else x) * 2.0**size + torch.randn(D, generator=generator) * 2.0**offset
    low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
    step = (high - low) / (2**bits - 1)
    assume(step.max() <= LARGEST_STEP)
    rounded = 2.0**-11 * (low.abs() + high - low) + 2.0**-24 * 2**bits + 2.0**-22 * x.abs()
    assert ((decode(encode(x, bits), D, bits) - x).abs() <= step / 2 + rounded).all()


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 2**31), st.integers(-8, 9))
def test_what_was_decoded_has_the_same_codes(shape, seed, size):
    (D, bits), generator = shape, torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 64, D, generator=generator) + 2 * torch.randn(D, generator=generator)) * 2.0**size
    record = encode(x, bits)
    again = encode(decode(record, D, bits), bits)
    assert torch.equal(again, record)


@pytest.mark.parametrize(("D", "bits"), SHAPES)
def test_codes_use_all_values(D, bits):
    """Tokens evenly between two values, in any order, take every code equally often; these values themselves stay."""
    x = torch.linspace(-4, 11, 64).view(64, 1).expand(64, D)
    x = torch.stack([x[:, d].roll(d) for d in range(D)], -1)
    decoded = decode(encode(x, bits), D, bits)
    levels = torch.linspace(-4, 11, 2**bits)
    for d in range(D):
        values, counts = decoded[:, d].unique(return_counts=True)
        assert torch.equal(values, levels)
        assert counts.max() - counts.min() <= 64 // 2**bits  # the outermost are rounded to from one side
    assert torch.equal(decoded[x == -4], torch.full((D,), -4.0))
    assert torch.equal(decoded[x == 11], torch.full((D,), 11.0))


@pytest.mark.parametrize("bits", BITS)
def test_numbers_that_float16_does_not_hold_stay_finite(bits):
    x = torch.stack([torch.full((64,), 1e30), torch.linspace(-1e30, 1e30, 64), torch.full((64,), 1e-30), torch.zeros(64)], -1)
    decoded = decode(encode(x.repeat(1, 16), bits), 64, bits)[:, :4]
    assert decoded[:, 0].unique().tolist() == [65504]
    assert decoded[:, 1].isfinite().all()
    assert not decoded[:, 2:].any()


def oracle(given: dict, T: int) -> Tensor:
    """Masses by `attention_mass` on keys of which the coded blocks went through `encode` and `decode`."""
    D, bits, B = given["keys"][0].shape[-1], given["bits"], len(given["lengths"])
    rows = []
    for layer, (queries, keys) in enumerate(zip(given["queries"], given["keys"], strict=True)):
        scales = given.get("key_scales")
        keys = keys.double().clone() if scales is None else (keys.float() * scales[layer].view(-1, 1)).double()
        for b in range(B):
            for block in range(max(int(given["lengths"][b]) - 64, 0) // 64):
                few = keys[b, 64 * block : 64 * (block + 1)].transpose(0, 1)
                few.copy_(decode(encode(few.float(), bits), D, bits))
        rows.append(attention_mass(queries.double(), keys, given["lengths"], scale=given["scales"][layer], reduce="none"))
    return torch.cat(rows, 2)


@settings(max_examples=40, deadline=None)
@given(
    shapes, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from([torch.float64, torch.float32, FP8]), st.data(),
)  # fmt: skip
def test_masses_are_those_of_attention_mass_on_decoded_keys(shape, B, T, Hkv, group, L, dtype, data):
    (D, bits), wide = shape, torch.float32 if dtype == FP8 else dtype
    torch.manual_seed(B + 10 * T)
    lengths = torch.tensor(
        data.draw(st.lists(st.sampled_from([0, 1, 63, 64, 127, 128, 191, 192, 300]), min_size=B, max_size=B))
    )
    N = int(lengths.max()) + T + data.draw(st.integers(0, 2))
    given = of_keys(B, N, Hkv, D, L, bits, dtype, lengths=lengths.to(data.draw(st.sampled_from([torch.int32, torch.int64]))))
    if dtype == FP8:
        given["key_scales"] = [0.5 + torch.rand(Hkv) for _ in range(L)]
    quantize_keys(**given)
    given |= {"queries": [torch.randn(B, T, group * Hkv, D).to(wide) for _ in range(L)], "scales": [D**-0.5, 0.1, 0.2][:L]}
    wanted = oracle(given, T)
    poison(given, T)
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for reduce, expected in (("none", wanted), ("mean", wanted.mean(1))):
        got = quantized_mass(**given, reduce=reduce)
        assert got.dtype == wide
        torch.testing.assert_close(got, expected.to(wide), **near)
        assert quantized_mass(**given, reduce=reduce, dtype=BF16).dtype == BF16
        for b, n in enumerate(lengths.tolist()):
            assert not got[b, ..., n:].any()


def poison(given: dict, T: int) -> None:
    """Make NaN of all that masses must not be read from."""
    for b, n in enumerate(given["lengths"].tolist()):
        coded = max(n - 64, 0) // 64
        given["records"][:, b, :, coded:] = 0x7FFF7FFF
        for keys in given["keys"]:
            keys[b, : 64 * coded] = torch.nan
            keys[b, n + T :] = torch.nan


def test_short_sequences_have_no_codes():
    """Fewer than 128 tokens: masses are those of attention_mass, records may be anything, and need no room in short caches."""
    for N in (200, 127):
        given = of_masses(dtype=torch.float64, lengths=torch.tensor([124, 0]))
        given["keys"] = [x[:, :N] for x in given["keys"]]
        given["records"] = given["records"][:, :, :, : N // 64 - 1].contiguous().fill_(0x7FFF7FFF)
        quantize_keys(**{name: given[name] for name in ("keys", "lengths", "records", "bits")})
        assert (given["records"] == 0x7FFF7FFF).all()
        wanted = [
            attention_mass(q, k, given["lengths"], scale=64**-0.5) for q, k in zip(given["queries"], given["keys"], strict=True)
        ]
        torch.testing.assert_close(quantized_mass(**given), torch.cat(wanted, 1), rtol=1e-12, atol=1e-12)


def test_last_writes_the_last_coded_block_alone():
    given = of_keys(B=3, N=330, lengths=torch.tensor([327, 128, 127]))
    every = given["records"].clone()
    quantize_keys(**given | {"records": every})
    quantize_keys(**given, last=True)
    for b, block in ((0, 3), (1, 0)):
        assert torch.equal(given["records"][:, b, :, block], every[:, b, :, block])
        given["records"][:, b, :, block] = 0
    assert not given["records"].any()


def test_the_result_goes_to_out():
    given = of_masses()
    quantize_keys(**{name: given[name] for name in ("keys", "lengths", "records", "bits")})
    wanted = quantized_mass(**given)
    storage = torch.full((2, 24, 210), torch.nan)
    out = storage[:, 8:16, 5:205]
    assert quantized_mass(**given, out=out) is out
    assert torch.equal(out, wanted)
    out.fill_(torch.nan)
    assert storage.isnan().all()
