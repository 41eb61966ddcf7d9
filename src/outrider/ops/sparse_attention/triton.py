"""Sparse attention in Triton: two launches, and nothing of the cache is read but the listed rows and the tail.

    _attend    grid (splits, heads that own a list, B). The queries of a program's group, T x group, are the rows of one tile.
               The program walks its share of the list: a tile of positions, their rows of keys and values gathered straight
               from the cache (from its pages), one online softmax in base 2. The last split adds the tail. It leaves its share
               of the output, not normalised, its largest logit and the sum of the weights 2 ** (logit - largest).
    _combine   grid (T x Hq x B). Adds up the shares of a row and divides by their sum. Not launched when there is one split.

Without lists (dense) a program walks positions instead, those from the start of the first query's window to the length, or the
first ones where there are counts alone.

A list is cut by its count, read on the device, so a short list in a wide row still spreads over all splits, and so does a short
sequence in a wide cache. The host looks at shapes alone: every call can be captured in a CUDA graph and replayed with other
lists, counts, lengths and pages.

Slots behind the count load nothing. A tail row holding NaN or infinity does not reach the queries before it; those from it on
get NaN.

Logits and sums are fp32, and fp64 for fp32 queries: a chain of D additions, or a logit of 16, is off by some 1e-6 in fp32, and
so is its exponential.
"""

from __future__ import annotations

import contextlib
import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from outrider.ops.backends import attention_obstacle

MAX_QUERIES = 16  # tokens of the tail, which is one tile
MAX_ROWS = 64  # T x group rows a program holds; more go to further programs, which read the cache again
PROGRAMS_PER_SM = 2
MIN_SHARE = 32  # listed tokens for which another split pays
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _mixed(out, unlisted_values, unlisted_shares, sequence, query_head, kv_head, query_heads, dim, D: tl.constexpr):
    """Outputs of query heads, one or a column of them, by dims; with what stands for unlisted tokens, if anything does."""
    if unlisted_values is not None:
        share = tl.load(unlisted_shares + sequence * query_heads + query_head, mask=query_head < query_heads, other=0.0)
        value = tl.load(unlisted_values + kv_head * D + dim, mask=dim < D, other=0.0)
        out = (1 - share) * out + share * value
    return out


