"""Span mass in Triton: two kernels; neither bounds of logits nor masses of pages are ever in memory.

    _bound_pages   grid (pages, KV heads, B). Smallest and largest value of every channel of a page's keys.
    _add_masses    grid (tiles of a block's queries x blocks, query heads, B). Walks twice over the pages before the block: for
                   the softmax's maximum and sum, then for masses, which it adds up over the queries of its tile and the pages
                   of a span, and stores by tile.

Queries are split by sign: the bound is a product of what is positive with the largest values, and one of what is negative with
the smallest. In the first walk queries are the rows of the products, in the second pages are, so that a thread adds up within
its own registers.

Bounds and sums are fp32, and fp64 for fp32 queries. Lengths are read on the device; the host looks at shapes alone.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from outrider.ops.backends import attention_obstacle

TILES = {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (64, 32, 4, 2)}  # by head dim: queries, pages, warps, stages
WIDE_TILES = (16, 32, 4, 2)  # in fp64, which few GPUs are fast in
LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e30)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["T", "block", "P"])
def _bound_pages(
    keys,
    lengths,
    low,  # [B, Hkv, P, D]
    high,
    T,
    block,
    P,
    key_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
):
    page, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    last = tl.load(lengths + sequence) + (T - 1) // block * block  # where the last block starts
    if page < last // PAGE:
        token = page.to(tl.int64) * PAGE + tl.arange(0, PAGE)
        dim = tl.arange(0, D_PADDED)
        at = keys + sequence * key_strides[0] + head * key_strides[2] + token[:, None] * key_strides[1] + dim[None, :]
        k = tl.load(at, mask=(dim < D)[None, :], other=0.0).to(tl.float32)
        at = ((sequence * tl.num_programs(1) + head) * P + page) * D + dim
        tl.store(low + at, tl.min(k, 0).to(low.dtype.element_ty), mask=dim < D)
        tl.store(high + at, tl.max(k, 0).to(high.dtype.element_ty), mask=dim < D)


@triton.jit
def _load_bounds(low, high, page, pages, D: tl.constexpr, D_PADDED: tl.constexpr, operand: tl.constexpr):
    """[PAGES, D_PADDED] each: what pages are bounded by; zeros behind the last one."""
    dim = tl.arange(0, D_PADDED)
    at = page.to(tl.int64)[:, None] * D + dim[None, :]
    there = (page < pages)[:, None] & (dim < D)[None, :]
    return tl.load(low + at, mask=there, other=0.0).to(operand), tl.load(high + at, mask=there, other=0.0).to(operand)


@triton.jit(do_not_specialize=["T", "block", "P", "NS", "tiles", "group"])
def _add_masses(
    queries,
    low,
    high,
    lengths,
    key_scale,
    result,  # [B, NB, tiles, Hq, NS], zeros
    scale,
    T,
    block,
    P,
    NS,
    tiles,
    group,
    query_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    PER_SPAN: tl.constexpr,  # pages
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,  # of a tile; a multiple of PER_SPAN, or a part of it
):
    wide: tl.constexpr = tl.float64 if queries.dtype.element_ty == tl.float32 else tl.float32
    narrow: tl.constexpr = tl.float32 if INTERPRETED else queries.dtype.element_ty  # it takes bfloat16 for integers
    operand: tl.constexpr = tl.float64 if wide == tl.float64 else narrow
    index = tl.num_programs(0) - 1 - tl.program_id(0)  # the last block, with the most pages, first
    here, tile = index // tiles, index % tiles
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // group
    pages = (tl.load(lengths + sequence).to(tl.int32) + here * block) // PAGE  # that end before the block
    size = tl.minimum(T - here * block, block)
    step = tile * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D_PADDED)
    at = sequence * query_strides[0] + (here * block + step).to(tl.int64)[:, None] * query_strides[1]
    at += tl.cast(head, tl.int64) * query_strides[2] + dim[None, :] * query_strides[3]
    q = tl.load(queries + at, mask=(step < size)[:, None] & (dim < D)[None, :], other=0.0)
    positive, negative = tl.maximum(q, 0.0).to(operand), tl.minimum(q, 0.0).to(operand)
    factor = tl.cast(scale, wide) * LOG2_E
    if key_scale is not None:
        factor *= tl.load(key_scale + kv_head)
    of_head = (sequence * (tl.num_programs(1) // group) + kv_head) * P * D
    low += of_head
    high += of_head

    best, total = tl.full([ROWS], LOWEST, wide), tl.zeros([ROWS], wide)
    for start in range(0, pages, PAGES):
        page = start + tl.arange(0, PAGES)
        least, most = _load_bounds(low, high, page, pages, D, D_PADDED, operand)
        bound = tl.dot(positive, most.T, input_precision="ieee", out_dtype=wide)
        bound = tl.dot(negative, least.T, bound, input_precision="ieee", out_dtype=wide) * factor
        bound = tl.where((page < pages)[None, :], bound, LOWEST)
        best_now = tl.maximum(best, tl.max(bound, 1))
        total = total * tl.exp2(best - best_now) + tl.sum(tl.exp2(bound - best_now[:, None]), 1)
        best = best_now
    # a query behind the block's end has no share
    offset = tl.where(step < size, best + tl.log2(total) + tl.log2(size.to(wide)), float("inf"))

    result += (((sequence * (tl.num_programs(0) // tiles) + here) * tiles + tile) * tl.num_programs(1) + head) * NS
    rest = tl.sum(tl.zeros([ROWS], wide), 0)  # of a span that is wider than a tile
    for start in range(0, pages, PAGES):
        page = start + tl.arange(0, PAGES)
        least, most = _load_bounds(low, high, page, pages, D, D_PADDED, operand)
        bound = tl.dot(most, positive.T, input_precision="ieee", out_dtype=wide)
        bound = tl.dot(least, negative.T, bound, input_precision="ieee", out_dtype=wide) * factor
        mass = tl.sum(tl.exp2(bound - offset[None, :]), 1)  # [PAGES]
        mass = tl.where(page < pages, mass, 0.0)
        if PAGES >= PER_SPAN:
            span = start // PER_SPAN + tl.arange(0, PAGES // PER_SPAN)
            added = tl.sum(tl.reshape(mass, [PAGES // PER_SPAN, PER_SPAN]), 1)
            tl.store(result + span, added.to(result.dtype.element_ty), mask=span * PER_SPAN < pages)
        else:  # tiles of the same span follow each other
            rest += tl.sum(mass, 0)
            tl.store(result + start // PER_SPAN, rest.to(result.dtype.element_ty))
            rest = tl.where((start + PAGES) % PER_SPAN == 0, 0.0, rest).to(wide)


def obstacle(queries: Tensor, keys: Tensor, page: int, span: int) -> str | None:
    """Why these arguments cannot be run, None if they can."""
    if (span // page) & (span // page - 1):
        return f"spans of {span // page} pages; the kernel takes powers of 2"
    return attention_obstacle(queries, keys)


def span_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    block: int,
    span: int,
    scale: float,
    key_scale: Tensor | None,
    page: int,
) -> Tensor:
    B, T, Hq, D = queries.shape
    N, Hkv = keys.shape[1:3]
    block = min(block, T)
    NB, NS, P = triton.cdiv(T, block), triton.cdiv(N, span), N // page
    full, device = queries.dtype == torch.float32, queries.device
    if not B or not P:
        return torch.zeros(B, NB, Hq, NS, dtype=torch.float32, device=device)
    lengths = lengths.contiguous()
    D_padded = max(16, triton.next_power_of_2(D))
    rows, pages, warps, stages = WIDE_TILES if full else TILES[max(64, D_padded)]
    rows = min(rows, max(16, triton.next_power_of_2(block)))
    tiles = triton.cdiv(block, rows)
    low, high = (torch.empty(B, Hkv, P, D, dtype=queries.dtype, device=device) for _ in range(2))
    result = torch.zeros(B, NB, tiles, Hq, NS, dtype=torch.float32, device=device)
    with torch.cuda.device(device) if queries.is_cuda else contextlib.nullcontext():
        _bound_pages[P, Hkv, B](
            keys, lengths, low, high, T, block, P, keys.stride()[:3], D=D, D_PADDED=D_padded, PAGE=page, num_warps=1,
        )  # fmt: skip
        _add_masses[tiles * NB, Hq, B](
            queries, low, high, lengths, None if key_scale is None else key_scale.contiguous(), result,
            scale, T, block, P, NS, tiles, Hq // Hkv, queries.stride(),
            D=D, D_PADDED=D_padded, PAGE=page, PER_SPAN=span // page, ROWS=rows, PAGES=pages,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return result[:, :, 0] if tiles == 1 else result.sum(2)
