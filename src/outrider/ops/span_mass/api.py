"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

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
from outrider.ops.span_mass import reference

PAGE = 16  # tokens that share bounds


def span_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    block: int,
    span: int,
    scale: float,
    key_scale: Tensor | None = None,
    page: int = PAGE,
    backend: str = "auto",
) -> Tensor:
    """Estimate, from bounds, the mean softmax mass that each head's queries of a block put on the spans before the block.

    Tokens are taken in pages; a page keeps the smallest and the largest value of every channel of its keys. So no logit of a
    query with the page is above the sum over channels of the larger product of the two. A query takes its softmax over these
    bounds, of all pages that end before its block; a span gets what its pages get. A bound misses no token that stands out,
    whatever stands beside it.

    Args:
        queries: `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; position encoding applied. Block i holds the queries
            `i * block .. min((i + 1) * block, T) - 1`, the first of them at position `lengths[b] + i * block`.
        keys: `[B, N, Hkv, D]`; dtype of `queries`, or float8_e4m3fn. Any strides, head dim contiguous. Query head h uses KV
            head `h // (Hq // Hkv)`. Of pages that do not end before the last block nothing is used.
        lengths: `[B]`, int32 or int64, tokens cached before the chunk, `0 <= lengths[b] <= N - T`.
        block: queries of a block, at least 1; the last block has what is left. NB is `ceil(T / block)`.
        span: tokens whose masses are added up, a multiple of the page. NS is `ceil(N / span)`.
        scale: factor on the logits, usually `D ** -0.5`; not negative.
        key_scale: `[Hkv]` float32, the positive factor per head that float8 keys are multiplied with.
        page: tokens that share bounds, a power of 2.
        backend: "auto" (see `ops/README.md`), "reference" or "triton". No silent fall-back.

    Returns:
        `[B, NB, Hq, NS]` float32 (float64 for float64 queries). A block's row sums to 1, or is 0 where no
        page ends before the block; exactly 0 for spans that begin at or past the last such page.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, a block below 1, a page that is no power of 2, a span that is no
            multiple of it, a negative scale, or a backend that cannot run the call; the reference, and with
            `OUTRIDER_DEBUG=1` every backend, also checks the values of `lengths`.

    Source: the bounds of Quest (arXiv 2406.10774), for blocks of a prompt, with softmax in place of a ranking.
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
    check_int("page", page, low=1)
    check_int("span", span, low=1)
    if page & (page - 1):
        raise ValueError(f"page: expected a power of 2, got {page}")
    if span % page:
        raise ValueError(f"span: expected a multiple of page={page}, got {span}")
    if scale < 0:
        raise ValueError(f"scale: expected at least 0, got {scale}")
    chosen = choose(backend, queries.device, {"triton": lambda: _triton().obstacle(queries, keys, page, span)})
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, sizes["N"] - sizes["T"])
    run = {"triton": _triton, "reference": lambda: reference}[chosen]().span_mass
    return run(queries, keys, lengths, block=block, span=span, scale=scale, key_scale=key_scale, page=page)


def _triton():
    from outrider.ops.span_mass import triton

    return triton
