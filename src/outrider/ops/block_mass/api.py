"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from outrider.ops.backends import choose, debug
from outrider.ops.block_mass import reference
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

OUTPUTS = (torch.bfloat16, torch.float32, torch.float64)


def block_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    block: int,
    scale: float,
    heads: Tensor | None = None,
    logsumexp: Tensor | None = None,
    listed: Tensor | None = None,
    span: int = 128,
    key_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean softmax mass that each head's queries of a block put on every token before the block.

    Sequence b has `lengths[b]` cached tokens; the keys of the T query tokens, a chunk of a prompt, already lie behind them, at
    positions `lengths[b] .. lengths[b] + T - 1`. Block i holds the queries `i * block .. min((i + 1) * block, T) - 1` and
    starts at position `lengths[b] + i * block`. Query t takes its softmax over all tokens up to and including itself; the op
    returns the mass on the tokens before its block, among them those of the chunk's earlier blocks:

        T = 4, block = 2     past     chunk
        block 0   t=0        m m m    s . . .        m: in the mean
                  t=1        m m m    s s . .        s: in the denominator only
        block 1   t=2        m m m    m m s .
                  t=3        m m m    m m s s

    Args:
        queries: `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; position encoding applied.
        keys: `[B, N, Hkv, D]`; dtype of `queries`, or float8_e4m3fn. Any strides, head dim contiguous. Query head h uses KV
            head `h // (Hq // Hkv)`. Rows at and past `lengths[b] + T` are never read.
        lengths: `[B]`, int32 or int64, tokens cached before the chunk, `0 <= lengths[b] <= N - T`.
        block: queries of a block, at least 1; the last block has what is left. NB is `ceil(T / block)`.
        scale: factor on the logits, usually `D ** -0.5`.
        heads: `[R]` int64, ascending: the query heads whose masses are wanted, one row of the result each. None: all. Others
            cost nothing.
        logsumexp: `[B, Hq, T]` float32: the natural logarithm of each query's softmax denominator over all tokens it sees, as
            attention computes it; rows of heads that are not asked for may hold anything. None: it is computed here, in a
            pass of its own.
        listed: `[B, NB, Hs, NS]` bool: whether a block reads the tokens `s * span .. (s + 1) * span - 1`. Others have mass 0,
            and their keys may hold anything. Hs is 1 or Hkv, NS is `ceil(N / span)`. None: it reads all. Needs the logsumexp,
            over what is listed.
        span: tokens that are listed together, at least 1.
        key_scale: `[Hkv]` float32, the factor per head that float8 keys are multiplied with.
        dtype: of the result: float32 (default; float64 for float64 queries) or bfloat16.
        out: where the result goes, of its shape and dtype; any strides, N contiguous. Every element is written.
        backend: "auto" (see `ops/README.md`), "reference" or "triton". No silent fall-back.

    Returns:
        `[B, NB, R, N]`; exactly 0 at and past the block's start, `lengths[b] + i * block`, and where it is not listed. It is
        `out`, if given.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, a block or span below 1, `listed` without a logsumexp, or a backend
            that cannot run the call; the reference, and with `OUTRIDER_DEBUG=1` every backend, also checks the values of
            `lengths` and `heads`.

    Source: the draft-side importance score of STS (arXiv 2605.15508) and SpecAttn (arXiv 2510.27641), for blocks of a prompt.
    """
    sizes: dict[str, int] = {}
    check_tensor("queries", queries, shape="B T Hq D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=queries.device)
    check("keys", keys, shape="B N Hkv D", dtypes=[queries.dtype, FP8])
    check_head_dim("keys", keys)
    check_scale("key_scale", key_scale, keys, sizes)
    check("lengths", lengths, shape="B", dtypes=INTS)
    check_heads(sizes)
    check_int("block", block, low=1)
    sizes["NB"], sizes["R"] = -(-sizes["T"] // block), sizes["Hq"]
    if heads is not None:
        del sizes["R"]
        check("heads", heads, shape="R", dtypes=INTS[1:])
    if logsumexp is not None:
        check("logsumexp", logsumexp, shape="B Hq T", dtypes=FLOATS[2:3])
    check_int("span", span, low=1)
    if listed is not None:
        sizes["NS"] = -(-sizes["N"] // span)
        check("listed", listed, shape="B NB Hs NS", dtypes=[torch.bool])
        if sizes["Hs"] not in (1, sizes["Hkv"]):
            raise ValueError(f"listed: expected Hs of 1 or Hkv={sizes['Hkv']}, got Hs={sizes['Hs']}")
        if logsumexp is None:
            raise ValueError("logsumexp: expected [B, Hq, T] with listed tokens, got None")
    if dtype is None:
        dtype = torch.promote_types(queries.dtype, torch.float32)
    elif dtype not in OUTPUTS:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, OUTPUTS))}, got {dtype}")
    if out is not None:
        check("out", out, shape="B NB R N", dtypes=[dtype])
        if out.shape[-1] > 1 and out.stride(-1) != 1:
            raise ValueError(f"out: expected rows without gaps (stride 1), got stride {out.stride(-1)}")
    chosen = choose(backend, queries.device, {"triton": lambda: _triton().obstacle(queries, keys)})
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, sizes["N"] - sizes["T"])
        if heads is not None:
            check_range("heads", heads, 0, sizes["Hq"] - 1)
            if bool((heads.diff() <= 0).any()):
                raise ValueError(f"heads: expected ascending heads, got {heads.tolist()}")
    run = {"triton": _triton, "reference": lambda: reference}[chosen]().block_mass
    return run(
        queries, keys, lengths,
        block=block, scale=scale, heads=heads, logsumexp=logsumexp, listed=listed, span=span, key_scale=key_scale, dtype=dtype,
        out=out,
    )  # fmt: skip


def _triton():
    from outrider.ops.block_mass import triton

    return triton
