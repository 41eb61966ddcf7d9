"""The fused product in CUDA C++ for Hopper: arguments for `kernel.cu`, which says how it works."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from outrider.ops import compiler
from outrider.ops.fused_linear.api import MAX_ROWS

SOURCE = Path(__file__).with_name("kernel.cu")
MAX_NORMED = 200 << 10  # bytes of x that fit into shared memory
VARIANTS = [()]  # compiled by the tests


class Arguments(ctypes.Structure):
    """Mirrors `struct Arguments` of kernel.cu."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "norm", "residual", "output")]
        + [(name, ctypes.c_longlong) for name in ("x_stride", "weight_stride", "residual_stride")]
        + [(name, ctypes.c_int) for name in ("R", "K", "M", "swiglu")]
        + [("eps", ctypes.c_float)]
    )


def obstacle(x: Tensor, weight: Tensor, norm: Tensor | None) -> str | None:
    """Why this kernel cannot run these arguments, or None."""
    if x.dtype != torch.bfloat16:
        return f"it takes bfloat16, got {x.dtype}"
    if not 1 <= x.shape[0] <= MAX_ROWS:
        return f"it takes 1 to {MAX_ROWS} rows, got {x.shape[0]}"
    if x.shape[1] % 8 or weight.shape[0] < 1:
        return f"it takes a multiple of 8 columns and at least one row of weights, got a weight of {list(weight.shape)}"
    if norm is not None and x.shape[0] * (x.shape[1] + 96) * x.element_size() > MAX_NORMED:
        return f"with a norm it takes rows that fit into {MAX_NORMED} bytes, got {list(x.shape)}"
    for name, matrix in (("x", x), ("weight", weight)):
        if matrix.data_ptr() % 16 or matrix.stride(0) % 8 or matrix.stride(1) != 1:
            return f"it needs rows that start at multiples of 16 bytes, which {name} with strides {matrix.stride()} do not"
    return compiler.obstacle(x.device)


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Tensor | None, eps: float, swiglu: bool, residual: Tensor | None
) -> Tensor:
    R, K = x.shape
    M = weight.shape[0] // 2 if swiglu else weight.shape[0]
    output = torch.empty(R, M, dtype=x.dtype, device=x.device)
    bias, norm = (None if vector is None else vector.contiguous() for vector in (bias, norm))
    if norm is not None and norm.data_ptr() % 16:  # a view into something larger
        norm = norm.clone()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    library = compiler.build(SOURCE)
    arguments = Arguments(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        norm=None if norm is None else norm.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        output=output.data_ptr(),
        x_stride=x.stride(0),
        weight_stride=weight.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        R=R,
        K=K,
        M=M,
        swiglu=swiglu,
        eps=eps,
    )
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
    with torch.cuda.device(x.device):
        error = library.launch(ctypes.byref(arguments), compiler.multiprocessors(x.device), stream)
    compiler.check(library, error, "fused_linear")
    return output
