"""The contract of rotary_append: what is refused, by name, before anything is written; the maths; transformers' own layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import rotary_append

FP8, BF16, FP16 = torch.float8_e4m3fn, torch.bfloat16, torch.float16


def arguments(B=2, T=3, Hq=4, Hkv=2, D=8, N=10, dtype=torch.float32, cache=None, **changes):
    made = {
        "projected": torch.randn(B, T, Hq + 2 * Hkv, D).to(dtype),
        "cos": torch.randn(B, T, D // 2).repeat(1, 1, 2).to(dtype),
        "sin": torch.randn(B, T, D // 2).repeat(1, 1, 2).to(dtype),
        "key_cache": torch.zeros(B, N, Hkv, D).to(cache or dtype),
        "value_cache": torch.zeros(B, N, Hkv, D).to(cache or dtype),
        "lengths": torch.tensor([0, 7])[:B],
    }
    return made | changes


def fp8(**changes):
    caches = {name: torch.zeros(2, 10, 2, 8).to(FP8) for name in ("key_cache", "value_cache")}
    return caches | {"key_scale": torch.ones(2), "value_scale": torch.ones(2)} | changes


BAD = [
    ({"projected": [1.0]}, TypeError, "projected: expected a torch.Tensor, got list"),
    ({"projected": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, TypeError, "projected: expected dtype .*, got int32"),
    ({"projected": torch.zeros(2, 3, 64)}, ValueError, r"projected: expected shape \[B, T, H, D\], got \[2, 3, 64\]"),
    (
        {"projected": torch.zeros(2, 8, 3, 8).transpose(1, 2)},
        ValueError,
        "projected: expected a contiguous tensor, got strides",
    ),
    ({"projected": torch.zeros(2, 3, 4, 8)}, ValueError, r"projected: expected more than 2 \* Hkv = 4 heads, got 4"),
    ({"cos": torch.zeros(2, 3, 4)}, ValueError, r"cos: expected shape \[B, T, D\] with .*, got \[2, 3, 4\]"),
    ({"sin": torch.zeros(2, 4, 8)}, ValueError, r"sin: expected shape \[B, T, D\] with .*, got \[2, 4, 8\]"),
    ({"sin": torch.zeros(2, 3, 8, dtype=BF16)}, TypeError, "sin: expected dtype float32, got bfloat16"),
    ({"query_norm": torch.ones(4)}, ValueError, r"query_norm: expected shape \[D\]"),
    ({"key_norm": torch.ones(8, dtype=BF16)}, TypeError, "key_norm: expected dtype float32, got bfloat16"),
    ({"key_cache": torch.zeros(2, 10, 2, 8, dtype=FP16)}, TypeError, "key_cache: expected dtype float32 or float8_e4m3fn"),
    ({"key_cache": torch.zeros(1, 10, 2, 8)}, ValueError, r"key_cache: expected shape \[B, N, Hkv, D\]"),
    ({"value_cache": torch.zeros(2, 10, 2, 8).to(FP8)}, TypeError, "value_cache: expected dtype float32, got float8"),
    ({"value_cache": torch.zeros(2, 11, 2, 8)}, ValueError, r"value_cache: expected shape \[B, N, Hkv, D\]"),
    ({"key_cache": torch.zeros(2, 10, 8, 2).transpose(2, 3)}, ValueError, "key_cache: expected a contiguous head dim"),
    ({"value_cache": torch.zeros(2, 10, 8, 2).transpose(2, 3)}, ValueError, "value_cache: expected a contiguous head dim"),
    ({"key_scale": torch.ones(2)}, ValueError, "key_scale: expected None"),
    ({"value_scale": torch.ones(2)}, ValueError, "value_scale: expected None"),
    (fp8(key_scale=None), ValueError, "key_scale: expected float32"),
    (fp8(value_scale=torch.ones(1)), ValueError, r"value_scale: expected shape \[Hkv\]"),
    (fp8(value_scale=torch.ones(2, dtype=BF16)), TypeError, "value_scale: expected dtype float32"),
    ({"lengths": torch.zeros(2)}, TypeError, "lengths: expected dtype int32 or int64, got float32"),
    ({"lengths": torch.tensor([0])}, ValueError, r"lengths: expected shape \[B\]"),
    ({"lengths": torch.tensor([0, 8])}, ValueError, r"lengths: expected values in 0 \.\. 7, got 0 \.\. 8"),
    ({"lengths": torch.tensor([-1, 0])}, ValueError, r"lengths: expected values in 0 \.\. 7, got -1 \.\. 0"),
    ({"backend": "triton"}, ValueError, "backend: expected one of 'auto', 'reference', 'cuda', got 'triton'"),
    ({"backend": "cuda"}, ValueError, "cannot run this call: it takes bfloat16 or float16 tokens, got torch.float32"),
]


def refused(given, error, message):
    with pytest.raises(error, match=message):
        rotary_append(**given)
    assert not given["key_cache"].float().any()
    assert not given["value_cache"].float().any()


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments_are_named(changes, error, message):
    refused(arguments(**changes), error, message)


def test_an_odd_head_dim_is_refused():
    zeros = {"cos": torch.zeros(2, 3, 7), "sin": torch.zeros(2, 3, 7)}
    refused(arguments(D=7, **zeros), ValueError, "projected: expected an even head dim, got 7")


OBSTACLES = [
    ({"D": 20}, "it takes a head dim that is a multiple of 8 up to 256, got 20"),
    ({"D": 264}, "it takes a head dim that is a multiple of 8 up to 256, got 264"),
    (
        {"key_cache": torch.zeros(2, 10, 2, 10, dtype=BF16)[..., :8]},
        r"multiples of 8 bytes, which key_cache with strides .* does not",
    ),
    ({"cos": torch.zeros(2, 3, 8, 2, dtype=BF16)[..., 0]}, "dense rows at multiples of 8 bytes, which cos with strides"),
    ({"key_norm": torch.zeros(9, dtype=BF16)[1:]}, "multiples of 8 bytes, which key_norm with"),
    (fp8(value_cache=torch.zeros(2, 10, 2, 9).to(FP8)[..., 1:]), "multiples of 4 bytes, which value_cache with strides"),
    ({}, "it needs a CUDA device, got cpu"),
]


@pytest.mark.parametrize(("changes", "reason"), OBSTACLES)
def test_what_the_kernel_does_not_take_is_named(changes, reason):
    refused(arguments(dtype=BF16, backend="cuda", **changes), ValueError, f"backend: 'cuda' cannot run this call: .*{reason}")


def oracle(given: dict, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the maths: a head is D / 2 complex numbers, turned by the angles."""
    x = given["projected"].double()
    B, T, H, D = x.shape
    Hkv = given["key_cache"].shape[2]
    turn = torch.complex(given["cos"].double(), given["sin"].double())[..., : D // 2]
    rows = torch.empty(B, T, H, D, dtype=torch.float64)
    for h in range(H):
        row, gain = x[:, :, h], given["query_norm" if h < H - 2 * Hkv else "key_norm"]
        if h >= H - Hkv:
            rows[:, :, h] = row
            continue
        if gain is not None:
            row = row / (row.pow(2).sum(-1, keepdim=True) / D + eps).sqrt() * gain.double()
        turned = torch.complex(row[..., : D // 2], row[..., D // 2 :]) * turn
        rows[:, :, h] = torch.cat([turned.real, turned.imag], -1)
    return rows[:, :, : H - 2 * Hkv], rows[:, :, H - 2 * Hkv : H - Hkv], rows[:, :, H - Hkv :]


@settings(max_examples=50)
@given(
    st.integers(0, 3), st.integers(0, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans(),
    st.sampled_from([torch.float64, torch.float32]), st.data(),
)  # fmt: skip
def test_every_row_is_where_it_belongs_and_what_the_maths_says(B, T, Hq, Hkv, half, query_norm, key_norm, dtype, data):
    torch.manual_seed(B + 10 * T)
    D, N = 2 * half, T + 6
    norms = {
        "query_norm": torch.randn(D).to(dtype) if query_norm else None,
        "key_norm": torch.randn(D).to(dtype) if key_norm else None,
    }
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, N - T), min_size=B, max_size=B)), dtype=torch.int64)
    given = arguments(B, T, Hq, Hkv, D, N, dtype, lengths=lengths, **norms)
    for name in ("key_cache", "value_cache"):  # as the cache stores them
        given[name] = torch.full((B, Hkv, N, D), torch.nan, dtype=dtype).transpose(1, 2)
    queries, *wanted = oracle(given, 1e-3)
    got = rotary_append(**given, eps=1e-3)
    near = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert got.is_contiguous()
    torch.testing.assert_close(got, queries.to(dtype), **near)
    for name, rows in zip(("key_cache", "value_cache"), wanted, strict=True):
        expected = torch.full((B, N, Hkv, D), torch.nan, dtype=dtype)
        for b, n in enumerate(lengths.tolist()):
            expected[b, n : n + T] = rows[b].to(dtype)
        torch.testing.assert_close(given[name], expected, equal_nan=True, **near)
    assert torch.equal(given["lengths"], lengths)


