"""Quantised keys in CUDA C++ for Hopper: arguments for `quantize.cu` and `mass.cu`, which say how they work."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from outrider.ops import compiler
from outrider.ops.quantized_keys.layout import BLOCK

QUANTIZE, MASS = (Path(__file__).with_name(name) for name in ("quantize.cu", "mass.cu"))
ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
HEAD_DIMS = (64, 128)
MAX_LAYERS = 64
MAX_COLUMNS = 64  # of a product: the queries of a KV head, spread over a warp
VARIANTS = [  # compiled by the tests
    ("HEAD_DIM=64", "BITS=4", "QUERIES=5", "GROUP=4"),
    ("HEAD_DIM=128", "BITS=2", "QUERIES=5", "GROUP=2", "FLOAT8=1"),
    ("HEAD_DIM=128", "BITS=4", "QUERIES=3", "GROUP=7", "ELEMENT=__half", "PER_QUERY=1", "WIDE=1"),
]


class Layer(ctypes.Structure):
    """Mirrors `struct Layer` of mass.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("queries", "keys", "key_scale")] + [("scale", ctypes.c_float)]


class MassArguments(ctypes.Structure):
    """Mirrors `struct Arguments` of mass.cu."""

    _fields_ = (
        [("layers", Layer * MAX_LAYERS)]
        + [(name, ctypes.c_void_p) for name in ("records", "lengths", "sums", "masses")]
        + [("query_stride", ctypes.c_longlong * 3), ("key_stride", ctypes.c_longlong * 3)]
        + [("record_stride", ctypes.c_longlong * 4), ("mass_stride", ctypes.c_longlong * 3)]
        + [(name, ctypes.c_int) for name in ("wide_lengths", "count", "B", "heads", "N")]
    )  # fmt: skip


class QuantizeArguments(ctypes.Structure):
    """Mirrors `struct Arguments` of quantize.cu."""

    _fields_ = (
        [(name, ctypes.c_void_p * MAX_LAYERS) for name in ("keys", "key_scales")]
        + [(name, ctypes.c_void_p) for name in ("lengths", "records")]
        + [("key_stride", ctypes.c_longlong * 3), ("record_stride", ctypes.c_longlong * 4)]
        + [(name, ctypes.c_int) for name in ("wide_lengths", "layers", "B", "heads", "blocks", "last")]
    )  # fmt: skip


def quantize_obstacle(keys: Sequence[Tensor], records: Tensor) -> str | None:
    """Why `quantize_keys` cannot run these arguments, or None."""
    cached, D = keys[0], keys[0].shape[3]
    if cached.dtype not in (*ELEMENTS, torch.float8_e4m3fn):
        return f"it takes keys in bfloat16, float16 or float8_e4m3fn, got {cached.dtype}"
    if D not in HEAD_DIMS:
        return f"it takes a head dim of {' or '.join(map(str, HEAD_DIMS))}, got {D}"
    if len(keys) > MAX_LAYERS:
        return f"it takes at most {MAX_LAYERS} layers, got {len(keys)}"
    for name, x in (*((f"keys[{i}]", x) for i, x in enumerate(keys)), ("records", records)):
        if reason := _misaligned(name, x):
            return reason
    return compiler.obstacle(cached.device)


def mass_obstacle(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    records: Tensor,
    *,
    bits: int,
    reduce: str,
    dtype: torch.dtype,
    out: Tensor | None,
) -> str | None:
    """Why `quantized_mass` cannot run these arguments, or None."""
    T, Hq = queries[0].shape[1:3]
    group = Hq // keys[0].shape[2]
    if queries[0].dtype not in ELEMENTS:
        return f"it takes bfloat16 or float16 queries, got {queries[0].dtype}"
    if columns(T, group) > MAX_COLUMNS:
        return (
            f"it takes at most {MAX_COLUMNS} queries per KV head, with heads padded to a power of two, got {T} x {group} "
            f"({columns(T, group)})"
        )
    if dtype == torch.float64:
        return f"it writes float32 or bfloat16, got {dtype}"
    for i, x in enumerate(queries):
        if reason := _misaligned(f"queries[{i}]", x):
            return reason
    if keys[0].shape[1] % 8 or (out is not None and _misaligned("out", out)):
        strides = None if out is None else out.stride()
        return f"it writes rows of a multiple of 8 masses at multiples of 16 bytes, got {keys[0].shape[1]}, strides {strides}"
    return quantize_obstacle(keys, records)


