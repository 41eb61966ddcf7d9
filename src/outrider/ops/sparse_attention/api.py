"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from outrider.ops.checks import FLOATS, INTS, check_choice, check_heads, check_tensor
from outrider.ops.sparse_attention import reference

BACKENDS = ("auto", "reference")


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    page_table: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Grouped-query attention of T queries over listed cached tokens and the causal tail.

    Sequence b has `lengths[b]` cached tokens (the past); keys and values of its T query tokens already lie behind them, at
    positions `lengths[b] .. lengths[b] + T - 1` (the tail). Query t attends to the tokens of its list and to the tail up to
    and including itself:

        past (listed only)   tail
        t=0   x . . x x .    x . .
        t=1   x . . x x .    x x .
        t=2   x . . x x .    x x x

    With every past token listed this is dense causal attention. Rows that a query does not attend to change nothing, be
    they NaN: unlisted rows and rows behind the tail are not read at all.

    Args:
        queries: `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; position encoding applied.
        keys, values: `[B, N, Hkv, D]`, or with a page table `[pages, page_size, Hkv, D]`; dtype of `queries`. Any strides,
            head dim contiguous. Query head h uses KV head `h // (Hq // Hkv)`.
        indices: `[B, Hs, M]` int32, distinct positions below `lengths[b]`; entries at and past the count are ignored.
            Hs is 1 (one list for all heads), Hkv (one per KV head) or Hq (one per query head).
        counts: `[B, Hs]` int32, `0 <= counts <= M`; an empty list leaves the tail alone.
        lengths: `[B]`, int32 or int64, number of cached tokens, `0 <= lengths[b] <= N - T`.
        scale: factor on the logits, usually `D ** -0.5`.
        page_table: `[B, P]` int32; token i of sequence b lies in page `page_table[b, i // page_size]`, slot
            `i % page_size`, and N is `P * page_size`. Entries past the page of the last tail token may hold anything.
        backend: "auto" picks by device (today always the reference), or "reference". No silent fall-back.

    Returns:
        `[B, T, Hq, D]` in the dtype of `queries`; computed in float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or `backend`; the reference also checks the values of `lengths`, `counts` and
            `indices`.

    Source: sparse verification of STS (arXiv 2605.15508) and SpecAttn (arXiv 2510.27641), with lists per KV head.
    """
    sizes: dict[str, int] = {}
    layout = "B N Hkv D" if page_table is None else "pages page_size Hkv D"
    check_tensor("queries", queries, shape="B T Hq D", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=queries.device)
    check("keys", keys, shape=layout, dtypes=[queries.dtype])
    check("values", values, shape=layout, dtypes=[queries.dtype])
    check("indices", indices, shape="B Hs M", dtypes=INTS[:1])
    check("counts", counts, shape="B Hs", dtypes=INTS[:1])
    check("lengths", lengths, shape="B", dtypes=INTS)
    if page_table is not None:
        check("page_table", page_table, shape="B P", dtypes=INTS[:1])
    check_heads(sizes)
    if sizes["Hs"] not in (1, sizes["Hkv"], sizes["Hq"]):
        raise ValueError(f"indices: expected Hs of 1, Hkv={sizes['Hkv']} or Hq={sizes['Hq']} lists, got Hs={sizes['Hs']}")
    check_choice("backend", backend, BACKENDS)
    return reference.sparse_attention(queries, keys, values, indices, counts, lengths, scale=scale, page_table=page_table)
