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
    check_range,
    check_scale,
    check_tensor,
)
from outrider.ops.chunk_attention import reference


def chunk_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    *,
    block: int,
    scale: float,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    window: int | None = None,
    logsumexp: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Grouped-query attention of a chunk of the prompt, block by block over listed tokens, or over all.

    Sequence b has `lengths[b]` cached tokens before the chunk; keys and values of its T tokens already lie behind them, at
    positions `lengths[b] .. lengths[b] + T - 1`. Block i of the chunk holds the queries `i * block` to
    `min((i + 1) * block, T) - 1` and starts at position `lengths[b] + i * block`. Each of its queries attends to the tokens of
    the block's list, which all lie before the block (in earlier blocks of the chunk, too), and to the block up to and including
    itself:

        past            chunk, in blocks of 3
        x . . x .       x . .                      block 0
        x . . x .       x x .
        x . . x .       x x x
        . . x . .       . x .    x . .             block 1
        . . x . .       . x .    x x .
        . . x . .       . x .    x x x

    With every token before a block listed this is dense causal attention. The same without lists (`indices` and `counts` None)
    is the dense form, in which a window may also hide tokens that are too far back.

    Rows that no query attends to, those behind the chunk among them, are not read at all, so they may hold anything, NaN too.
    The rows of the chunk itself must be finite: they are read for every query of their block and weighted with 0.

    Args:
        queries: `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; position encoding applied.
        keys, values: `[B, N, Hkv, D]`; dtype of `queries`, or float8_e4m3fn. Any strides, head dim contiguous. Query head h
            uses KV head `h // (Hq // Hkv)`.
        indices: `[B, NB, Hs, M]` int32 with NB = ceil(T / block), ascending positions below the start of their block; entries
            at and past the count are ignored. M <= N. Hs is 1 (one list for all heads), Hkv (one per KV head) or Hq (one per
            query head). None: all tokens.
        counts: `[B, NB, Hs]` int32, `0 <= counts <= M`; an empty list leaves the block alone. None together with `indices`.
        lengths: `[B]`, int32 or int64, number of tokens before the chunk, `0 <= lengths[b] <= N - T`.
        block: tokens that share a list; at least 1. Any without lists, where it is but what the reference computes at a time.
        scale: factor on the logits, usually `D ** -0.5`.
        key_scale, value_scale: `[Hkv]` float32, the positive factor per head that a float8 cache is multiplied with.
        window: without lists only: a query attends to at most so many positions, the last of them its own; at least 1. None:
            to all.
        logsumexp: `[B, Hq, T]` float32, any strides: filled with the natural logarithm of each query's softmax denominator, the
            sum of `exp(logit)` over what it attends to. None: not wanted.
        backend: "auto" (see `ops/README.md`), "reference", "triton" or "cuda". No silent fall-back.

    Returns:
        `[B, T, Hq, D]` in the dtype of `queries`; computed in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, only one of `indices` and `counts` None, a block or window below 1,
            a window with lists, or a backend that cannot run the call; the reference, and with `OUTRIDER_DEBUG=1` every
            backend, also checks the values of `lengths`, `counts` and `indices` (debug mode: that lists ascend, too).

    Source: sparse prefill with the draft's attention scores, as in SpecPrefill (arXiv 2502.02789), with lists per block and KV
    head in place of one list for the prompt; block-wise lists as in MInference (arXiv 2407.02490), of tokens.
    """
    sizes: dict[str, int] = {}
    check_tensor("queries", queries, shape="B T Hq D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=queries.device)
    check("keys", keys, shape="B N Hkv D", dtypes=[queries.dtype, FP8])
    check("values", values, shape="B N Hkv D", dtypes=[keys.dtype])
    check_head_dim("keys", keys)
    check_head_dim("values", values)
    check_scale("key_scale", key_scale, keys, sizes)
    check_scale("value_scale", value_scale, values, sizes)
    check_heads(sizes)
    check_int("block", block, low=1)
    if indices is not None and counts is not None:
        if window is not None:
            raise ValueError(f"window: expected None with token lists, got {window}")
        sizes["NB"] = -(-sizes["T"] // block)
        check("indices", indices, shape="B NB Hs M", dtypes=INTS[:1])
        check("counts", counts, shape="B NB Hs", dtypes=INTS[:1])
        if sizes["Hs"] not in (1, sizes["Hkv"], sizes["Hq"]):
            raise ValueError(f"indices: expected Hs of 1, Hkv={sizes['Hkv']} or Hq={sizes['Hq']} lists, got Hs={sizes['Hs']}")
        if sizes["M"] > sizes["N"]:
            raise ValueError(f"indices: expected lists of at most N={sizes['N']} tokens, got width M={sizes['M']}")
    elif indices is not counts:
        missing, given = ("indices", "counts") if indices is None else ("counts", "indices")
        raise ValueError(f"{missing}: expected int32 lists with {given}, or None for both (dense), got None for one")
    elif window is not None:
        check_int("window", window, low=1)
    check("lengths", lengths, shape="B", dtypes=INTS)
    if logsumexp is not None:
        check("logsumexp", logsumexp, shape="B Hq T", dtypes=FLOATS[2:3])
    chosen = choose(
        backend,
        queries.device,
        {
            "cuda": lambda: _cuda().obstacle(queries, keys, values, scale, window),
            "triton": lambda: _triton().obstacle(queries, keys, scale),
        },
    )
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, sizes["N"] - sizes["T"])
        if indices is not None and counts is not None:
            check_range("counts", counts, 0, sizes["M"])
            _check_lists(indices, counts, lengths, block)
    run = {"cuda": _cuda, "triton": _triton, "reference": lambda: reference}[chosen]().chunk_attention
    return run(
        queries, keys, values, indices, counts, lengths,
        block=block, scale=scale, key_scale=key_scale, value_scale=value_scale, window=window, logsumexp=logsumexp,
    )  # fmt: skip


def kernel_obstacle(
    queries: Tensor, keys: Tensor, scale: float, *, window: int | None = None, backend: str = "auto"
) -> str | None:
    """Why no kernel of `backend` runs dense `chunk_attention` of such arguments where they are, or None."""
    if not queries.is_cuda:
        return f"tensors are on {queries.device.type}"
    if backend == "cuda":
        return _cuda().obstacle(queries, keys, keys, scale, window)
    return _triton().obstacle(queries, keys, scale)  # which takes what the others take, too


def _cuda():
    from outrider.ops.chunk_attention import cuda

    return cuda


def _triton():
    from outrider.ops.chunk_attention import triton

    return triton


def _check_lists(indices: Tensor, counts: Tensor, lengths: Tensor, block: int) -> None:
    listed = torch.arange(indices.shape[3], device=indices.device) < counts.unsqueeze(-1)
    starts = lengths.view(-1, 1, 1, 1) + block * torch.arange(indices.shape[1], device=indices.device).view(-1, 1, 1)
    if bool((listed & ((indices < 0) | (indices >= starts))).any()):
        raise ValueError("indices: expected listed positions in 0 .. lengths[b] + i * block - 1 for block i")
    if debug() and bool((listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])).any()):
        raise ValueError("indices: expected ascending positions in every list")
