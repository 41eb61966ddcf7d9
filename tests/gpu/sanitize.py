"""A small call of every kernel, to be run under compute-sanitizer: make sanitize-gpu.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from outrider.ops import (
    attention_mass,
    block_mass,
    chunk_attention,
    fused_linear,
    kv_append,
    quantize_keys,
    quantized_mass,
    rotary_append,
    span_mass,
    sparse_attention,
    token_select,
    unlisted_mass,
)
from outrider.ops.quantized_keys import record_words

FP8 = torch.float8_e4m3fn


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def attention_masses(backend: str) -> Iterator[Tensor]:
    """Ragged, and with pages."""
    queries, keys, lengths = random(3, 5, 8, 64), random(3, 1600, 2, 64), torch.tensor([1501, 0, 33], device="cuda")
    yield attention_mass(queries, keys, lengths, scale=0.125, backend=backend)
    pages = torch.arange(300, dtype=torch.int32, device="cuda").view(3, 100)
    yield attention_mass(queries, keys.reshape(300, 16, 2, 64), lengths, scale=0.125, page_table=pages, backend=backend)


def block_masses(backend: str) -> Iterator[Tensor]:
    """Ragged sequences, blocks and tiles; then of some heads, whose denominators are known."""
    queries, keys, lengths = random(3, 300, 8, 64), random(3, 1600, 2, 64), torch.tensor([1300, 0, 33], device="cuda")
    yield block_mass(queries, keys, lengths, block=128, scale=0.125, backend=backend)
    heads, known = torch.tensor([1, 4, 6], device="cuda"), random(3, 8, 300, dtype=torch.float32).add(8)
    out = torch.empty(3, 3, 4, 1601, dtype=torch.bfloat16, device="cuda")[:, :, 1:, :1600]
    yield block_mass(
        queries, keys, lengths, block=100, scale=0.125, heads=heads, logsumexp=known, dtype=out.dtype, out=out, backend=backend
    )


def span_masses(backend: str) -> Iterator[Tensor]:
    """What a draft's blocks may look at, and their masses on a half of it."""
    queries, keys, lengths = random(3, 300, 8, 64), random(3, 1600, 2, 64), torch.tensor([1300, 0, 33], device="cuda")
    for span in (16, 128, 4096):
        yield span_mass(queries, keys, lengths, block=128, span=span, scale=0.125, backend=backend)
    listed, known = random(3, 3, 2, 13) > 0, random(3, 8, 300, dtype=torch.float32).add(8)
    yield block_mass(queries, keys, lengths, block=128, scale=0.125, logsumexp=known, listed=listed, backend=backend)


def selections(backend: str) -> Iterator[Tensor]:
    """One row and merged rows, top-k and top-p; few lists of a long row are shared by several blocks."""
    lengths = torch.tensor([9001, 77], device="cuda")
    alone, merged = torch.arange(4, device="cuda").view(1, 4, 1), torch.randint(4, (1, 4, 3), device="cuda")
    for sources, S in ((alone, 9008), (merged, 9008), (alone[:, :1], 50_000)):
        scores = random(2, 4, S, dtype=torch.float32).exp().to(torch.bfloat16)
        for budget in ({"top_k": 900}, {"top_p": 0.5}):
            lists = token_select(scores, lengths, sources, sinks=4, recent=20, width=5000, backend=backend, **budget)
            yield lists.counts
            if backend == "triton":
                yield unlisted_mass(scores, lengths, sources, lists.indices, lists.counts, backend=backend)
        shares = torch.tensor([[[900, 33, 2, 0], [20, 77, 1, 5]]], device="cuda")[..., : sources.shape[1]]
        yield token_select(scores, lengths, sources, top_k=shares, width=5000, backend=backend).counts


