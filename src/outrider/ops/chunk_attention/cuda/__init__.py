"""Chunk attention in CUDA C++ for Hopper: arguments for `kernel.cu`, which says how it works."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from outrider.ops import compiler

SOURCE = Path(__file__).with_name("kernel.cu")
ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
WARPGROUPS = {64: 3, 128: 2}  # that attend, 64 rows each, by head dim
MAX_SPLITS = 32  # of a row tile: a lane each where they are merged
VARIANTS = [  # compiled by the tests
    (f"ELEMENT={element}", f"HEAD_DIM={D}", f"WARPGROUPS={warpgroups}")
    for element in ELEMENTS.values()
    for D, warpgroups in WARPGROUPS.items()
]


class Arguments(ctypes.Structure):
    """Mirrors `struct Arguments` of kernel.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "queries", "keys", "values", "indices", "counts", "lengths", "output", "logsumexp", "partial_outputs",
                "partial_logsumexp",
            )
        ]
        + [
            (name, ctypes.c_longlong * 3)
            for name in ("query_stride", "stride", "index_stride", "count_stride", "logsumexp_stride")
        ]
        + [
            (name, ctypes.c_int)
            for name in (
                "wide_lengths", "B", "T", "block", "group", "heads", "heads_per_kv", "row_tiles", "splits",
            )
        ]
        + [("scale", ctypes.c_float)]
    )  # fmt: skip


def obstacle(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> str | None:
    """Why this kernel cannot run these arguments, or None."""
    D = queries.shape[3]
    if queries.dtype not in ELEMENTS or keys.dtype != queries.dtype:
        return f"it takes bfloat16 or float16 queries and caches, got {queries.dtype} and {keys.dtype}"
    if D not in WARPGROUPS:
        return f"it takes a head dim of {', '.join(map(str, WARPGROUPS))}, got {D}"
    if scale <= 0:
        return f"it takes a scale above 0, got {scale}"
    if window is not None:
        return f"it takes no window, got {window}"
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:-1]) or x.stride(-1) != 1:
            return f"it needs rows that start at multiples of 16 bytes, which {name} with strides {x.stride()} do not"
    if keys.stride() != values.stride():
        return f"it needs keys and values of the same strides, got {keys.stride()} and {values.stride()}"
    return compiler.obstacle(queries.device)


def chunk_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    *,
    block: int,
    scale: float,
    key_scale: None,
    value_scale: None,
    window: None,
    logsumexp: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    heads = Hkv  # a list shared by all heads is walked once per KV head
    if indices is None or counts is None:
        block, blocks = T, 1
    else:
        heads, blocks = max(indices.shape[2], Hkv), indices.shape[1]
        block = min(block, T)
        indices = (indices if indices.stride(-1) == 1 else indices.contiguous()).expand(B, blocks, heads, -1)
        counts = counts.expand(B, blocks, heads)
    lengths = lengths.contiguous()
    output = torch.empty(B, T, Hq, D, dtype=queries.dtype, device=queries.device)
    group = Hq // heads
    row_tiles = -(-block * group // (64 * WARPGROUPS[D]))
    programs = row_tiles * heads * blocks  # of a sequence
    splits = max(1, min(MAX_SPLITS, compiler.multiprocessors(queries.device) // programs))
    partial = output.new_empty((splits, B, T, Hq, D + 1) if splits > 1 else 0, dtype=torch.float32)
    library = compiler.build(SOURCE, f"ELEMENT={ELEMENTS[queries.dtype]}", f"HEAD_DIM={D}", f"WARPGROUPS={WARPGROUPS[D]}")
    arguments = Arguments(
        queries=queries.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        indices=None if indices is None else indices.data_ptr(),
        counts=None if counts is None else counts.data_ptr(),
        lengths=lengths.data_ptr(),
        output=output.data_ptr(),
        logsumexp=None if logsumexp is None else logsumexp.data_ptr(),
        partial_outputs=partial.data_ptr(),
        partial_logsumexp=partial.data_ptr() + partial.numel() // (D + 1) * D * partial.element_size(),
        query_stride=queries.stride()[:3],
        stride=keys.stride()[:3],
        index_stride=(0, 0, 0) if indices is None else indices.stride()[:3],
        count_stride=(0, 0, 0) if counts is None else counts.stride(),
        logsumexp_stride=(0, 0, 0) if logsumexp is None else logsumexp.stride(),
        wide_lengths=lengths.dtype == torch.int64,
        B=B,
        T=T,
        block=block,
        group=group,
        heads=heads,
        heads_per_kv=heads // Hkv,
        row_tiles=row_tiles,
        splits=splits,
        scale=scale * 1.4426950408889634,  # log2(e): the kernel works in powers of two
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream(queries.device).cuda_stream)
    with torch.cuda.device(queries.device):
        error = library.launch(ctypes.byref(arguments), programs * B * splits, stream)
    compiler.check(library, error, "chunk_attention")
    return output
