"""Attention mass in CUDA C++ for Hopper: arguments for `kernel.cu`, which says how it works."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.ops import compiler

SOURCE = Path(__file__).with_name("kernel.cu")
HEAD_DIMS = (64, 128)
MAX_ROWS = 32  # queries per KV head and sequence
MAX_SEQUENCES = 256
VARIANTS = [  # compiled by the tests
    ("HEAD_DIM=64", "QUERIES=5", "GROUP=4"),
    ("HEAD_DIM=128", "QUERIES=5", "GROUP=3", "PAGED=1"),
    ("HEAD_DIM=64", "QUERIES=1", "GROUP=1", "REDUCE_MAX=1"),
]


class Arguments(ctypes.Structure):
    """Mirrors `struct Arguments` of kernel.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in ("queries", "keys", "lengths", "page_table", "masses", "mailboxes", "readers")
        ]
        + [(name, ctypes.c_longlong * 3) for name in ("query_stride", "stride")]
        + [("stride_out", ctypes.c_longlong * 2)]
        + [
            (name, ctypes.c_int)
            for name in ("wide_lengths", "B", "heads", "N", "page_size", "pages_per_sequence", "wide_masses")
        ]
        + [("scale", ctypes.c_float)]
    )  # fmt: skip


def obstacle(
    queries: Tensor,
    keys: Tensor,
    *,
    reduce: str,
    heads: Tensor | None,
    page_table: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
    **_: Any,
) -> str | None:
    """Why this kernel cannot run these arguments, or None."""
    B, T, Hq, D = queries.shape
    rows = T * (Hq // keys.shape[2])
    if queries.dtype != torch.bfloat16 or keys.dtype != torch.bfloat16:
        return f"it takes bfloat16 queries and keys, got {queries.dtype} and {keys.dtype}"
    if D not in HEAD_DIMS:
        return f"it takes a head dim of {' or '.join(map(str, HEAD_DIMS))}, got {D}"
    if rows > MAX_ROWS:
        return f"it takes at most {MAX_ROWS} queries per KV head and sequence, got {rows}"
    if reduce == "none" or heads is not None or dtype == torch.float64:
        return f"it takes the mean or maximum per head, got reduce={reduce!r}{', heads' if heads is not None else ''}, {dtype}"
    if B > MAX_SEQUENCES:
        return f"it takes at most {MAX_SEQUENCES} sequences, got {B}"
    for name, x in (("queries", queries), ("keys", keys)):
        if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:-1]) or x.stride(-1) != 1:
            return f"it needs rows that start at multiples of 16 bytes, which {name} with strides {x.stride()} do not"
    if out is not None and (out.data_ptr() % (2 * out.element_size()) or any(stride % 2 for stride in out.stride()[:-1])):
        return (
            f"it writes two masses at a time, for which rows of out with strides {out.stride()} do not all start at even places"
        )
    if reason := compiler.obstacle(queries.device):
        return reason
    longest = compiler.multiprocessors(queries.device) * _max_chunk(D, rows)
    if _tokens(keys, page_table) > longest:
        return f"its exponentials of {rows} queries fit the chip for at most {longest} tokens, got {_tokens(keys, page_table)}"
    return None


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    reduce: str,
    heads: None,
    key_scale: None,
    page_table: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    N = _tokens(keys, page_table)
    device = queries.device
    lengths = lengths.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    blocks = compiler.multiprocessors(device)
    group = Hq // Hkv
    rows = -(-T * group // 8) * 8  # padded
    options = ["PAGED=1"] * (page_table is not None) + ["REDUCE_MAX=1"] * (reduce == "max")
    library = compiler.build(SOURCE, f"HEAD_DIM={D}", f"QUERIES={T}", f"GROUP={group}", *options)
    if out is None:  # rows start at multiples of 128 bytes
        out = torch.empty(B, Hq, -(-N // 64) * 64, dtype=dtype, device=device)[..., :N]
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    problems, words = B * Hkv, blocks * rows * 2  # a mailbox holds two floats
    mailboxes = compiler.mailboxes(device).take(problems * (words + 1), stream.value or 0, library.capture(stream))
    arguments = Arguments(
        queries=queries.data_ptr(),
        keys=keys.data_ptr(),
        lengths=lengths.data_ptr(),
        page_table=None if page_table is None else page_table.data_ptr(),
        masses=out.data_ptr(),
        mailboxes=mailboxes.data_ptr(),
        readers=mailboxes[problems * words :].data_ptr(),
        query_stride=queries.stride()[:3],
        stride=keys.stride()[:3],
        stride_out=out.stride()[:2],
        wide_lengths=lengths.dtype == torch.int64,
        B=B,
        heads=Hkv,
        N=N,
        page_size=keys.shape[1],
        pages_per_sequence=0 if page_table is None else page_table.shape[1],
        wide_masses=dtype == torch.float32,
        scale=scale * 1.4426950408889634,  # log2(e): the kernel works in powers of two
    )
    with torch.cuda.device(device):
        error = library.launch(ctypes.byref(arguments), blocks, stream)
    compiler.check(library, error, "attention_mass")
    return out


def _tokens(keys: Tensor, page_table: Tensor | None) -> int:
    """Slots of a sequence's cache."""
    return keys.shape[1] if page_table is None else page_table.shape[1] * keys.shape[1]


def _max_chunk(head_dim: int, rows: int) -> int:
    """Keys whose exponentials a block holds: `MAX_CHUNK` of kernel.cu."""
    queues = 8 * (3 if head_dim == 64 else 2) * 32 * 2 * head_dim  # bytes: scoring warps, tiles in a queue, keys of a tile
    segment = rows * (512 // 2 + 4) * 4  # bytes, of 512 keys
    return (206 * 1024 - queues) // segment * 512
