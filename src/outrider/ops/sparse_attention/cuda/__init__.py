"""Sparse attention in CUDA C++ for Hopper: arguments for `kernel.cu`, which says how it works."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from outrider.ops import compiler

SOURCE = Path(__file__).with_name("kernel.cu")
ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
HEAD_DIMS = (64, 128)
ROW_TILES = (1, 2, 3, 4)  # of 8 query rows each
EVERYTHING = 2**31 - 1  # a window that no sequence outgrows
VARIANTS = [  # compiled by the tests
    ("ELEMENT=__nv_bfloat16", "HEAD_DIM=128", "ROW_TILES=3"),
    ("ELEMENT=__half", "HEAD_DIM=64", "ROW_TILES=4"),
    ("ELEMENT=__nv_bfloat16", "HEAD_DIM=128", "ROW_TILES=3", "DENSE=1"),
    ("ELEMENT=__half", "HEAD_DIM=64", "ROW_TILES=1", "DENSE=1"),
]


class Arguments(ctypes.Structure):
    """Mirrors `struct Arguments` of kernel.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "queries", "keys", "values", "indices", "counts", "lengths", "page_table", "unlisted_values",
                "unlisted_shares", "output", "logsumexp", "mailboxes",
            )
        ]
        + [(name, ctypes.c_longlong * 3) for name in ("query_stride", "stride", "logsumexp_stride")]
        + [
            (name, ctypes.c_int)
            for name in (
                "wide_lengths", "B", "T", "heads", "lists", "group", "owners_per_kv", "rows_per_problem", "width", "page_size",
                "pages_per_sequence", "window",
            )
        ]
        + [("scale", ctypes.c_float)]
    )  # fmt: skip


def obstacle(queries: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why this kernel cannot run these arguments, or None."""
    D = queries.shape[3]
    if queries.dtype not in ELEMENTS or keys.dtype != queries.dtype:
        return f"it takes bfloat16 or float16 queries and caches, got {queries.dtype} and {keys.dtype}"
    if D not in HEAD_DIMS:
        return f"it takes a head dim of {', '.join(map(str, HEAD_DIMS))}, got {D}"
    for name, x in (("queries", queries), ("keys", keys), ("values", values)):
        if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:-1]) or x.stride(-1) != 1:
            return f"it needs rows that start at multiples of 16 bytes, which {name} with strides {x.stride()} do not"
    if keys.stride() != values.stride():
        return f"it needs keys and values of the same strides, got {keys.stride()} and {values.stride()}"
    return compiler.obstacle(queries.device)


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    *,
    scale: float,
    key_scale: None,
    value_scale: None,
    page_table: Tensor | None,
    window: int | None = None,
    unlisted_values: Tensor | None = None,
    unlisted_shares: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    lists, width = 1 if counts is None else counts.shape[1], 0 if indices is None else indices.shape[2]
    heads = max(lists, Hkv)
    indices, counts, unlisted_values, unlisted_shares = (
        None if x is None else x.contiguous() for x in (indices, counts, unlisted_values, unlisted_shares)
    )
    lengths = lengths.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    output = torch.empty(B, T, Hq, D, dtype=queries.dtype, device=queries.device)
    rows = T * (Hq // heads)
    row_blocks = -(-rows // (8 * ROW_TILES[-1]))
    rows_per_problem = -(-rows // row_blocks)
    tiles = -(-rows_per_problem // 8)
    problems = B * heads * row_blocks
    blocks = compiler.multiprocessors(queries.device)
    virtual_blocks = blocks if problems <= blocks else 4 * blocks * -(-problems // (4 * blocks))
    defines = [f"ELEMENT={ELEMENTS[queries.dtype]}", f"HEAD_DIM={D}", f"ROW_TILES={tiles}"]
    library = compiler.build(SOURCE, *defines, *(["DENSE=1"] if indices is None else []))
    stream = ctypes.c_void_p(torch.cuda.current_stream(queries.device).cuda_stream)
    mailboxes = compiler.mailboxes(queries.device).take(
        virtual_blocks * library.mailbox_floats(), stream.value or 0, library.capture(stream)
    )
    arguments = Arguments(
        queries=queries.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        indices=None if indices is None else indices.data_ptr(),
        counts=None if counts is None else counts.data_ptr(),
        lengths=lengths.data_ptr(),
        page_table=None if page_table is None else page_table.data_ptr(),
        unlisted_values=None if unlisted_values is None else unlisted_values.data_ptr(),
        unlisted_shares=None if unlisted_shares is None else unlisted_shares.data_ptr(),
        output=output.data_ptr(),
        logsumexp=None if logsumexp is None else logsumexp.data_ptr(),
        mailboxes=mailboxes.data_ptr(),
        query_stride=queries.stride()[:3],
        stride=keys.stride()[:3],
        logsumexp_stride=(0, 0, 0) if logsumexp is None else logsumexp.stride(),
        wide_lengths=lengths.dtype == torch.int64,
        B=B,
        T=T,
        heads=heads,
        lists=lists,
        group=Hq // heads,
        owners_per_kv=heads // Hkv,
        rows_per_problem=rows_per_problem,
        width=width,
        page_size=keys.shape[1],
        pages_per_sequence=0 if page_table is None else page_table.shape[1],
        window=EVERYTHING if window is None else min(window, EVERYTHING),
        scale=scale * 1.4426950408889634,  # log2(e): the kernel works in powers of two
    )
    with torch.cuda.device(queries.device):
        error = library.launch(ctypes.byref(arguments), problems, blocks, virtual_blocks, stream)
    compiler.check(library, error, "sparse_attention")
    return output
