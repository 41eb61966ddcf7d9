"""Chunk attention in Triton: one launch, and no matrix of queries by tokens in memory.

    _attend    grid (blocks x heads that own a list x row tiles, B). The rows of a program's tile are queries of one block, each
               with its query heads of one KV head side by side, so that gathered rows of the cache serve all of them. What they
               may see is one run of slots: those of the list, then the block's own tokens. Query `step` of the block sees the
               slots up to count + step: one causal edge, as in dense attention. A tile of slots is looked up, their rows of
               keys and values gathered straight from the cache; online softmax in base 2. The tiles at the edge go first, those
               that hold list alone, and need no mask, after them.

Without lists (dense) the chunk is one block, and the slots are the positions themselves; a window makes a second edge in front.

Programs are ordered by their work, the last block first, and in it the last queries. Row tiles that walk the same list run side
by side, so that one of them brings a gathered row into the L2 cache for all.

The host looks at shapes alone: every call can be captured in a CUDA graph and replayed with other lists, counts and lengths.
Slots behind the causal edge load nothing. Logits and sums are fp32, and fp64 for fp32 queries, as in sparse_attention.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from outrider.ops.backends import attention_obstacle

# Padded head dim, up to -> rows and tokens of a tile, warps, stages. With lists a position is loaded before its row, and each
# of the two steps takes its stages. On Hopper registers bound the tile: in a larger one ptxas serialises the products.
HOPPER_LISTED = {64: (128, 64, 4, 5), 128: (128, 128, 8, 5), 256: (128, 32, 8, 5)}
HOPPER_DENSE = {64: (128, 64, 4, 3), 128: (128, 128, 8, 3), 256: (128, 32, 8, 3)}
OTHERS_LISTED = {128: (64, 32, 4, 5), 256: (64, 16, 4, 5)}  # at most 96 KB of shared memory
OTHERS_DENSE = {128: (64, 32, 4, 3), 256: (64, 16, 4, 3)}
LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: of a tile that a row sees nothing of, no inf - inf comes
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _add_tile(
    best,  # [ROWS] largest logit so far
    total,  # [ROWS] sum of weights 2 ** (logit - best)
    out,  # [ROWS, D_PADDED]
    q,
    keys,
    values,
    indices,
    scale,
    start,  # first slot of the tile
    count,
    own,  # position of the block's first token
    end,
    row_slot,
    window,
    key_stride,
    value_stride,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    FAR: tl.constexpr,  # rows lie further apart than 31 bits count
    MASKED: tl.constexpr,
):
    """The online softmax, a tile of slots further. MASKED: a row may not see all; from `end` on nothing is read."""
    # of products; the interpreter takes bfloat16 in them for integers
    operand: tl.constexpr = out.dtype if INTERPRETED or out.dtype == tl.float64 else q.dtype
    slot = start + tl.arange(0, TILE)
    position = slot
    if indices is not None and MASKED:
        listed = slot < count
        position = tl.where(listed, tl.load(indices + slot, mask=listed, other=0), own + slot - count)
    elif indices is not None:
        position = tl.load(indices + slot)
    if FAR:
        position = position.to(tl.int64)
    key_at = keys + (position * key_stride)[:, None]
    value_at = values + (position * value_stride)[:, None]
    if MASKED or D < D_PADDED:
        loaded = tl.expand_dims(slot < end, 1) & (tl.arange(0, D_PADDED) < D)[None, :]
        k = tl.load(key_at, mask=loaded, other=0.0)
        v = tl.load(value_at, mask=loaded, other=0.0)
    else:
        k = tl.load(key_at)
        v = tl.load(value_at)

    logits = tl.dot(q.to(operand), k.to(operand).T, input_precision="ieee", out_dtype=out.dtype)  # [ROWS, TILE]
    if MASKED:
        visible = slot[None, :] <= row_slot[:, None]
        if window is not None:
            visible &= slot[None, :] > (row_slot - window)[:, None]
        logits = tl.where(visible, logits * scale, -float("inf"))
        scale = 1.0
    best_now = tl.maximum(best, tl.max(logits, 1) * scale)
    weights = tl.exp2(logits * scale - best_now[:, None])
    fade = tl.exp2(best - best_now)
    total = total * fade + tl.sum(weights, 1)
    out = tl.dot(weights.to(operand), v.to(operand), out * fade[:, None], input_precision="ieee", out_dtype=out.dtype)
    return best_now, total, out


# Values of these would be compiled in, for 1 and for multiples of 16: a kernel per chunk and window, and no faster
@triton.jit(do_not_specialize=["window", "T", "block", "group", "heads", "heads_per_kv", "row_tiles"])
def _attend(
    queries,
    keys,
    values,
    indices,  # None: dense
    counts,
    lengths,
    window,
    key_scale,
    value_scale,
    result,  # [B, T, Hq, D]
    logsumexp,
    scale,
    T,
    block,
    group,
    heads,
    heads_per_kv,
    row_tiles,
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
    FAR: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if queries.dtype.element_ty == tl.float32 else tl.float32  # logits and sums
    reverse = tl.num_programs(0) - 1 - tl.program_id(0)
    row_tile, head, here = reverse % row_tiles, reverse // row_tiles % heads, reverse // row_tiles // heads
    sequence = tl.program_id(1).to(tl.int64)
    kv_head = (head // heads_per_kv).to(tl.int64)

    row = row_tile * ROWS + tl.arange(0, ROWS)
    step, query_head = row // group, head * group + row % group
    tokens = tl.minimum(T - here * block, block)  # of this block
    first, last = row_tile * ROWS // group, tl.minimum((row_tile * ROWS + ROWS - 1) // group, tokens - 1)
    if first >= tokens:  # a ragged block has fewer row tiles
        return
    asked = step < tokens
    dim = tl.arange(0, D_PADDED)
    stored = asked[:, None] & (dim < D)[None, :]
    token = (here * block + step).to(tl.int64)
    at = sequence * query_strides[0] + token * query_strides[1] + query_head.to(tl.int64) * query_strides[2]
    q = tl.load(queries + at[:, None] + dim[None, :] * query_strides[3], mask=stored, other=0.0)  # [ROWS, D]
    if key_scale is not None:
        scale *= tl.load(key_scale + kv_head)
    scale = tl.cast(scale, wide) * LOG2_E
    keys += sequence * key_strides[0] + kv_head * key_strides[2] + dim[None, :]
    values += sequence * value_strides[0] + kv_head * value_strides[2] + dim[None, :]

    count = tl.load(lengths + sequence).to(tl.int32)  # slots before the block's own
    own = count + here * block
    if indices is not None:
        count = tl.load(counts + sequence * count_strides[0] + here * count_strides[1] + head * count_strides[2])
        indices += sequence * index_strides[0] + here.to(tl.int64) * index_strides[1] + head.to(tl.int64) * index_strides[2]
    row_slot = count + step  # the last one that a row sees
    end = count + last + 1  # no row sees what is behind
    begin, edge = 0, 0
    if window is not None:
        begin = tl.maximum(count + first + 1 - window, 0)
        edge = begin + tl.cdiv(tl.maximum(count + last + 1 - window, begin) - begin, TILE) * TILE  # from where on all see all
    seen = count + first + 1 if indices is None else count
    full = begin + (seen - begin) // TILE * TILE  # up to where all see all

    best = tl.full([ROWS], LOWEST, wide)
    total = tl.zeros([ROWS], wide)
    out = tl.zeros([ROWS, D_PADDED], wide)
    for start in range(tl.maximum(edge, full), end, TILE):
        best, total, out = _add_tile(
            best, total, out, q, keys, values, indices, scale, start, count, own, end, row_slot, window,
            key_strides[1], value_strides[1], D, D_PADDED, TILE, FAR, MASKED=True,
        )  # fmt: skip
    if window is not None:
        for start in range(begin, edge, TILE):
            best, total, out = _add_tile(
                best, total, out, q, keys, values, indices, scale, start, count, own, end, row_slot, window,
                key_strides[1], value_strides[1], D, D_PADDED, TILE, FAR, MASKED=True,
            )  # fmt: skip
    for start in range(edge if window is not None else begin, full, TILE):
        best, total, out = _add_tile(
            best, total, out, q, keys, values, indices, scale, start, count, own, end, row_slot, window,
            key_strides[1], value_strides[1], D, D_PADDED, TILE, FAR, MASKED=False,
        )  # fmt: skip

    if logsumexp is not None:
        at = sequence * logsumexp_strides[0] + query_head.to(tl.int64) * logsumexp_strides[1] + token * logsumexp_strides[2]
        tl.store(logsumexp + at, (best + tl.log2(total)) / LOG2_E, mask=asked)
    out = out / total[:, None]
    if value_scale is not None:
        out *= tl.load(value_scale + kv_head)
    at = ((sequence * T + token) * heads * group + query_head) * D
    tl.store(result + at[:, None] + dim[None, :], out, mask=stored)


def obstacle(queries: Tensor, keys: Tensor, scale: float) -> str | None:
    """Why these arguments cannot be run, None if they can."""
    if scale < 0:
        return f"scale {scale}; the kernel takes none below 0"
    return attention_obstacle(queries, keys)


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
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    window: int | None,
    logsumexp: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    Hkv = keys.shape[2]
    heads = Hkv  # a list shared by all heads is walked once per KV head
    if indices is None or counts is None:
        block, blocks = T, 1
        window = None if window is None else min(window, keys.shape[1])
    else:
        heads, blocks = max(indices.shape[2], Hkv), indices.shape[1]
        block = min(block, T)
        indices = (indices if indices.stride(-1) == 1 else indices.contiguous()).expand(B, blocks, heads, -1)
        counts = counts.expand(B, blocks, heads)
    group = Hq // heads
    far = keys.shape[1] * max(keys.stride(1), values.stride(1)) >= 2**31  # elements of a sequence
    result = torch.empty(B, T, Hq, D, dtype=queries.dtype, device=queries.device)
    with (
        torch.cuda.device(queries.device) if queries.is_cuda else contextlib.nullcontext()
    ):  # Triton launches on the current one
        D_padded, rows, tile, warps, stages = _tiles(D, block * group, queries.dtype, indices is not None)
        row_tiles = triton.cdiv(block * group, rows)
        _attend[row_tiles * heads * blocks, B](
            queries, keys, values, indices, counts, lengths.contiguous(), window,
            None if key_scale is None else key_scale.contiguous(),
            None if value_scale is None else value_scale.contiguous(),
            result, logsumexp,
            scale, T, block, group, heads, heads // Hkv, row_tiles,
            queries.stride(), keys.stride()[:3], values.stride()[:3],
            (0, 0, 0) if indices is None else indices.stride()[:3], (0, 0, 0) if counts is None else counts.stride(),
            (0, 0, 0) if logsumexp is None else logsumexp.stride(),
            D=D, D_PADDED=D_padded, ROWS=rows, TILE=tile, FAR=far, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return result


def _tiles(D: int, rows: int, queries: torch.dtype, listed: bool) -> tuple[int, int, int, int, int]:
    """Padded head dim, rows and tokens of a tile, warps, stages, on the current device."""
    D_padded = max(16, triton.next_power_of_2(D))
    if queries == torch.float32:  # in fp64, where products may be unrolled (few GPUs have the tensor cores): tiles stay small
        return D_padded, 16, 16, 4, 3
    if INTERPRETED or triton.runtime.driver.active.get_current_target().arch == 90:
        sizes = HOPPER_LISTED if listed else HOPPER_DENSE
    else:
        sizes = OTHERS_LISTED if listed else OTHERS_DENSE
    most, tile, warps, stages = next(size for least, size in sizes.items() if D_padded <= least)
    rows = min(max(16, triton.next_power_of_2(rows)), most)
    return D_padded, rows, tile, max(4, warps * rows // most), stages
