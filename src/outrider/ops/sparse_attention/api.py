"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from outrider.ops.backends import choose, debug
from outrider.ops.checks import (
    FLOATS,
    FP8,
    INTS,
    check_head_dim,
    check_heads,
    check_int,
    check_pages,
    check_range,
    check_scale,
    check_tensor,
)
from outrider.ops.sparse_attention import reference

CUDA_ROWS = 32  # query rows of a list up to which the kernel in CUDA C++ reads its tokens once; Triton's reads them once for 64
CUDA_TOKENS = 2**16  # rows of a cache up to which it is faster without lists, too


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    *,
    scale: float,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    page_table: Tensor | None = None,
    window: int | None = None,
    unlisted_values: Tensor | None = None,
    unlisted_shares: Tensor | None = None,
    logsumexp: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Grouped-query attention of T queries over listed cached tokens, or all of them, and the causal tail.

    Sequence b has `lengths[b]` cached tokens (the past); keys and values of its T query tokens already lie behind them, at
    positions `lengths[b] .. lengths[b] + T - 1` (the tail). Query t attends to the tokens of its list and to the tail up to
    and including itself:

        past (listed only)   tail
        t=0   x . . x x .    x . .
        t=1   x . . x x .    x x .
        t=2   x . . x x .    x x x

    Counts without indices stand for the first tokens of the past. With every past token listed this is dense causal attention.
    The same without lists (`indices` and `counts` None) is the dense form, in which a window may also hide tokens that are too
    far back:

        past                 tail    window of 4
        t=0   . . x x x      x . .
        t=1   . . . x x      x x .
        t=2   . . . . x      x x x

    What a list leaves out may be stood for by one value a KV head: with `unlisted_values` m and `unlisted_shares` s the
    output o of a head becomes `(1 - s) o + s m`.

    Rows that no query attends to, those behind the tail among them, are not read at all, so they may hold anything, NaN too.

    Args:
        queries: `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; position encoding applied.
        keys, values: `[B, N, Hkv, D]`, or with a page table `[pages, page_size, Hkv, D]`; dtype of `queries`, or
            float8_e4m3fn. Any strides, head dim contiguous (two views of one `[..., 2, D]`, too). Query head h uses KV head
            `h // (Hq // Hkv)`.
        indices: `[B, Hs, M]` int32, ascending positions below `lengths[b]`; entries at and past the count are ignored. M <= N.
            Hs is 1 (one list for all heads), Hkv (one per KV head) or Hq (one per query head). None: the first `counts[b, h]`
            cached tokens.
        counts: `[B, Hs]` int32, `0 <= counts <= M`, without indices at most `lengths[b]`; an empty list leaves the tail alone.
            None, together with `indices`: all cached tokens.
        lengths: `[B]`, int32 or int64, number of cached tokens, `0 <= lengths[b] <= N - T`.
        scale: factor on the logits, usually `D ** -0.5`.
        key_scale, value_scale: `[Hkv]` float32, the factor per head that a float8 cache is multiplied with.
        page_table: `[B, P]` int32; token i of sequence b lies in page `page_table[b, i // page_size]`, slot
            `i % page_size`, and N is `P * page_size`. Entries past the page of the last tail token may hold anything.
        window: without lists only: query t, at position `lengths[b] + t`, attends to at most so many positions, the last of
            them its own; at least 1. None: to all.
        unlisted_values: with lists only: `[Hkv, D]` float32, finite. None: lists stand for the whole cache.
        unlisted_shares: `[B, Hq]` float32, in 0 .. 1; None together with `unlisted_values`.
        logsumexp: `[B, Hq, T]` float32, any strides: filled with the natural logarithm of each query's softmax denominator, the
            sum of `exp(logit)` over what it attends to; what stands for unlisted tokens is not in it. None: not wanted.
        backend: "auto" (see `ops/README.md`), "reference", "triton" or "cuda". No silent fall-back.

    Returns:
        `[B, T, Hq, D]` in the dtype of `queries`; computed in float32 (float64 for float64 inputs), by the reference
        without lists as PyTorch's own attention does.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, `indices` without `counts`, a window below 1 or with lists, only
            one of `unlisted_values` and `unlisted_shares` or these without `indices`, or a backend that cannot run the call;
            the reference, and with `OUTRIDER_DEBUG=1` every backend, also checks the values of `lengths`, `counts`, `indices`
            and `page_table` (debug mode: that lists ascend, too).

    Source: sparse verification of STS (arXiv 2605.15508) and SpecAttn (arXiv 2510.27641), with lists per KV head.
    """
    sizes: dict[str, int] = {}
    layout = "B N Hkv D" if page_table is None else "pages page_size Hkv D"
    check_tensor("queries", queries, shape="B T Hq D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=queries.device)
    check("keys", keys, shape=layout, dtypes=[queries.dtype, FP8])
    check("values", values, shape=layout, dtypes=[keys.dtype])
    check_head_dim("keys", keys)
    check_head_dim("values", values)
    check_scale("key_scale", key_scale, keys, sizes)
    check_scale("value_scale", value_scale, values, sizes)
    if counts is None and indices is not None:
        raise ValueError("counts: expected int32 lists with indices, or None for both (dense), got None for one")
    if counts is not None and window is not None:
        raise ValueError(f"window: expected None with token lists, got {window}")
    if indices is not None:
        check("indices", indices, shape="B Hs M", dtypes=INTS[:1])
    if counts is not None:
        check("counts", counts, shape="B Hs", dtypes=INTS[:1])
    if window is not None:
        check_int("window", window, low=1)
    check("lengths", lengths, shape="B", dtypes=INTS)
    if page_table is not None:
        check("page_table", page_table, shape="B P", dtypes=INTS[:1])
    for name, x, shape in (("unlisted_values", unlisted_values, "Hkv D"), ("unlisted_shares", unlisted_shares, "B Hq")):
        if (x is None) != (unlisted_values is None) or (x is not None and indices is None):
            raise ValueError(f"{name}: expected both unlisted_values and unlisted_shares, with token lists, or neither")
        if x is not None:
            check(name, x, shape=shape, dtypes=FLOATS[2:3])
    if logsumexp is not None:
        check("logsumexp", logsumexp, shape="B Hq T", dtypes=FLOATS[2:3])
    check_heads(sizes)
    if counts is not None and sizes["Hs"] not in (1, sizes["Hkv"], sizes["Hq"]):
        raise ValueError(f"counts: expected Hs of 1, Hkv={sizes['Hkv']} or Hq={sizes['Hq']} lists, got Hs={sizes['Hs']}")
    capacity = keys.shape[1] if page_table is None else page_table.shape[1] * keys.shape[1]
    if indices is not None and sizes["M"] > capacity:
        raise ValueError(f"indices: expected lists of at most N={capacity} tokens, got width M={sizes['M']}")
    arguments = {"scale": scale, "key_scale": key_scale, "value_scale": value_scale, "page_table": page_table, "window": window}
    arguments |= {"unlisted_values": unlisted_values, "unlisted_shares": unlisted_shares, "logsumexp": logsumexp}
    kernels = {"cuda": lambda: _cuda().obstacle(queries, keys, values), "triton": lambda: _triton().obstacle(queries, keys)}
    rows = sizes["T"] * sizes["Hq"] // max(sizes.get("Hs", 1), sizes["Hkv"])
    if rows > CUDA_ROWS or (indices is None and sizes["B"] * capacity > CUDA_TOKENS):
        kernels = dict(reversed(kernels.items()))  # measured, see docs/log.md
    chosen = choose(backend, queries.device, kernels)
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, capacity - sizes["T"])
        check_pages(page_table, lengths + sizes["T"], keys.shape[1], keys.shape[0])
        if counts is not None:
            check_range("counts", counts, 0, sizes.get("M", capacity))
            _check_lists(indices, counts, lengths)
    run = {"cuda": _cuda, "triton": _triton, "reference": lambda: reference}[chosen]().sparse_attention
    return run(queries, keys, values, indices, counts, lengths, **arguments)


def _cuda():
    from outrider.ops.sparse_attention import cuda

    return cuda


def _triton():
    from outrider.ops.sparse_attention import triton

    return triton


def _check_lists(indices: Tensor | None, counts: Tensor, lengths: Tensor) -> None:
    if indices is None:
        if bool((counts > lengths.view(-1, 1)).any()):
            raise ValueError("counts: expected at most lengths[b] without indices")
        return
    listed = torch.arange(indices.shape[2], device=indices.device) < counts.unsqueeze(-1)
    if bool((listed & ((indices < 0) | (indices >= lengths.view(-1, 1, 1)))).any()):
        raise ValueError("indices: expected listed positions in 0 .. lengths[b] - 1")
    if debug() and bool((listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])).any()):
        raise ValueError("indices: expected ascending positions in every list")
