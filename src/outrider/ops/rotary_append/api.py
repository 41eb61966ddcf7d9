"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from outrider.ops.backends import choose, debug
from outrider.ops.checks import FLOATS, FP8, INTS, check_head_dim, check_range, check_scale, check_tensor
from outrider.ops.rotary_append import reference


def rotary_append(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 1e-6,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Encode the positions of T new tokens of every sequence, and write their keys and values into the caches.

    Args:
        projected: `[B, T, Hq + 2 Hkv, D]`, bfloat16, float16, float32 or float64: queries, keys and values of the tokens, as
            the common projection leaves them. Contiguous.
        cos, sin: `[B, T, D]`, dtype of `projected`: of the angles by which dims d and d + D / 2 are rotated, in both halves
            alike.
        key_cache, value_cache: `[B, N, Hkv, D]`, written at `lengths[b] .. lengths[b] + T - 1`; dtype of `projected`, or
            float8_e4m3fn. Any strides, head dim contiguous.
        lengths: `[B]`, int32 or int64, cached tokens, `0 <= lengths[b] <= N - T`. Stay as they are.
        query_norm, key_norm: `[D]`, the gains of an RMS norm over every head before the rotation; None for no norm. They are
            weights: the kernel may read them while the one before it in the stream still runs.
        eps: of these norms, added to the mean of squares.
        key_scale, value_scale: `[Hkv]` float32: rows of a float8 cache are divided by it, and brought into its range.
        backend: "auto" (see `ops/README.md`), "reference" or "cuda". No silent fall-back.

    Returns:
        The queries, `[B, T, Hq, D]` contiguous, dtype of `projected`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, or a backend that cannot run the call; on a CPU, and with
            `OUTRIDER_DEBUG=1` anywhere, also lengths out of range. Nothing is written then.
    """
    sizes: dict[str, int] = {}
    check_tensor("projected", projected, shape="B T H D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=projected.device)
    check("key_cache", key_cache, shape="B N Hkv D", dtypes=[projected.dtype, FP8])
    check("value_cache", value_cache, shape="B N Hkv D", dtypes=[key_cache.dtype])
    if sizes["D"] % 2:
        raise ValueError(f"projected: expected an even head dim, got {sizes['D']}")
    if sizes["H"] <= 2 * sizes["Hkv"]:
        raise ValueError(f"projected: expected more than 2 * Hkv = {2 * sizes['Hkv']} heads, got {sizes['H']}")
    if not projected.is_contiguous():
        raise ValueError(f"projected: expected a contiguous tensor, got strides {projected.stride()}")
    for name, x in (("cos", cos), ("sin", sin)):
        check(name, x, shape="B T D", dtypes=[projected.dtype])
    for name, gain in (("query_norm", query_norm), ("key_norm", key_norm)):
        if gain is not None:
            check(name, gain, shape="D", dtypes=[projected.dtype])
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_head_dim(name, x)
    check_scale("key_scale", key_scale, key_cache, sizes)
    check_scale("value_scale", value_scale, value_cache, sizes)
    check("lengths", lengths, shape="B", dtypes=INTS)
    tensors = projected, cos, sin, key_cache, value_cache, query_norm, key_norm
    chosen = choose(backend, projected.device, {"cuda": lambda: _cuda().obstacle(*tensors)})
    if not projected.is_cuda or debug():
        check_range("lengths", lengths, 0, sizes["N"] - sizes["T"])
    run = {"cuda": _cuda, "reference": lambda: reference}[chosen]().rotary_append
    return run(
        projected,
        cos,
        sin,
        key_cache,
        value_cache,
        lengths,
        query_norm=query_norm,
        key_norm=key_norm,
        eps=eps,
        key_scale=key_scale,
        value_scale=value_scale,
    )


def _cuda():
    from outrider.ops.rotary_append import cuda

    return cuda
