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
STAGES = (4, 3, 2)  # depth of the queues, best first
MAX_SEQUENCES = 1024
MIN_CHUNK, TILE = 256, 16  # keys
SHARED_BYTES = 227 * 1024 - 16 * 1024  # for queues and buffers, besides what the kernel declares itself
VARIANTS = [  # compiled by the tests
    ("HEAD_DIM=64", "QUERIES=5", "GROUP=4", "STAGES=4"),
    ("HEAD_DIM=128", "QUERIES=5", "GROUP=3", "STAGES=3", "SPILL"),
]


class Arguments(ctypes.Structure):
    """Mirrors `struct Arguments` of kernel.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in ("queries", "keys", "lengths", "page_table", "masses", "mailboxes", "readers", "spilled")
        ]
        + [(name, ctypes.c_longlong * 3) for name in ("query_stride", "stride")]
        + [("stride_out", ctypes.c_longlong)]
        + [
            (name, ctypes.c_int)
            for name in (
                "wide_lengths", "B", "heads", "N", "page_size", "pages_per_sequence", "chunk", "wide_masses",
                "take_max",
            )
        ]
        + [("scale", ctypes.c_float)]
    )  # fmt: skip


def obstacle(queries: Tensor, keys: Tensor, *, reduce: str, heads: Tensor | None, dtype: torch.dtype, **_: Any) -> str | None:
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
    return compiler.obstacle(queries.device)


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
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    N = keys.shape[1] if page_table is None else page_table.shape[1] * keys.shape[1]
    device = queries.device
    lengths = lengths.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    blocks = compiler.multiprocessors(device)
    chunk = max(-(-N // (blocks * TILE)) * TILE, MIN_CHUNK)
    group = Hq // Hkv
    rows = -(-T * group // 8) * 8  # padded
    library = _library(D, T, group, chunk)
    spills = library.shared_bytes(chunk) == library.shared_bytes(0)
    masses = torch.empty(B, Hq, -(-N // 64) * 64, dtype=dtype, device=device)  # rows start at multiples of 128 bytes
    spilled = torch.empty(blocks * library.spilled_words(chunk), dtype=torch.int32, device=device) if spills else None
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    problems, words = B * Hkv, blocks * rows * 2  # a mailbox holds two floats
    mailboxes = compiler.mailboxes(device).take(problems * (words + 1), stream.value or 0, library.capture(stream))
    arguments = Arguments(
        queries=queries.data_ptr(),
        keys=keys.data_ptr(),
        lengths=lengths.data_ptr(),
        page_table=None if page_table is None else page_table.data_ptr(),
        masses=masses.data_ptr(),
        mailboxes=mailboxes.data_ptr(),
        readers=mailboxes[problems * words :].data_ptr(),
        spilled=None if spilled is None else spilled.data_ptr(),
        query_stride=queries.stride()[:3],
        stride=keys.stride()[:3],
        stride_out=masses.stride(1),
        wide_lengths=lengths.dtype == torch.int64,
        B=B,
        heads=Hkv,
        N=N,
        page_size=keys.shape[1],
        pages_per_sequence=0 if page_table is None else page_table.shape[1],
        chunk=chunk,
        wide_masses=dtype == torch.float32,
        take_max=reduce == "max",
        scale=scale * 1.4426950408889634,  # log2(e): the kernel works in powers of two
    )
    with torch.cuda.device(device):
        error = library.launch(ctypes.byref(arguments), blocks, stream)
    compiler.check(library, error, "attention_mass")
    return masses[..., :N]


def _library(head_dim: int, queries: int, group: int, chunk: int) -> ctypes.CDLL:
    """The build whose buffers hold chunks of so many keys in shared memory, or else one with buffers in global memory."""
    shape = (f"HEAD_DIM={head_dim}", f"QUERIES={queries}", f"GROUP={group}")
    rows = -(-queries * group // 8) * 8
    buffers = 8 * (rows * ((chunk // 2 + 27) // 32 * 32 + 4) + chunk // TILE * rows)  # bytes of both, as in kernel.cu
    for stages in STAGES:
        if 10 * stages * 32 * head_dim + buffers <= SHARED_BYTES:  # ten scoring warps, tiles of 16 keys
            return compiler.build(SOURCE, *shape, f"STAGES={stages}")
    return compiler.build(SOURCE, *shape, f"STAGES={STAGES[0] if head_dim == 64 else STAGES[1]}", "SPILL")
