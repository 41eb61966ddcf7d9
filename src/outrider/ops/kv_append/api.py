"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from outrider.ops.backends import choose, debug
from outrider.ops.checks import FLOATS, FP8, INTS, check_head_dim, check_range, check_scale, check_tensor
from outrider.ops.kv_append import reference


def kv_append(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write the rows of T new tokens of every sequence into the caches, at `lengths[b] .. lengths[b] + T - 1`.

    Args:
        keys, values: `[B, T, Hkv, D]`, bfloat16, float16, float32 or float64; any strides, head dim contiguous.
        key_cache, value_cache: `[B, N, Hkv, D]`, written in place; dtype of `keys`, or float8_e4m3fn. Any strides, head dim
            contiguous.
        lengths: `[B]`, int32 or int64, cached tokens, `0 <= lengths[b] <= N - T`. Stay as they are.
        key_scale, value_scale: `[Hkv]` float32: rows of a float8 cache are divided by it, and brought into its range.
        backend: "auto" (see `ops/README.md`), "reference" or "triton". No silent fall-back.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, or a backend that cannot run the call; on a CPU, and with
            `OUTRIDER_DEBUG=1` anywhere, also lengths out of range. Nothing is written then.
    """
    sizes: dict[str, int] = {}
    check_tensor("keys", keys, shape="B T Hkv D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=keys.device)
    check("values", values, shape="B T Hkv D", dtypes=[keys.dtype])
    check("key_cache", key_cache, shape="B N Hkv D", dtypes=[keys.dtype, FP8])
    check("value_cache", value_cache, shape="B N Hkv D", dtypes=[key_cache.dtype])
    for name, x in (("keys", keys), ("values", values), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_head_dim(name, x)
    check_scale("key_scale", key_scale, key_cache, sizes)
    check_scale("value_scale", value_scale, value_cache, sizes)
    check("lengths", lengths, shape="B", dtypes=INTS)
    chosen = choose(backend, keys.device, {"triton": lambda: _triton().obstacle(keys, key_cache)})
    if not keys.is_cuda or debug():
        check_range("lengths", lengths, 0, sizes["N"] - sizes["T"])
    run = {"triton": _triton, "reference": lambda: reference}[chosen]().kv_append
    run(keys, values, key_cache, value_cache, lengths, key_scale=key_scale, value_scale=value_scale)


def _triton():
    from outrider.ops.kv_append import triton

    return triton