def columns(T: int, group: int) -> int:
    """Queries of a KV head as columns of a product, padded: `COLUMNS` of mass.cu."""
    padded = 1 << (group - 1).bit_length()
    own = padded // 4 * T if padded >= 4 else -(-T // (4 // padded))
    return 8 * -(-own // 2)


def quantize_keys(
    keys: Sequence[Tensor],
    lengths: Tensor,
    records: Tensor,
    *,
    bits: int,
    key_scales: Sequence[Tensor | None],
    last: bool,
) -> None:
    B, N, Hkv, D = keys[0].shape
    device, blocks = keys[0].device, max(N // BLOCK - 1, 0)
    if blocks == 0 or B == 0:
        return
    lengths, scales = lengths.contiguous(), [None if x is None else x.contiguous() for x in key_scales]
    library = compiler.build(QUANTIZE, *_of_keys(D, bits, keys[0].dtype, keys[0].dtype))
    arguments = QuantizeArguments(
        keys=(ctypes.c_void_p * MAX_LAYERS)(*(x.data_ptr() for x in keys)),
        key_scales=(ctypes.c_void_p * MAX_LAYERS)(*(None if x is None else x.data_ptr() for x in scales)),
        lengths=lengths.data_ptr(),
        records=records.data_ptr(),
        key_stride=keys[0].stride()[:3],
        record_stride=records.stride()[:4],
        wide_lengths=lengths.dtype == torch.int64,
        layers=len(keys),
        B=B,
        heads=Hkv,
        blocks=1 if last else blocks,
        last=last,
    )
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.launch(ctypes.byref(arguments), compiler.multiprocessors(device), stream)
    compiler.check(library, error, "quantize_keys")


def quantized_mass(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    records: Tensor,
    lengths: Tensor,
    *,
    bits: int,
    scales: Sequence[float],
    reduce: str,
    key_scales: Sequence[Tensor | None],
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries[0].shape
    N, Hkv = keys[0].shape[1:3]
    device, group = queries[0].device, Hq // Hkv
    lengths, factors = lengths.contiguous(), [None if x is None else x.contiguous() for x in key_scales]
    options = ["PER_QUERY=1"] * (reduce == "none") + ["WIDE=1"] * (dtype == torch.float32)
    element = _of_keys(D, bits, queries[0].dtype, keys[0].dtype)
    library = compiler.build(MASS, *element, f"QUERIES={T}", f"GROUP={group}", *options)
    if out is None:
        out = torch.empty(B, *[T] * (reduce == "none"), len(keys) * Hq, N, dtype=dtype, device=device)
    multiprocessors = compiler.multiprocessors(device)
    parts = len(keys) * B * Hkv + multiprocessors * library.warps()
    sums = torch.empty(parts, library.columns(), 2, device=device)
    layers = [
        Layer(q.data_ptr(), k.data_ptr(), None if f is None else f.data_ptr(), scale)
        for q, k, f, scale in zip(queries, keys, factors, scales, strict=True)
    ]
    arguments = MassArguments(
        layers=(Layer * MAX_LAYERS)(*layers),
        records=records.data_ptr(),
        lengths=lengths.data_ptr(),
        sums=sums.data_ptr(),
        masses=out.data_ptr(),
        query_stride=queries[0].stride()[:3],
        key_stride=keys[0].stride()[:3],
        record_stride=records.stride()[:4],
        mass_stride=(out.stride(0), out.stride(1) if reduce == "none" else 0, out.stride(-2)),
        wide_lengths=lengths.dtype == torch.int64,
        count=len(keys),
        B=B,
        heads=Hkv,
        N=N,
    )
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.launch(ctypes.byref(arguments), multiprocessors, stream)
    compiler.check(library, error, "quantized_mass")
    return out


def _of_keys(D: int, bits: int, element: torch.dtype, cached: torch.dtype) -> list[str]:
    """Definitions that both kernels are built with."""
    definitions = [f"HEAD_DIM={D}", f"BITS={bits}", f"ELEMENT={ELEMENTS.get(element, ELEMENTS[torch.bfloat16])}"]
    return definitions + ["FLOAT8=1"] * (cached == torch.float8_e4m3fn)


def _misaligned(name: str, x: Tensor) -> str | None:
    bytes_ = x.element_size()
    starts = (stride for stride, extent in zip(x.stride()[:-1], x.shape, strict=False) if extent > 1)
    if x.stride(-1) == 1 and not x.data_ptr() % 16 and not any(start * bytes_ % 16 for start in starts):
        return None
    return f"it needs rows that start at multiples of 16 bytes, which {name} with strides {x.stride()} does not have"
