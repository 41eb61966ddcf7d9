"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from outrider.ops.backends import choose
from outrider.ops.checks import FLOATS, check_tensor
from outrider.ops.fused_linear import reference

MAX_ROWS = 8  # of x, that the kernel in CUDA C++ takes


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`x W^T`, with what surrounds a product in a decoder layer: RMS norm before, gated activation or residual behind.

    Args:
        x: `[R, K]`, bfloat16, float16, float32 or float64; rows are tokens.
        weight: `[N, K]`, dtype of `x`. With `swiglu` its first N / 2 rows are the gate, the others what it gates. A constant:
            backend "cuda" reads it while kernels ahead of it may still run.
        bias: `[N]`, added to the product.
        norm: `[K]`, the gain of an RMS norm over the rows of `x` before the product; None for no norm.
        eps: of the norm, added to the mean of squares.
        swiglu: the result is `silu(gate) * up`.
        residual: `[R, N]` (`[R, N / 2]` with `swiglu`), added last.
        backend: "auto" (see `ops/README.md`), "reference", "triton" or "cuda". No silent fall-back.

    Returns:
        `[R, N]`, or `[R, N / 2]` with `swiglu`, contiguous, dtype of `x`. A row does not depend on the others: backend "cuda"
        gives the same bits whatever R is and wherever the row stands.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or choice, or a backend that cannot run the call.
    """
    sizes: dict[str, int] = {}
    check_tensor("x", x, shape="R K", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, dtypes=[x.dtype], device=x.device)
    check("weight", weight, shape="N K")
    if swiglu and sizes["N"] % 2:
        raise ValueError(f"weight: expected an even number of rows with swiglu, got {sizes['N']}")
    if bias is not None:
        check("bias", bias, shape="N")
    if norm is not None:
        check("norm", norm, shape="K")
    sizes["M"] = sizes["N"] // 2 if swiglu else sizes["N"]
    if residual is not None:
        check("residual", residual, shape="R M")
    kernels = {"cuda": lambda: _cuda().obstacle(x, weight, norm), "triton": lambda: _triton().obstacle(x, norm)}
    chosen = choose(backend, x.device, kernels)
    run = {"cuda": _cuda, "triton": _triton, "reference": lambda: reference}[chosen]().fused_linear
    return run(x, weight, bias, norm=norm, eps=eps, swiglu=swiglu, residual=residual)


def _cuda():
    from outrider.ops.fused_linear import cuda

    return cuda


def _triton():
    from outrider.ops.fused_linear import triton

    return triton