def attentions(backend: str) -> Iterator[Tensor]:
    """Lists per KV head, ragged, one empty, and with a value for the rest; then without lists, with pages and a window."""
    queries, caches = random(2, 5, 8, 128), random(2, 2, 1200, 2, 128)
    indices = torch.rand(2, 2, 1100, device="cuda").topk(300).indices.sort().values.int()
    counts = torch.tensor([[300, 0], [17, 299]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([1100, 1190], device="cuda")
    lists = queries, caches[0], caches[1], indices, counts, lengths
    yield sparse_attention(*lists, scale=0.1, backend=backend)
    rest = {"unlisted_values": random(2, 128, dtype=torch.float32), "unlisted_shares": torch.rand(2, 8, device="cuda")}
    yield sparse_attention(*lists, scale=0.1, backend=backend, **rest)
    yield sparse_attention(queries, caches[0], caches[1], None, None, lengths, scale=0.1, backend=backend)
    pages = torch.arange(150, dtype=torch.int32, device="cuda").view(2, 75)
    keys, values = caches.view(2, 150, 16, 2, 128)
    yield sparse_attention(queries, keys, values, None, None, lengths, scale=0.1, page_table=pages, window=100, backend=backend)


def chunks(backend: str) -> Iterator[Tensor]:
    """A ragged last block; lists of a few tiles, one empty, and of one head for all; then without lists, and with a window."""
    for D, B in ((128, 2), (64, 1)):
        queries, caches = random(B, 300, 8, D), random(2, B, 1500, 2, D)
        lengths = torch.tensor([1100, 1190], device="cuda")[:B]
        indices = torch.rand(B, 3, 2, 1100, device="cuda").topk(500).indices.sort().values.int()
        counts = torch.tensor([[500, 0], [17, 499], [256, 129]], dtype=torch.int32, device="cuda").repeat(B, 1, 1)
        shared = {"block": 128, "scale": 0.1, "backend": backend}
        logsumexp = torch.empty(B, 8, 300, device="cuda")
        yield chunk_attention(queries, *caches, indices, counts, lengths, logsumexp=logsumexp, **shared)
        yield logsumexp
        yield chunk_attention(queries, *caches, indices[:, :, :1], counts[:, :, 1:], lengths, **shared)
        yield chunk_attention(queries, *caches, None, None, lengths, **shared)
        if backend == "triton":
            yield chunk_attention(queries, *caches, None, None, lengths, window=200, **shared)


def appended(backend: str) -> Iterator[Tensor]:
    """Into caches of 16 and of 8 bits, by whichever op the backend has for it."""
    projected, lengths, scale = random(2, 3, 12, 64), torch.tensor([5, 0], device="cuda"), torch.ones(2, device="cuda")
    angles = random(2, 3, 64)
    for dtype in (torch.bfloat16, FP8):
        caches = [torch.zeros(2, 9, 2, 64, device="cuda").to(dtype) for _ in range(2)]
        scales = {"key_scale": scale, "value_scale": scale} if dtype == FP8 else {}
        if backend == "triton":
            kv_append(*projected.split([8, 2, 2], 2)[1:], *caches, lengths, **scales, backend=backend)
        else:
            yield rotary_append(projected, angles, angles, *caches, lengths, query_norm=angles[0, 0], **scales, backend=backend)
        yield from (cache.float() for cache in caches)


def products(backend: str) -> Iterator[Tensor]:
    """The last group of columns and the last tile of rows cut short; then SwiGLU behind a norm, several tiles a block."""
    x, weight = random(5, 4120), random(70, 4120)
    yield fused_linear(x, weight, residual=random(5, 70), backend=backend)
    yield fused_linear(x[:, :520], random(12_000, 520), norm=x[0, :520].contiguous(), swiglu=True, backend=backend)


def coded_keys(backend: str) -> Iterator[Tensor]:
    """Records just large enough, then masses from them: ragged, one sequence without codes; few units, and many."""
    for bits, D, dtype, N, reduce in ((4, 64, torch.bfloat16, 1600, "mean"), (2, 128, FP8, 20_000, "none")):
        queries, keys = [random(3, 5, 8, D), random(3, 5, 8, D)], [random(3, N, 2, D).to(dtype), random(3, N, 2, D).to(dtype)]
        lengths = torch.tensor([N - 5, 127, N // 2], device="cuda")
        factors = [torch.ones(2, device="cuda") if dtype == FP8 else None] * 2
        shared = {"bits": bits, "key_scales": factors, "backend": backend}
        records = torch.zeros(2, 3, 2, N // 64 - 1, record_words(D, bits), dtype=torch.int32, device="cuda")
        quantize_keys(keys, lengths, records, **shared)
        quantize_keys(keys, lengths, records, last=True, **shared)
        yield quantized_mass(queries, keys, records, lengths, scales=[0.1, 0.1], reduce=reduce, **shared)


BACKENDS = {
    "triton": (attention_masses, block_masses, span_masses, selections, attentions, chunks, appended),
    "cuda": (attention_masses, selections, attentions, chunks, appended, products, coded_keys),
}

if __name__ == "__main__":
    for backend, ops in BACKENDS.items():
        for op in ops:
            for result in op(backend):
                assert result.isfinite().all()
            torch.cuda.synchronize()
            print(op.__name__, backend, "ok", flush=True)
