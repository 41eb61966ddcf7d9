"""Attention mass in Triton: two launches; each key is read once.

    _score    grid (splits, Hkv, B). The queries of a KV head, T x group, are the rows of one tile. A program walks its share of
              the past, tile by tile: logits in base 2, stored as 2 ** (logit - largest of the tile) in 16 bits, the tile's
              largest logit beside them, and per split the sum of 2 ** (logit - largest). The last split adds the tail.
    _reduce   grid (blocks of tokens, result heads, B). Adds up the splits' sums, turns what is stored into masses, reduces them
              over the queries and adds up the heads of a group. Writes every element of the result, zeros behind the length.

What lies between the launches takes 2 bytes for each query, query head and token, written and read once: less than a second
pass over the keys as long as 2 x T x group < D. A mass is rounded once, relative to its own size.

Logits and sums are fp32, and fp64 for fp32 queries: a chain of D additions, or a logit of 16, is off by some 1e-6 in fp32, and
so is its exponential.

The past is cut by its length, read on the device. The host looks at shapes alone: every call can be captured in a CUDA graph
and replayed with other lengths, queries and pages. Rows at and past `lengths[b] + T` are not read; a tail key that holds NaN
does not reach the queries before it.
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
MAX_ROWS = 128  # T x group rows a program holds; more go to further programs, which read the keys again
PROGRAMS_PER_SM = 2
REDUCE_ELEMENTS = 8192  # queries x tokens of a program of _reduce
REDUCE_SPLITS = (
    512  # queries x splits, at least: enough for all threads, or several would write the same value to the same place
)
HEADROOM = tl.constexpr(14.0)  # a tile's largest value is stored as 2 ** 14: float16 then holds 2 ** -38 of it
LOG2_E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load_keys(keys, position, wanted, dim, D, sequence, page_table, table_stride, page_size, key_strides):
    """`[tokens, D]`: rows of the cache, or of its pages; zeros where not wanted."""
    if page_table is None:
        row = sequence * key_strides[0] + position.to(tl.int64) * key_strides[1]
    else:
        page = tl.load(page_table + sequence * table_stride + position // page_size, mask=wanted, other=0)
        row = page.to(tl.int64) * key_strides[0] + (position % page_size).to(tl.int64) * key_strides[1]
    return tl.load(keys + row[:, None] + dim[None, :], mask=wanted[:, None] & (dim < D)[None, :], other=0.0)


# Values of these would be compiled in, for 1 and for multiples of 16: a kernel per batch size and length, and no faster
@triton.jit(do_not_specialize=["T", "group", "row_tiles", "splits", "tiles", "page_size", "table_stride"])
def _score(
    queries,
    keys,
    lengths,
    key_scale,
    page_table,
    scores,  # [B, Hq, T, tiles * TILE]: 2 ** (logit - base of the tile); tiles behind the length stay unwritten
    bases,  # [B, Hq, T, tiles]: the tile's largest logit - HEADROOM
    split_bests,  # [B, Hq, T, splits]: largest logit (or base), -inf for no logits
    split_sums,  # [B, Hq, T, splits]: sum of 2 ** (logit - best)
    scale,
    T,
    group,
    row_tiles,
    splits,
    tiles,
    page_size,
    table_stride,
    query_strides,
    key_strides,
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
    kv_head = (tl.program_id(1) // row_tiles).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)

    row = tl.program_id(1) % row_tiles * ROWS + tl.arange(0, ROWS)
    asked = row < T * group
    step, query_head = row % T, kv_head * group + row // T
    dim = tl.arange(0, D_PADDED)
    at = sequence * query_strides[0] + step.to(tl.int64) * query_strides[1] + query_head * query_strides[2]
    at = at[:, None] + dim[None, :] * query_strides[3]
    q = tl.load(queries + at, mask=asked[:, None] & (dim < D)[None, :], other=0.0)  # [ROWS, D]
    if key_scale is not None:
        scale *= tl.load(key_scale + kv_head)
    scale = tl.cast(scale, wide) * LOG2_E
    keys += kv_head * key_strides[2]

    length = tl.load(lengths + sequence).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, TILE), splits)
    first, last = split * share, tl.minimum(split * share + share, tl.cdiv(length, TILE))
    query_heads = tl.num_programs(1) // row_tiles * group
    line = (sequence * query_heads + query_head) * T + step

    best = tl.full([ROWS], -float("inf"), wide)
    total = tl.zeros([ROWS], wide)  # sum of 2 ** (logit - best)
    for tile in range(first, last):
        token = tile * TILE + tl.arange(0, TILE)
        past = token < length
        k = _load_keys(keys, token, past, dim, D, sequence, page_table, table_stride, page_size, key_strides)
        logits = tl.dot(q.to(operand), k.to(operand).T, input_precision="ieee") * scale  # [ROWS, TILE]
        logits = tl.where(past[None, :], logits, -float("inf"))
        base = tl.max(logits, 1) - HEADROOM
        powers = tl.exp2(logits - base[:, None])
        tl.store(scores + (line * tiles * TILE)[:, None] + token[None, :], powers, mask=asked[:, None])
        tl.store(bases + line * tiles + tile, base, mask=asked)
        best_now = tl.maximum(best, base)
        total = total * tl.exp2(best - best_now) + tl.sum(powers, 1) * tl.exp2(base - best_now)
        best = best_now

    if split == splits - 1:
        behind = tl.arange(0, TAIL)
        there = behind < T
        k = _load_keys(keys, length + behind, there, dim, D, sequence, page_table, table_stride, page_size, key_strides)
        visible = (behind[None, :] <= step[:, None]) & there[None, :]
        logits = tl.dot(q.to(operand), k.to(operand).T, input_precision="ieee") * scale  # [ROWS, TAIL]
        logits = tl.where(visible, logits, -float("inf"))
        best_now = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - best_now) + tl.sum(tl.exp2(logits - best_now[:, None]), 1)
        best = best_now

    tl.store(split_bests + line * splits + split, best, mask=asked)
    tl.store(split_sums + line * splits + split, total, mask=asked)


@triton.jit(do_not_specialize=["T", "query_heads", "grouped", "splits", "tiles"])
def _reduce(
    scores,
    bases,
    split_bests,
    split_sums,
    lengths,
    heads,  # [R, G], or None: result head r is query head r
    result,
    N,
    T,
    query_heads,
    grouped,  # G
    splits,
    tiles,
    result_strides,  # of B, T, result head
    REDUCTION: tl.constexpr,
    STEPS: tl.constexpr,  # T, padded
    KEPT: tl.constexpr,  # STEPS, or 1 if they are reduced
    SPLITS_PADDED: tl.constexpr,
    TILES: tl.constexpr,  # of a block of tokens
    TILE: tl.constexpr,
):
    result_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence).to(tl.int32)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]  # [TILES, TILE]
    step = tl.arange(0, STEPS)
    split = tl.arange(0, SPLITS_PADDED)
    asked = step < T

    mass = tl.zeros([TILES, KEPT, TILE], tl.float32)
    written = asked[None, :] & (tile * TILE < length)[:, None]  # [TILES, STEPS]; in a written tile, zeros behind the length
    if tl.program_id(0) * TILES * TILE < length:
        for g in range(grouped):
            head = result_head.to(tl.int64)
            if heads is not None:
                head = tl.load(heads + result_head * grouped + g)
            line = (sequence * query_heads + head) * T + step
            part = (line * splits)[:, None] + split[None, :]
            there = asked[:, None] & (split < splits)[None, :]
            bests = tl.load(split_bests + part, mask=there, other=-float("inf"))
            sums = tl.load(split_sums + part, mask=there, other=0.0)
            best = tl.where(asked, tl.max(bests, 1), 0.0)
            total = tl.where(asked, tl.sum(sums * tl.exp2(bests - best[:, None]), 1), 1.0)
            if REDUCTION == "mean":
                total *= T
            base = tl.load(bases + (line * tiles)[None, :] + tile[:, None], mask=written, other=0.0)
            factor = (tl.exp2(base - best[None, :]) / total[None, :]).to(tl.float32)
            at = (line * tiles * TILE)[None, :, None] + token[:, None, :]
            masses = tl.load(scores + at, mask=written[:, :, None], other=0.0).to(tl.float32) * factor[:, :, None]
            if REDUCTION == "mean":
                masses = tl.sum(masses, 1, keep_dims=True)
            elif REDUCTION == "max":
                masses = tl.max(masses, 1, keep_dims=True)
            mass += masses
    step = tl.arange(0, KEPT)
    result += sequence * result_strides[0] + result_head.to(tl.int64) * result_strides[2]
    at = (step.to(tl.int64) * result_strides[1])[None, :, None] + token[:, None, :]
    tl.store(result + at, mass, mask=(step < T)[None, :, None] & (token < N)[:, None, :])


def obstacle(queries: Tensor, keys: Tensor) -> str | None:
    """Why these arguments cannot be run, None if they can."""
    return attention_obstacle(queries, keys, MAX_QUERIES)


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    reduce: str,
    heads: Tensor | None,
    key_scale: Tensor | None,
    page_table: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    group = Hq // Hkv
    N = keys.shape[1] if page_table is None else page_table.shape[1] * keys.shape[1]
    R, G = (Hq, 1) if heads is None else heads.shape
    D_padded, rows, tile, warps, stages = _tiles(D, T * group, queries.dtype, page_table is not None)
    row_tiles = triton.cdiv(T * group, rows)
    tiles = triton.cdiv(N, tile)
    room = PROGRAMS_PER_SM * _processors(queries.device) // (B * Hkv * row_tiles)
    splits = max(1, min(room, tiles))

    if page_table is not None and page_table.stride(-1) != 1:
        page_table = page_table.contiguous()
    lengths = lengths.contiguous()
    if out is None:
        out = torch.empty((B, T, R, N) if reduce == "none" else (B, R, N), dtype=dtype, device=queries.device)
    result = out if reduce == "none" else out.unsqueeze(1)
    scores = torch.empty(B, Hq, T, tiles * tile, dtype=queries.dtype, device=queries.device)
    wide = torch.float64 if queries.dtype == torch.float32 else torch.float32
    bases = torch.empty(B, Hq, T, tiles, dtype=wide, device=queries.device)
    bests, sums = (torch.empty(B, Hq, T, splits, dtype=wide, device=queries.device) for _ in range(2))
    steps = triton.next_power_of_2(T)
    block = max(1, min(tiles, REDUCE_ELEMENTS // (steps * tile)))
    block = triton.next_power_of_2(block)
    with _current(queries.device):
        _score[splits, Hkv * row_tiles, B](
            queries, keys, lengths, None if key_scale is None else key_scale.contiguous(), page_table,
            scores, bases, bests, sums,
            scale, T, group, row_tiles, splits, tiles,
            keys.shape[1], 0 if page_table is None else page_table.stride(0), queries.stride(), keys.stride()[:3],
            D=D, D_PADDED=D_padded, ROWS=rows, TILE=tile, TAIL=MAX_QUERIES, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if R:
            _reduce[triton.cdiv(tiles, block), R, B](
                scores, bases, bests, sums, lengths, None if heads is None else heads.contiguous(), result,
                N, T, Hq, G, splits, tiles, result.stride()[:3],
                REDUCTION=reduce, STEPS=steps, KEPT=steps if reduce == "none" else 1,
                SPLITS_PADDED=max(triton.next_power_of_2(splits), REDUCE_SPLITS // steps), TILES=block, TILE=tile,
            )  # fmt: skip
    return out


def _tiles(D: int, rows: int, queries: torch.dtype, paged: bool) -> tuple[int, int, int, int, int]:
    """Padded head dim, rows and tokens of a tile, warps, stages.

    A tile of 16-bit keys takes 16 KB, and three are on their way in each of two programs to an SM. A row behind a page table is
    loaded in two steps, of which each takes its stages.
    """
    D_padded = max(16, triton.next_power_of_2(D))
    steps = 2 if paged else 1
    if queries == torch.float32:  # in fp64, where products may be unrolled (few GPUs have the tensor cores): tiles stay small
        return D_padded, 16, 32, 4, 1 + 2 * steps
    rows = min(max(16, triton.next_power_of_2(rows)), MAX_ROWS if D_padded < 256 else MAX_ROWS // 2)
    return D_padded, rows, {256: 32, 128: 64}.get(D_padded, 128), 8 if rows * D_padded >= 8192 else 4, 1 + 3 * steps


@lru_cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a number that makes a few splits in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
