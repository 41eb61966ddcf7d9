"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from outrider.ops.attention_mass import reference
from outrider.ops.checks import FLOATS, INTS, check_choice, check_heads, check_tensor

REDUCTIONS = ("mean", "max", "none")
BACKENDS = ("auto", "reference")


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    reduce: str = "mean",
    page_table: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax mass that each head's queries put on every cached key.

    Sequence b has `lengths[b]` cached tokens (the past); the keys of its T query tokens already lie behind them, at
    positions `lengths[b] .. lengths[b] + T - 1` (the tail). Query t takes its softmax over the past and over the tail up to
    and including itself; the op returns the mass on the past. Tail keys count in the denominator only, so the masses of a
    query sum to at most 1.

    Args:
        queries: `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; position encoding applied.
        keys: `[B, N, Hkv, D]`, or with a page table `[pages, page_size, Hkv, D]`; dtype of `queries`. Any strides, head dim
            contiguous. Query head h uses KV head `h // (Hq // Hkv)`. Rows at and past `lengths[b] + T` are never read.
        lengths: `[B]`, int32 or int64, number of cached tokens, `0 <= lengths[b] <= N - T`.
        scale: factor on the logits, usually `D ** -0.5`.
        reduce: over the T queries: "mean", "max" or "none".
        page_table: `[B, P]` int32; token i of sequence b lies in page `page_table[b, i // page_size]`, slot
            `i % page_size`, and N is `P * page_size`. Entries past the page of the last tail token may hold anything.
        backend: "auto" picks by device (today always the reference), or "reference". No silent fall-back.

    Returns:
        `[B, Hq, N]` ("none": `[B, T, Hq, N]`), float32, or float64 for float64 inputs; exactly 0 at and past `lengths[b]`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, `reduce` or `backend`; the reference also checks the values of `lengths`.

    Source: the draft-side importance score of STS (arXiv 2605.15508) and SpecAttn (arXiv 2510.27641).
    """
    sizes: dict[str, int] = {}
    check_tensor("queries", queries, shape="B T Hq D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=queries.device)
    check("keys", keys, shape="B N Hkv D" if page_table is None else "pages page_size Hkv D", dtypes=[queries.dtype])
    check("lengths", lengths, shape="B", dtypes=INTS)
    if page_table is not None:
        check("page_table", page_table, shape="B P", dtypes=INTS[:1])
    check_heads(sizes)
    check_choice("reduce", reduce, REDUCTIONS)
    check_choice("backend", backend, BACKENDS)
    return reference.attention_mass(queries, keys, lengths, scale=scale, reduce=reduce, page_table=page_table)
