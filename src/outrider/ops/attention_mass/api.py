"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from outrider.ops.attention_mass import reference
from outrider.ops.backends import choose, debug
from outrider.ops.checks import (
    FLOATS,
    FP8,
    INTS,
    check_choice,
    check_head_dim,
    check_heads,
    check_pages,
    check_range,
    check_scale,
    check_tensor,
)

REDUCTIONS = ("mean", "max", "none")
OUTPUTS = (torch.bfloat16, torch.float32, torch.float64)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    reduce: str = "mean",
    heads: Tensor | None = None,
    key_scale: Tensor | None = None,
    page_table: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax mass that each head's queries put on every cached key.

    Sequence b has `lengths[b]` cached tokens (the past); the keys of its T query tokens already lie behind them, at
    positions `lengths[b] .. lengths[b] + T - 1` (the tail). Query t takes its softmax over the past and over the tail up to
    and including itself; the op returns the mass on the past. Tail keys count in the denominator only, so the masses of a
    query sum to at most 1.

    Args:
        queries: `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; position encoding applied.
        keys: `[B, N, Hkv, D]`, or with a page table `[pages, page_size, Hkv, D]`; dtype of `queries`, or float8_e4m3fn. Any
            strides, head dim contiguous. Query head h uses KV head `h // (Hq // Hkv)`. Rows at and past `lengths[b] + T` are
            never read.
        lengths: `[B]`, int32 or int64, number of cached tokens, `0 <= lengths[b] <= N - T`.
        scale: factor on the logits, usually `D ** -0.5`.
        reduce: over the T queries: "mean", "max" or "none".
        heads: `[R, G]` int64, query heads: row r of the result is then the sum over the G heads `heads[r]`.
        key_scale: `[Hkv]` float32, the factor per head that float8 keys are multiplied with.
        page_table: `[B, P]` int32; token i of sequence b lies in page `page_table[b, i // page_size]`, slot
            `i % page_size`, and N is `P * page_size`. Entries past the page of the last tail token may hold anything.
        dtype: of the result: float32 (default; float64 for float64 queries) or bfloat16.
        out: where the result goes, of its shape and dtype; any strides, N contiguous. Every element is written.
        backend: "auto" (see `ops/README.md`), "reference", "triton" or "cuda". No silent fall-back.

    Returns:
        `[B, Hq, N]` (with `heads`: R rows; "none": `[B, T, Hq, N]`); exactly 0 at and past `lengths[b]`. It is `out`, if given.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, or a backend that cannot run the call; the reference, and with
            `OUTRIDER_DEBUG=1` every backend, also checks the values of `lengths`, `heads` and `page_table`.

    Source: the draft-side importance score of STS (arXiv 2605.15508) and SpecAttn (arXiv 2510.27641).
    """
    sizes: dict[str, int] = {}
    check_tensor("queries", queries, shape="B T Hq D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=queries.device)
    check("keys", keys, shape="B N Hkv D" if page_table is None else "pages page_size Hkv D", dtypes=[queries.dtype, FP8])
    check_head_dim("keys", keys)
    check_scale("key_scale", key_scale, keys, sizes)
    check("lengths", lengths, shape="B", dtypes=INTS)
    if page_table is not None:
        check("page_table", page_table, shape="B P", dtypes=INTS[:1])
        sizes["N"] = sizes["P"] * sizes["page_size"]
    if heads is not None:
        check("heads", heads, shape="R G", dtypes=INTS[1:])
    check_heads(sizes)
    check_choice("reduce", reduce, REDUCTIONS)
    if dtype is None:
        dtype = torch.promote_types(queries.dtype, torch.float32)
    elif dtype not in OUTPUTS:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, OUTPUTS))}, got {dtype}")
    if out is not None:
        rows = "Hq" if heads is None else "R"
        check("out", out, shape=f"B T {rows} N" if reduce == "none" else f"B {rows} N", dtypes=[dtype])
        if out.shape[-1] > 1 and out.stride(-1) != 1:
            raise ValueError(f"out: expected rows without gaps (stride 1), got stride {out.stride(-1)}")
    arguments = {
        "scale": scale, "reduce": reduce, "heads": heads, "key_scale": key_scale, "page_table": page_table, "dtype": dtype,
        "out": out,
    }  # fmt: skip
    chosen = choose(
        backend,
        queries.device,
        {"cuda": lambda: _cuda().obstacle(queries, keys, **arguments), "triton": lambda: _triton().obstacle(queries, keys)},
    )
    if chosen == "reference" or debug():
        _check_values(lengths, heads, page_table, keys, sizes)
    run = {"cuda": _cuda, "triton": _triton, "reference": lambda: reference}[chosen]().attention_mass
    return run(queries, keys, lengths, **arguments)


def _cuda():
    from outrider.ops.attention_mass import cuda

    return cuda


def _triton():
    from outrider.ops.attention_mass import triton

    return triton


def _check_values(
    lengths: Tensor, heads: Tensor | None, page_table: Tensor | None, keys: Tensor, sizes: dict[str, int]
) -> None:
    T = sizes["T"]
    capacity = keys.shape[1] if page_table is None else page_table.shape[1] * keys.shape[1]
    check_range("lengths", lengths, 0, capacity - T)
    if heads is not None:
        check_range("heads", heads, 0, sizes["Hq"] - 1)
    check_pages(page_table, lengths + T, keys.shape[1], keys.shape[0])
