"""Appending in Triton: one launch for keys and values, a program per new token and KV head."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LARGEST_FP8 = tl.constexpr(448.0)  # of float8_e4m3fn


@triton.jit
def _put(new, cache, dim, there, scale):
    x = tl.load(new + dim, mask=there)
    if scale is not None:
        x = tl.clamp(x.to(tl.float32) / tl.load(scale + tl.program_id(1)), -LARGEST_FP8, LARGEST_FP8)
    tl.store(cache + dim, x.to(cache.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["T"])
def _append(
    keys,
    values,
    key_cache,
    value_cache,
    lengths,
    key_scale,
    value_scale,
    T,
    key_strides,  # of B, T, head
    value_strides,
    key_cache_strides,
    value_cache_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence, step = (token // T).to(tl.int64), (token % T).to(tl.int64)
    position = tl.load(lengths + sequence).to(tl.int64) + step
    dim = tl.arange(0, D_PADDED)
    keys += sequence * key_strides[0] + step * key_strides[1] + head * key_strides[2]
    values += sequence * value_strides[0] + step * value_strides[1] + head * value_strides[2]
    key_cache += sequence * key_cache_strides[0] + position * key_cache_strides[1] + head * key_cache_strides[2]
    value_cache += sequence * value_cache_strides[0] + position * value_cache_strides[1] + head * value_cache_strides[2]
    _put(keys, key_cache, dim, dim < D, key_scale)
    _put(values, value_cache, dim, dim < D, value_scale)


def obstacle(keys: Tensor, key_cache: Tensor) -> str | None:
    """Why these arguments cannot be run, None if they can."""
    if keys.dtype == torch.float64:
        return "keys are float64; the kernels compute in float32"
    if INTERPRETED:
        return "Triton's interpreter rounds to float8_e4m3fn wrongly" if key_cache.dtype == torch.float8_e4m3fn else None
    if not keys.is_cuda:
        return f"tensors are on {keys.device.type}; the kernel runs on CUDA devices (or with TRITON_INTERPRET=1)"
    if key_cache.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(keys.device) < (8, 9):
        return "float8_e4m3fn caches need compute capability 8.9"
    return None


def kv_append(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    B, T, Hkv, D = keys.shape
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(keys.device) if keys.is_cuda else contextlib.nullcontext():
        _append[B * T, Hkv](
            keys, values, key_cache, value_cache, lengths.contiguous(),
            None if key_scale is None else key_scale.contiguous(),
            None if value_scale is None else value_scale.contiguous(),
            T, keys.stride()[:3], values.stride()[:3], key_cache.stride()[:3], value_cache.stride()[:3],
            D=D, D_PADDED=triton.next_power_of_2(D), num_warps=1,
        )  # fmt: skip
