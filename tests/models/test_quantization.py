"""Caches in 8 bits: where their factors come from, what is stored, and that it is what attention reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from outrider.errors import OptionError
from outrider.models import KVCache, LayerShape, load_model, quantization, wrap
from outrider.models.attention import Forward, attend
from outrider.models.quantization import FP8, CacheScales, check_kv_dtype, dequantize, probe, scale_of

SHAPE = LayerShape(query_heads=4, kv_heads=2, head_dim=16, scale=0.25, window=None)
SCALES = CacheScales(keys=(torch.tensor([0.5, 2.0]),), values=(torch.tensor([0.25, 1.0]),))


def new_cache(batch=2, capacity=40):
    return KVCache((SHAPE,), batch, capacity, dtype=FP8, scales=SCALES)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(cache, layer=0, stop=None):
    """Keys and values as they are read back, [B, S, Hkv, D] float64."""
    return [
        rows(layer, stop).double() * scales[layer][:, None]
        for rows, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
    ]


def codes(cache, layer=0):
    """The bytes of keys and values."""
    return torch.stack([rows(layer).contiguous().view(torch.uint8) for rows in (cache.keys, cache.values)])


# Factors


def test_the_probe_is_spread_over_the_vocabulary_and_always_the_same():
    tokens = probe(8192, 32768)
    assert tokens.shape == (1, 512) and tokens.unique().numel() == 512
    assert (int(tokens.min()), int(tokens.max())) == (0, 8191)
    assert tokens[0].sort().values.diff().unique().numel() <= 2, "evenly"
    assert tokens[0].diff().lt(0).any(), "in no order"
    assert torch.equal(tokens, probe(8192, 32768))
    assert probe(97, 20).shape == (1, 20) and int(probe(97, 512).max()) == 96


def test_factors_are_the_next_powers_of_two():
    rows = torch.zeros(1, 3, 4, 2)
    rows[0, 1, :, 0] = torch.tensor([112.0, -112.001, 1e-4, 0.0])  # 112 * 4 / 448 is 1
    wanted = [1.0, 2.0, 2.0**-20, 1.0]
    assert scale_of(rows).tolist() == wanted
    assert scale_of(rows.bfloat16()).dtype == torch.float32


def test_factors_of_a_model_hold_its_probe_four_times(family, make_model):
    model = make_model(family)
    small = model.with_kv_dtype("fp8").new_cache(1, 4)
    tokens = probe(model.spec.vocabulary, model.spec.context)
    plain = model.new_cache(1, tokens.shape[1])
    model.forward(tokens, plain, logits=False)
    for layer, shape in enumerate(model.spec.layers):
        for rows, scale in (
            (plain.keys(layer), small.key_scales[layer]),
            (plain.values(layer), small.value_scales[layer]),
        ):
            assert scale.shape == (shape.kv_heads,) and scale.dtype == torch.float32
            assert torch.frexp(scale).mantissa.eq(0.5).all(), "powers of two"
            largest = rows.abs().amax((0, 1, 3)) / scale
            assert largest.le(448 / 4).all(), "no clamping before the margin is used up"
            assert largest.gt(448 / 8).all(), "and no range lost"


def test_factors_do_not_depend_on_what_was_read_before(make_module, random_prompts):
    fresh, used = (wrap(make_module("llama"), None, name="tiny").with_kv_dtype("fp8") for _ in range(2))
    [prompt] = random_prompts([30])
    used.with_kv_dtype("auto").forward(torch.tensor([prompt]), used.with_kv_dtype("auto").new_cache(1, 30))
    for ours, theirs in zip(used.new_cache(1, 1).key_scales, fresh.new_cache(1, 1).key_scales, strict=True):
        assert torch.equal(ours, theirs)


def test_factors_are_measured_once_for_all_copies(make_module, monkeypatch):
    model = wrap(make_module("llama"), None, name="tiny")
    calls = []
    monkeypatch.setattr("outrider.models.language_model.probe", lambda *arguments: calls.append(arguments) or probe(*arguments))
    model.new_cache(1, 1)
    assert not calls
    for copy in (model.with_kv_dtype("fp8"), model.with_kv_dtype("fp8").with_backend("reference")):
        copy.new_cache(1, 1)
    assert len(calls) == 1


# What is stored


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_come_back_to_a_sixteenth(dtype):
    cache = new_cache()
    keys, values = (random(2, 7, 2, 16, seed=seed).to(dtype) for seed in (1, 2))
    cache.append(0, keys, values)
    for found, given, scales in zip(stored(cache, stop=7), (keys, values), (SCALES.keys, SCALES.values), strict=True):
        error = (found - given.double()).abs()
        least = 2.0**-10 * scales[0][:, None].double()  # half the distance of the smallest numbers, 2^-9
        assert (error <= (given.double().abs() * 2.0**-4).maximum(least.expand_as(error))).all()
        assert error.max() > 0


def test_what_exceeds_the_range_is_clamped():
    cache = new_cache()
    rows = torch.full((2, 1, 2, 16), 1e6)
    cache.append(0, rows, -rows)
    keys, values = stored(cache, stop=1)
    assert keys[0, 0, :, 0].tolist() == [448 * 0.5, 448 * 2.0]
    assert values[0, 0, :, 0].tolist() == [-448 * 0.25, -448 * 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reading_back_is_exact_in_every_dtype(dtype):
    """e4m3 numbers times a power of two fit into 16 bits, so a prefill reads what rounds read in float32."""
    cache = new_cache()
    cache.append(0, random(2, 9, 2, 16), random(2, 9, 2, 16, seed=1))
    found = dequantize(cache.keys(0, 9), SCALES.keys[0], dtype)
    assert found.dtype == dtype
    assert torch.equal(found.double(), stored(cache, stop=9)[0])
    rows = random(1, 1, 2, 16)
    assert dequantize(rows, None, dtype) is rows


def test_a_cache_of_8_bits_moves_and_truncates_like_any_other():
    cache = new_cache()
    cache.append(0, random(2, 6, 2, 16), random(2, 6, 2, 16, seed=1))
    cache.advance(torch.tensor([6, 4]))
    before = codes(cache)
    cache.append(0, random(2, 5, 2, 16, seed=2), random(2, 5, 2, 16, seed=3))
    cache.advance(5)
    cache.truncate(torch.tensor([6, 4]))
    for b, n in enumerate([6, 4]):
        assert torch.equal(codes(cache)[:, b, :n], before[:, b, :n]), "append then truncate changes nothing"
    part = cache.rows(1, 2)
    assert part.key_scales is cache.key_scales and part.value_scales is cache.value_scales
    cache.move(1, 0)
    assert cache.lengths.tolist() == [4, 0]
    assert torch.equal(codes(cache)[:, 0, :4], before[:, 1, :4])
    assert codes(new_cache()).eq(0).all(), "masked rows must hold finite numbers"


# What attention reads


def oracle(query, keys, values, lengths, scale, window):
    """Causal attention in float64, one query at a time: query [B, T, Hq, D] over rows [B, N, Hkv, D]."""
    result = torch.empty_like(query, dtype=torch.float64)
    group = query.shape[2] // keys.shape[2]
    for b, length in enumerate(lengths):
        for t in range(query.shape[1]):
            end = length + t + 1
            start = 0 if window is None else max(0, end - window)
            for h in range(query.shape[2]):
                rows = keys[b, start:end, h // group], values[b, start:end, h // group]
                weights = (rows[0] @ query[b, t, h].double() * scale).softmax(-1)
                result[b, t, h] = weights @ rows[1]
    return result


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("t", [4, 20], ids=["round", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_reads_what_is_stored(t, window, dtype):
    cache = new_cache()
    cache.append(0, random(2, 13, 2, 16).to(dtype), random(2, 13, 2, 16, seed=1).to(dtype))
    cache.advance(torch.tensor([13, 6]))
    query = random(2, 4, t, 16, seed=2).to(dtype)  # as transformers passes it, [B, H, T, D]
    key, value = (random(2, 2, t, 16, seed=seed).to(dtype) for seed in (3, 4))
    forward = Forward(cache=cache, stop=13 + t)
    found, _ = attend(SimpleNamespace(layer_idx=0), query, key, value, scaling=0.25, sliding_window=window, outrider=forward)
    wanted = oracle(query.transpose(1, 2), *stored(cache), [13, 6], 0.25, window)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


SCHEDULES = {"odd chunks": [17, 19, 1, 8], "rounds": [25, *[4] * 5], "one by one": [5, *[1] * 40]}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_chunks_change_nothing(family, schedule, make_model, random_prompts):
    """Only rounding in float32 differs, which may tip a number in the cache over to its neighbour now and then."""
    model = make_model(family).with_kv_dtype("fp8")
    tokens = torch.tensor(random_prompts([45, 45]))
    caches = [model.new_cache(2, 48) for _ in range(2)]
    whole = model.forward(tokens, caches[0]).logits
    caches[0].advance(45)
    parts = []
    for part in tokens.split(schedule, dim=1):
        parts.append(model.forward(part, caches[1]).logits)
        caches[1].advance(part.shape[1])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
    for layer in range(len(model.spec.layers)):
        assert codes(caches[0], layer).ne(codes(caches[1], layer)).float().mean() < 1e-3


def test_ragged_rows_equal_each_alone(family, make_model, random_prompts):
    model = make_model(family).with_kv_dtype("fp8")
    prompts, following = random_prompts([31, 4, 18]), torch.tensor(random_prompts([5, 5, 5], seed=4))
    cache = model.new_cache(3, 40)
    wanted = []
    for row, prompt in enumerate(prompts):
        own = model.new_cache(1, 40)
        for one in (own, cache.rows(row, row + 1)):
            model.forward(torch.tensor([prompt]), one)
            one.advance(len(prompt))
        wanted.append(model.forward(following[row : row + 1], own).logits)
    torch.testing.assert_close(model.forward(following, cache).logits, torch.cat(wanted), rtol=1e-4, atol=1e-4)


# Who gets one


def test_a_model_says_how_its_caches_store(make_model):
    model = make_model("llama", dtype="bfloat16")
    assert (model.spec.kv_dtype, model.spec.cache_dtype, model.new_cache(1, 2).key_scales) == (
        "auto",
        torch.bfloat16,
        (None,) * 3,
    )
    narrow = model.with_kv_dtype("fp8")
    assert (narrow.spec.cache_dtype, narrow.new_cache(1, 2).keys(0).dtype, narrow.spec.dtype) == (FP8, FP8, torch.bfloat16)
    assert narrow.with_kv_dtype("auto").new_cache(1, 2).keys(0).dtype == torch.bfloat16
    assert model.with_kv_dtype("auto") is model


def test_an_unknown_storage_is_refused_before_a_checkpoint_is_read():
    with pytest.raises(OptionError, match="kv-dtype: got 'int8'; allowed: auto, fp8"):
        load_model("no checkpoint is looked for", kv_dtype="int8")


@pytest.mark.parametrize(
    "capability, refused", [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False), ((12, 0), False)]
)
def test_old_gpus_refuse(capability, refused, monkeypatch):
    monkeypatch.setattr(quantization, "compute_capability", lambda device: capability)
    device = torch.device("cuda")
    check_kv_dtype("auto", device, torch.bfloat16)
    if not refused:
        check_kv_dtype("fp8", device, torch.bfloat16)
        return
    found = ".".join(map(str, capability))
    said = rf"kv-dtype: got 'fp8'; allowed: auto on this device \(compute capability {found}; fp8 needs 8\.9\)"
    with pytest.raises(OptionError, match=said):
        check_kv_dtype("fp8", device, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_over_8_bits_take_16_bit_models(dtype, monkeypatch):
    monkeypatch.setattr(quantization, "compute_capability", lambda device: (9, 0))
    check_kv_dtype("fp8", torch.device("cpu"), dtype)
    with pytest.raises(OptionError, match=r"kv-dtype: got 'fp8'; allowed: auto with dtype float.. on a GPU"):
        check_kv_dtype("fp8", torch.device("cuda"), dtype)
