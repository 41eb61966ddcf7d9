"""Products of many rows: the product is PyTorch's, bound by arithmetic; what surrounds it takes one launch each in Triton.

    _norm     a program per row: RMS norm, rounded where transformers rounds it
    _swiglu   a program per row and piece of its columns: silu(gate) * up

A residual goes into the product's own sum. Norm and activation are fp32 inside, and wait for the memory alone.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

MAX_COLUMNS = 2**15  # of a row that is normed, which one program holds
PIECE = 2048  # columns of a program of _swiglu
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _norm(x, gain, result, eps, K, row_stride, PADDED: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)
    there = column < K
    wide = tl.load(x + row * row_stride + column, mask=there, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide) / K + eps)
    normed = (wide * factor).to(result.dtype.element_ty)
    normed = tl.load(gain + column, mask=there).to(tl.float32) * normed.to(tl.float32)
    tl.store(result + row * K + column, normed.to(result.dtype.element_ty), mask=there)


@triton.jit
def _swiglu(product, result, M, PIECE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    there = column < M
    gate = tl.load(product + row * 2 * M + column, mask=there).to(tl.float32)
    up = tl.load(product + row * 2 * M + M + column, mask=there).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(result.dtype.element_ty)
    tl.store(result + row * M + column, (opened.to(tl.float32) * up).to(result.dtype.element_ty), mask=there)


def obstacle(x: Tensor, norm: Tensor | None) -> str | None:
    """Why these arguments cannot be run, None if they can."""
    if x.dtype == torch.float64:
        return "x is float64; the kernels compute in float32"
    if norm is not None and x.shape[1] > MAX_COLUMNS:
        return f"with a norm it takes rows of at most {MAX_COLUMNS} columns, got {list(x.shape)}"
    if not INTERPRETED and not x.is_cuda:
        return f"tensors are on {x.device.type}; the kernels run on CUDA devices (or with TRITON_INTERPRET=1)"
    return None


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Tensor | None, eps: float, swiglu: bool, residual: Tensor | None
) -> Tensor:
    R, K = x.shape
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if norm is not None and R:
            x = x if x.stride(1) == 1 else x.contiguous()
            normed = torch.empty(R, K, dtype=x.dtype, device=x.device)
            _norm[R,](
                x, norm.contiguous(), normed, eps, K, x.stride(0), PADDED=triton.next_power_of_2(K), num_warps=8,
            )  # fmt: skip
            x = normed
        if residual is not None and bias is None and not swiglu:
            return torch.addmm(residual, x, weight.T)
        y = linear(x, weight, bias)
        if swiglu and R:
            M = weight.shape[0] // 2
            product, y = y, torch.empty(R, M, dtype=x.dtype, device=x.device)
            _swiglu[R, triton.cdiv(M, PIECE)](
                product, y, M, PIECE=PIECE, num_warps=8,
            )  # fmt: skip
        elif swiglu:
            y = y[:, : weight.shape[0] // 2]
    return y if residual is None else residual + y
