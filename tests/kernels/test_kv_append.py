"""Appended rows are where they belong, and nothing else has changed; on a GPU in a captured graph, too."""

from __future__ import annotations

import pytest
import torch

from outrider.ops import kv_append

FP8 = torch.float8_e4m3fn


def make(device, dtype, cache_dtype, B, T, N, H, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(B, H, T, D, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(2))
    caches = [torch.randn(B, H, N, D, generator=generator).to(device, cache_dtype).transpose(1, 2) for _ in range(2)]
    return keys, values, caches


def expected(new, cache, lengths, scale):
    wanted = cache.clone()
    for b, length in enumerate(lengths.tolist()):
        rows = new[b].float() / (scale[:, None] if scale is not None else 1)
        wanted[b, length : length + new.shape[1]] = (rows.clamp(-448, 448) if cache.dtype == FP8 else rows).to(cache.dtype)
    return wanted


@pytest.mark.parametrize("cache_dtype", [None, FP8], ids=["same", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 1, 8), (3, 5, 2, 96), (2, 16, 4, 64)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_are_written_and_nothing_else(backend, B, T, H, D, dtype, cache_dtype, device):
    if (backend, cache_dtype) == ("triton", FP8) and device.type == "cpu":
        pytest.skip("Triton's interpreter rounds to float8 wrongly where the exponent grows")
    keys, values, caches = make(device, dtype, cache_dtype or dtype, B, T, 40, H, D)
    lengths = torch.tensor([0, 24, 7][:B], device=device)
    scales = [torch.full((H,), x, device=device) if cache_dtype == FP8 else None for x in (0.5, 0.001)]  # the second overflows
    wanted = [expected(*x) for x in zip((keys, values), caches, (lengths, lengths), scales, strict=True)]
    kv_append(keys, values, *caches, lengths, key_scale=scales[0], value_scale=scales[1], backend=backend)
    for cache, rows in zip(caches, wanted, strict=True):
        if cache_dtype is None:
            assert torch.equal(cache, rows)
        else:  # next to each other: a quotient between two may go either way
            assert (cache.float() == rows.float()).float().mean() > 0.97
            torch.testing.assert_close(cache.float(), rows.float(), rtol=0.15, atol=0.002)
    assert lengths.tolist() == [0, 24, 7][:B]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_append_follows_the_lengths():
    keys, values, caches = make("cuda", torch.bfloat16, torch.bfloat16, 2, 5, 100, 2, 64)
    lengths = torch.zeros(2, dtype=torch.int64, device="cuda")
    kv_append(keys, values, *caches, lengths)
    steps, graph = torch.tensor([5, 3], device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_append(keys, values, *caches, lengths)
        lengths.add_(steps)
    for _ in range(4):
        graph.replay()
    for b, step in enumerate((5, 3)):
        for i in range(4):
            assert torch.equal(caches[0][b, i * step : i * step + 3], keys[b, :3])
    assert lengths.tolist() == [20, 12]