@triton.jit
def _locate(position, wanted, sequence, page_table, table_stride, page_size):
    """First two cache coordinates of the positions: sequence and token, or page and slot."""
    if page_table is None:
        return sequence, position.to(tl.int64)
    else:
        page = tl.load(page_table + sequence * table_stride + position // page_size, mask=wanted, other=0)
        return page.to(tl.int64), (position % page_size).to(tl.int64)


# Values of these would be compiled in, for 1 and for multiples of 16: a kernel per batch size and budget, and no faster
@triton.jit(do_not_specialize=["window", "T", "group", "heads_per_kv", "row_tiles", "splits", "page_size", "table_stride"])
def _attend(
    queries,
    keys,
    values,
    indices,  # None: dense, or the first tokens
    counts,  # None: dense
    lengths,
    window,  # None, or in the dense form the tokens a query sees, itself among them
    key_scale,
    value_scale,
    page_table,
    unlisted_values,  # [Hkv, D], or None
    unlisted_shares,  # [B, Hq]; both for one split, else `_combine` has them
    logsumexp,  # [B, Hq, T] for one split, or None
    shares,  # [B, T, Hq, splits, D], or the result when there is one split
    share_bests,  # [B, T, Hq, splits]: largest logit, -inf for no tokens; None when there is one split
    share_sums,  # [B, T, Hq, splits]: sum of weights
    scale,
    T,
    group,
    heads_per_kv,
    row_tiles,
    splits,
    page_size,
    table_stride,
    query_strides,
    key_strides,
    value_strides,
    index_strides,
    count_strides,
    logsumexp_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if queries.dtype.element_ty == tl.float32 else tl.float32  # logits and sums
    # of products; the interpreter takes bfloat16 in them for integers
    operand: tl.constexpr = wide if INTERPRETED or wide == tl.float64 else queries.dtype.element_ty
    split = tl.program_id(0)
    head = tl.program_id(1) // row_tiles
    sequence = tl.program_id(2).to(tl.int64)
    kv_head = (head // heads_per_kv).to(tl.int64)

    row = tl.program_id(1) % row_tiles * ROWS + tl.arange(0, ROWS)
    step, query_head = row // group, head * group + row % group
    dim = tl.arange(0, D_PADDED)
    asked = (row < T * group)[:, None] & (dim < D)[None, :]
    at = sequence * query_strides[0] + step.to(tl.int64) * query_strides[1] + query_head.to(tl.int64) * query_strides[2]
    q = tl.load(queries + at[:, None] + dim[None, :] * query_strides[3], mask=asked, other=0.0)  # [ROWS, D]
    if key_scale is not None:
        scale *= tl.load(key_scale + kv_head)
    scale = tl.cast(scale, wide) * LOG2_E
    keys += kv_head * key_strides[2] + dim[None, :]
    values += kv_head * value_strides[2] + dim[None, :]

    skipped = 0
    if counts is None:
        length = tl.load(lengths + sequence).to(tl.int32)
        if window is not None:
            skipped = tl.maximum(length - window + 1, 0)  # tokens before the first query's window
        count = length - skipped
    else:
        count = tl.load(counts + sequence * count_strides[0] + head * count_strides[1])
    if indices is not None:
        indices += sequence * index_strides[0] + head.to(tl.int64) * index_strides[1]
    share = tl.cdiv(tl.cdiv(count, splits), 16) * 16
    first, last = split * share, tl.minimum(split * share + share, count)

    best = tl.full([ROWS], -float("inf"), wide)  # largest logit so far
    total = tl.zeros([ROWS], wide)  # sum of weights 2 ** (logit - best)
    out = tl.zeros([ROWS, D_PADDED], wide)
    for start in range(first, last, TILE):
        slot = start + tl.arange(0, TILE)
        listed = slot < last
        position = skipped + slot if indices is None else tl.load(indices + slot, mask=listed, other=0)
        outer, inner = _locate(position, listed, sequence, page_table, table_stride, page_size)
        loaded = listed[:, None] & (dim < D)[None, :]
        k = tl.load(keys + (outer * key_strides[0] + inner * key_strides[1])[:, None], mask=loaded, other=0.0)
        v = tl.load(values + (outer * value_strides[0] + inner * value_strides[1])[:, None], mask=loaded, other=0.0)

        logits = tl.dot(q.to(operand), k.to(operand).T, input_precision="ieee") * scale  # [ROWS, TILE]
        visible = listed[None, :]
        if window is not None:
            visible &= position[None, :] > (length + step - window)[:, None]
        logits = tl.where(visible, logits, -float("inf"))
        best_now = tl.maximum(best, tl.max(logits, 1))
        base = best_now
        if window is not None:  # a later query may see none of the tile
            base = tl.where(best_now == -float("inf"), 0.0, best_now)
        weights = tl.exp2(logits - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(weights, 1)
        out = tl.dot(weights.to(operand), v.to(operand), out * fade[:, None], input_precision="ieee", out_dtype=wide)
        best = best_now

    if split == splits - 1:
        behind = tl.arange(0, TAIL)
        there = behind < T
        position = tl.load(lengths + sequence).to(tl.int32) + behind
        outer, inner = _locate(position, there, sequence, page_table, table_stride, page_size)
        loaded = there[:, None] & (dim < D)[None, :]
        k = tl.load(keys + (outer * key_strides[0] + inner * key_strides[1])[:, None], mask=loaded, other=0.0)
        v = tl.load(values + (outer * value_strides[0] + inner * value_strides[1])[:, None], mask=loaded, other=0.0)
        k, v = k.to(operand), v.to(operand)

        visible = (behind[None, :] <= step[:, None]) & there[None, :]  # [ROWS, TAIL]
        if window is not None:
            visible &= behind[None, :] > (step - window)[:, None]
        logits = tl.where(visible, tl.dot(q.to(operand), k.T, input_precision="ieee") * scale, -float("inf"))
        best_now = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp2(logits - best_now[:, None])
        fade = tl.exp2(best - best_now)
        total = total * fade + tl.sum(weights, 1)
        # 0 * NaN is NaN: values that are not finite are left out of the product and marked where their row is visible
        finite = tl.abs(v.to(tl.float32)) < float("inf")
        out = tl.dot(weights.to(operand), tl.where(finite, v, 0.0), out * fade[:, None], input_precision="ieee", out_dtype=wide)
        spoilt = tl.dot(visible.to(tl.float16), (~finite).to(tl.float16)) > 0
        out = tl.where(spoilt, float("nan"), out)
        best = best_now

    if share_bests is None:
        out = out / total[:, None]
    if value_scale is not None:
        out *= tl.load(value_scale + kv_head)
    query_heads = tl.num_programs(1) // row_tiles * group
    column = query_head[:, None]
    out = _mixed(out, unlisted_values, unlisted_shares, sequence, column, kv_head, query_heads, dim[None, :], D)
    slot = ((sequence * T + step) * query_heads + query_head) * splits + split
    some = total != 0  # false for a share without tokens: its output is never read
    tl.store(shares + slot[:, None] * D + dim[None, :], out, mask=asked & some[:, None])
    if share_bests is not None:
        tl.store(share_bests + slot, best, mask=row < T * group)
        tl.store(share_sums + slot, total, mask=row < T * group)
    if logsumexp is not None:
        at = sequence * logsumexp_strides[0] + query_head * logsumexp_strides[1] + step * logsumexp_strides[2]
        tl.store(logsumexp + at, (best + tl.log2(total)) * LN_2, mask=row < T * group)


@triton.jit(do_not_specialize=["splits", "T", "query_heads", "group"])
def _combine(
    shares,  # [rows, splits, D]
    share_bests,  # [rows, splits]
    share_sums,  # [rows, splits]
    unlisted_values,
    unlisted_shares,
    logsumexp,  # [B, Hq, T], or None
    result,  # [rows, D]
    splits,
    T,
    query_heads,
    group,  # query heads of a KV head
    logsumexp_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PADDED)
    bests = tl.load(share_bests + row * splits + split, mask=split < splits, other=-float("inf"))
    sums = tl.load(share_sums + row * splits + split, mask=split < splits, other=0.0)
    best = tl.max(bests, 0)  # finite: the last share holds the tail
    total = tl.sum(sums * tl.exp2(bests - best), 0)

    dim = tl.arange(0, D_PADDED)
    out = tl.zeros([D_PADDED], shares.dtype.element_ty)
    for start in range(0, splits, TILE):
        part = start + tl.arange(0, TILE)
        weight = tl.exp2(tl.load(share_bests + row * splits + part, mask=part < splits, other=-float("inf")) - best)
        some = (weight != 0)[:, None] & (dim < D)[None, :]
        share = tl.load(shares + (row * splits + part)[:, None] * D + dim[None, :], mask=some, other=0.0)
        out += tl.sum(share * weight[:, None], 0)
    head = row % query_heads
    if logsumexp is not None:
        step, sequence = row // query_heads % T, row // query_heads // T
        at = sequence * logsumexp_strides[0] + head * logsumexp_strides[1] + step * logsumexp_strides[2]
        tl.store(logsumexp + at, (best + tl.log2(total)) * LN_2)
    out = _mixed(
        out / total, unlisted_values, unlisted_shares, row // (T * query_heads), head, head // group, query_heads, dim, D
    )
    tl.store(result + row * D + dim, out, mask=dim < D)


def obstacle(queries: Tensor, keys: Tensor) -> str | None:
    """Why these arguments cannot be run, None if they can."""
    return attention_obstacle(queries, keys, MAX_QUERIES)


def sparse_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    lengths: Tensor,
    *,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    page_table: Tensor | None,
    window: int | None = None,
    unlisted_values: Tensor | None = None,
    unlisted_shares: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    slots = keys.shape[1] * (1 if page_table is None else page_table.shape[1])
    window = None if window is None else min(window, slots)
    Hs = 1 if counts is None else counts.shape[1]
    M = (window or slots) if indices is None else indices.shape[2]  # as many tokens as there may be to walk
    heads = max(Hs, Hkv)  # a list shared by all heads is walked once per KV head
    group = Hq // heads
    D_padded, rows, tile, warps, stages = _tiles(D, T * group, queries.dtype, (indices is not None) + (page_table is not None))
    row_tiles = triton.cdiv(T * group, rows)
    room = PROGRAMS_PER_SM * _processors(queries.device) // (B * heads * row_tiles)
    splits = max(1, min(room, triton.cdiv(M, MIN_SHARE)))

    indices = None if indices is None else _rows(indices).expand(B, heads, M)
    counts = None if counts is None else counts.expand(B, heads)
    page_table = None if page_table is None else _rows(page_table)
    result = queries.new_empty(B, T, Hq, D)
    alone = splits == 1
    wide = torch.float64 if queries.dtype == torch.float32 else torch.float32
    shares = result if alone else torch.empty(B, T, Hq, splits, D, dtype=wide, device=queries.device)
    bests, sums = (None if alone else torch.empty(B, T, Hq, splits, dtype=wide, device=queries.device) for _ in range(2))
    unlisted: tuple[Tensor | None, Tensor | None] = None, None
    if unlisted_values is not None and unlisted_shares is not None:
        unlisted = unlisted_values.contiguous(), unlisted_shares.contiguous()
    log_strides = (0, 0, 0) if logsumexp is None else logsumexp.stride()
    with _current(queries.device):
        _attend[splits, heads * row_tiles, B](
            queries, keys, values, indices, counts, lengths.contiguous(), window,
            None if key_scale is None else key_scale.contiguous(),
            None if value_scale is None else value_scale.contiguous(),
            page_table, *(unlisted if alone else (None, None)), logsumexp if alone else None, shares, bests, sums,
            scale, T, group, heads // Hkv, row_tiles, splits,
            keys.shape[1], 0 if page_table is None else page_table.stride(0),
            queries.stride(), keys.stride()[:3], values.stride()[:3],
            (0, 0) if indices is None else indices.stride()[:2], (0, 0) if counts is None else counts.stride(),
            log_strides, D=D, D_PADDED=D_padded, ROWS=rows, TILE=tile, TAIL=MAX_QUERIES, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if not alone:
            padded = triton.next_power_of_2(splits)
            _combine[B * T * Hq,](
                shares, bests, sums, *unlisted, logsumexp, result, splits, T, Hq, Hq // Hkv, log_strides,
                D=D, D_PADDED=D_padded, SPLITS_PADDED=padded, TILE=min(padded, 8192 // D_padded),
            )  # fmt: skip
    return result


def _tiles(D: int, rows: int, queries: torch.dtype, lookups: int) -> tuple[int, int, int, int, int]:
    """Padded head dim, rows and tokens of a tile, warps, stages. `lookups`: what is loaded to find a row, a position or a page.

    Two programs to an SM: registers bound the tile, and three tiles of keys and values (16 KB each in 16 bits) are on their way
    in each. Positions, pages and rows are loaded one after the other; each step takes its stages. Where nothing is looked up,
    rows lie side by side and a tile has twice as many.
    """
    D_padded = max(16, triton.next_power_of_2(D))
    wide = D_padded == 256
    stages = 1 + (2 if wide else 3) * (1 + lookups)
    if queries == torch.float32:  # in fp64, where products may be unrolled (few GPUs have the tensor cores): tiles stay small
        return D_padded, 16, 16, 8 if wide else 4, stages
    rows = min(max(16, triton.next_power_of_2(rows)), MAX_ROWS // 2 if wide else MAX_ROWS)
    return D_padded, rows, 64 if D_padded <= 64 or not (lookups or wide) else 32, 8 if wide else 4, stages


def _rows(x: Tensor) -> Tensor:
    """`x`, copied only if neighbours of a row are not neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a number that makes a few splits in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
