"""Norm, rotation and appending in CUDA C++ for Hopper: arguments for `kernel.cu`, which says how it works."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from outrider.ops import compiler

SOURCE = Path(__file__).with_name("kernel.cu")
ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
VECTOR = 4  # elements that a lane holds of each half of a head
MAX_HEAD_DIM = 2 * VECTOR * 32
VARIANTS = [("ELEMENT=__nv_bfloat16",), ("ELEMENT=__half",)]  # compiled by the tests


class Arguments(ctypes.Structure):
    """Mirrors `struct Arguments` of kernel.cu."""

    _fields_ = (
        [
            (name, ctypes.c_void_p)
            for name in (
                "projected", "cos", "sin", "query_norm", "key_norm", "key_scale", "value_scale", "lengths", "queries", "keys",
                "values",
            )
        ]
        + [(name, ctypes.c_longlong * 2) for name in ("cos_stride", "sin_stride")]
        + [(name, ctypes.c_longlong * 3) for name in ("key_stride", "value_stride")]
        + [(name, ctypes.c_uint) for name in ("T", "heads", "rows")]
        + [(name, ctypes.c_int) for name in ("wide_lengths", "query_heads", "kv_heads", "D", "lane_bits")]
        + [("eps", ctypes.c_float)]
    )  # fmt: skip


def obstacle(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
) -> str | None:
    """Why this kernel cannot run these arguments, or None."""
    D = projected.shape[3]
    if projected.dtype not in ELEMENTS:
        return f"it takes bfloat16 or float16 tokens, got {projected.dtype}"
    if D % (2 * VECTOR) or not 0 < D <= MAX_HEAD_DIM:
        return f"it takes a head dim that is a multiple of {2 * VECTOR} up to {MAX_HEAD_DIM}, got {D}"
    tensors = {"projected": projected, "cos": cos, "sin": sin, "key_cache": key_cache, "value_cache": value_cache}
    for name, x in (tensors | {"query_norm": query_norm, "key_norm": key_norm}).items():
        if x is not None and not _aligned(x):
            bytes_ = VECTOR * x.element_size()
            return f"it needs dense rows at multiples of {bytes_} bytes, which {name} with strides {x.stride()} does not have"
    return compiler.obstacle(projected.device)


def _aligned(x: Tensor) -> bool:
    """Whether a lane can read or write its elements of every row at once."""
    starts = (stride for stride, extent in zip(x.stride()[:-1], x.shape, strict=False) if extent > 1)
    return x.stride(-1) == 1 and not x.data_ptr() % (VECTOR * x.element_size()) and not any(start % VECTOR for start in starts)


def rotary_append(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    B, T, H, D = projected.shape
    Hkv = key_cache.shape[2]
    lengths = lengths.contiguous()
    key_scale, value_scale = (None if x is None else x.contiguous() for x in (key_scale, value_scale))
    queries = torch.empty(B, T, H - 2 * Hkv, D, dtype=projected.dtype, device=projected.device)
    library = compiler.build(SOURCE, f"ELEMENT={ELEMENTS[projected.dtype]}")
    if queries.numel() == 0:
        return queries
    arguments = Arguments(
        projected=projected.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        query_norm=None if query_norm is None else query_norm.data_ptr(),
        key_norm=None if key_norm is None else key_norm.data_ptr(),
        key_scale=None if key_scale is None else key_scale.data_ptr(),
        value_scale=None if value_scale is None else value_scale.data_ptr(),
        lengths=lengths.data_ptr(),
        queries=queries.data_ptr(),
        keys=key_cache.data_ptr(),
        values=value_cache.data_ptr(),
        cos_stride=cos.stride()[:2],
        sin_stride=sin.stride()[:2],
        key_stride=key_cache.stride()[:3],
        value_stride=value_cache.stride()[:3],
        T=T,
        heads=H,
        rows=B * T * H,
        wide_lengths=lengths.dtype == torch.int64,
        query_heads=H - 2 * Hkv,
        kv_heads=Hkv,
        D=D,
        lane_bits=(D // (2 * VECTOR) - 1).bit_length(),
        eps=eps,
    )
    with torch.cuda.device(projected.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.launch(ctypes.byref(arguments), stream)
    compiler.check(library, error, "rotary_append")
    return queries
