"""Argument checks shared by the ops: every message names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn
INTS = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    x: Tensor,
    *,
    shape: str,
    sizes: dict[str, int],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Check one tensor argument: its type, dtype, shape and device.

    `shape` is a row of axis letters, "B T Hq D". A letter met for the first time takes its size from `x` and is written
    into `sizes`; a letter already in `sizes` must agree. Raises TypeError for a wrong type or dtype, ValueError otherwise.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_names(dtypes)}, got {_names([x.dtype])}")
    axes = shape.split()
    if x.ndim != len(axes) or any(sizes.get(axis, size) != size for axis, size in zip(axes, x.shape, strict=True)):
        known = ", ".join(f"{axis}={sizes[axis]}" for axis in dict.fromkeys(axes) if axis in sizes)
        raise ValueError(f"{name}: expected shape [{', '.join(axes)}]{known and ' with ' + known}, got {list(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}")
    sizes.update(zip(axes, x.shape, strict=True))


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_int(name: str, value: object, *, low: int = 0) -> None:
    """Raise TypeError unless `value` is an int (not a bool), ValueError if it is below `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


def check_heads(sizes: dict[str, int]) -> None:
    """Raise ValueError unless Hq query heads split evenly over Hkv KV heads, and there is a sequence and a query token."""
    if sizes["Hkv"] < 1 or sizes["Hq"] < 1 or sizes["Hq"] % sizes["Hkv"]:
        raise ValueError(f"queries: expected a multiple of Hkv={sizes['Hkv']} query heads, got Hq={sizes['Hq']}")
    if sizes["B"] < 1 or sizes["T"] < 1:
        raise ValueError(f"queries: expected at least one sequence and query token, got B={sizes['B']}, T={sizes['T']}")


def check_head_dim(name: str, cache: Tensor) -> None:
    """Raise ValueError unless the head dim of a cache, its last axis, is contiguous."""
    if cache.shape[-1] > 1 and cache.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous head dim (stride 1), got stride {cache.stride(-1)}")


def check_scale(name: str, scale: Tensor | None, cache: Tensor, sizes: dict[str, int]) -> None:
    """A cache of 8-bit floats needs a factor per KV head, float32 `[Hkv]`; other caches take none."""
    if cache.dtype == FP8:
        if scale is None:
            raise ValueError(f"{name}: expected float32 [Hkv] with a cache of {_names([FP8])}, got None")
        check_tensor(name, scale, shape="Hkv", sizes=sizes, dtypes=[torch.float32], device=cache.device)
    elif scale is not None:
        raise ValueError(f"{name}: expected None with a cache of {_names([cache.dtype])}, got a tensor")


def check_range(name: str, x: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless low <= x <= high everywhere. Reads `x` on the host."""
    if x.numel():
        least, most = (int(v) for v in x.aminmax())
        if least < low or most > high:
            raise ValueError(f"{name}: expected values in {low} .. {high}, got {least} .. {most}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_pages(page_table: Tensor | None, ends: Tensor, page_size: int, pages: int) -> None:
    """Raise ValueError unless the entries of `page_table [B, P]` that hold the first `ends [B]` tokens name one of `pages`."""
    if page_table is not None:
        used = torch.arange(page_table.shape[1], device=ends.device) * page_size < ends.unsqueeze(1)
        check_range("page_table", page_table[used], 0, pages - 1)