def test_a_float8_cache_holds_quotients_within_its_range():
    given = arguments(**fp8(key_scale=torch.tensor([0.5, 0.001]), value_scale=torch.tensor([0.001, 0.25])))
    _, keys, values = oracle(given | {"query_norm": None, "key_norm": None}, 0.0)
    rotary_append(**given)
    for rows, cache, scale in ((keys, "key_cache", "key_scale"), (values, "value_cache", "value_scale")):
        wanted = (rows / given[scale].double().view(-1, 1)).clamp(-448, 448)
        got = torch.stack([given[cache][b, n : n + 3] for b, n in enumerate((0, 7))]).double()
        assert ((got - wanted).abs() <= wanted.abs().clamp(min=2.0**-6) * 2.0**-4 * (1 + 1e-5)).all()  # a rounding to four bits
        assert (got.abs() == 448).any()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_agrees_with_transformers_layers(dtype):
    """To the last bit: Qwen 3's norms over heads, Llama's angles and rotation."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    torch.manual_seed(0)
    B, T, Hq, Hkv, D = 2, 5, 6, 2, 16
    lengths = torch.tensor([3, 4000])
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=Hq * D, num_attention_heads=Hq))
    cos, sin = rotary(torch.zeros(1, dtype=dtype), lengths[:, None] + torch.arange(T))
    norms = [Qwen3RMSNorm(D, eps=1e-5).to(dtype) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
    given = arguments(B, T, Hq, Hkv, D, 4010, dtype, cos=cos, sin=sin, lengths=lengths)
    queries, keys, values = (x.transpose(1, 2) for x in given["projected"].split([Hq, Hkv, Hkv], 2))
    for gains in ([None, None], [norm.weight.detach() for norm in norms]):
        got = rotary_append(**given, query_norm=gains[0], key_norm=gains[1], eps=1e-5)
        normed = (queries, keys) if gains[0] is None else (norms[0](queries), norms[1](keys))
        rotated_queries, rotated_keys = apply_rotary_pos_emb(*normed, cos, sin)
        assert torch.equal(got, rotated_queries.transpose(1, 2))
        for cache, rows in ((given["key_cache"], rotated_keys), (given["value_cache"], values)):
            for b, n in enumerate(lengths.tolist()):
                assert torch.equal(cache[b, n : n + T], rows[b].transpose(0, 1))
