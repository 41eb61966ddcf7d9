"""Block mass in Triton: two kernels; no matrix of logits is ever in memory.

    _denominators   grid (tiles of queries, heads asked for, B). Walks over the keys that a tile of queries sees: online maximum
                    and sum. Only the last tiles, at and past the first query's position, are masked. Not launched when the
                    logsumexp is given.
    _column_sums    grid (tiles of keys x blocks, KV heads, B). Holds a tile of keys and walks over a block's queries, one head
                    asked for after another: 2 ** (logit - log2 of the denominator), summed over the queries. Nothing is masked
                    in the loop: a key at or behind the block's start has a sum of its own, for which 0 is stored, and a query
                    behind the block's end has an infinite denominator. A tile that the block does not list is 0 without a look.

Keys are the rows of the products of `_column_sums`, so a thread adds up queries within its own registers. What bounds it is the
special function unit: 16 exponentials a clock and multiprocessor, half the rate at which the tensor cores yield logits of head
dim 64; all else that a logit takes is a multiply-add and an addition. A part of the exponentials can be computed by a
polynomial on the FMA units instead (SOFT_HALVINGS), as in FlashAttention-4.

Logits and sums are fp32, and fp64 for fp32 queries. Lengths and heads are read on the device; the host looks at shapes alone:
every call can be captured in a CUDA graph and replayed with others.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from outrider.ops.backends import attention_obstacle

# by padded head dim: keys and queries of a tile, warps, stages
COLUMN_TILES = {64: (128, 64, 4, 3), 128: (128, 128, 8, 2), 256: (64, 64, 4, 2)}
DENOMINATOR_TILES = {64: (128, 128, 8, 3), 128: (128, 128, 8, 2), 256: (64, 64, 4, 2)}
MAX_REGISTERS = 128  # of a thread of _column_sums: 16 warps to a multiprocessor, so that products hide behind exponentials
WIDE_TILES = (32, 16, 4, 2)  # in fp64, which few GPUs are fast in
SOFT_HALVINGS = 0  # 2 ** -SOFT_HALVINGS of the exponentials of _column_sums are computed on the FMA units; 0: none
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load_rows(base, row, stride, wanted, dim_stride, D: tl.constexpr, D_PADDED: tl.constexpr):
    """`[rows, D_PADDED]`: rows of a tensor; zeros where not wanted, of which nothing is read. None: all are wanted."""
    dim = tl.arange(0, D_PADDED)
    at = base + row.to(tl.int64)[:, None] * stride + dim[None, :] * dim_stride
    if D < D_PADDED and wanted is not None:
        x = tl.load(at, mask=wanted[:, None] & (dim < D)[None, :], other=0.0)
    elif D < D_PADDED:
        x = tl.load(at, mask=(dim < D)[None, :], other=0.0)
    elif wanted is not None:
        x = tl.load(at, mask=wanted[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _operands(a, b):
    """The factors of a product: fp64 for fp32 queries `a`; in the interpreter, which takes bfloat16 for integers, fp32."""
    narrow: tl.constexpr = tl.float32 if INTERPRETED else a.dtype
    kind: tl.constexpr = tl.float64 if a.dtype == tl.float32 else narrow
    return a.to(kind), b.to(kind)


@triton.jit
def _soft_exp2(x):
    """2 ** x for x in fp32 up to 126, with a relative error of 1e-4: on the FMA units, without the special function unit.

    Adding 1.5 * 2 ** 23 rounds to an integer, which stands in the lowest bits of the sum; 2 ** of the rest, in -0.5 .. 0.5, is
    a polynomial of degree 3 (the best in relative error); the integer is added to its exponent.
    """
    x = tl.maximum(x, -126.0)
    shifted = x + 12582912.0
    rest = x - (shifted - 12582912.0)
    power = ((0.05517167 * rest + 0.24261113) * rest + 0.69326099) * rest + 0.99992807
    return ((shifted.to(tl.int32, bitcast=True) << 23) + power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x, which lie in different registers of the same thread."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _sums_of_powers(x, HALVINGS: tl.constexpr):
    """`[KEYS]`: 2 ** x summed over the columns of x, `[KEYS, ROWS]`; of the last 2 ** -HALVINGS of them in software."""
    if HALVINGS == 0:
        powers = tl.exp2(x)
    else:
        left, x = _halves(x)
        powers = tl.exp2(left)
        for _ in tl.static_range(HALVINGS - 1):
            left, x = _halves(x)
            one, other = _halves(powers)
            powers = one + other + tl.exp2(left)
        powers += _soft_exp2(x)
    return tl.sum(powers, 1)


@triton.jit
def _rows_of(kv_head, heads, R, group, HEADS: tl.constexpr):
    """First and last but one of the result's rows whose query head uses the KV head; `heads` ascend."""
    if heads is None:
        first, last = kv_head * group, kv_head * group + group
    else:
        row = tl.arange(0, HEADS)
        head = tl.load(heads + row, mask=row < R, other=2**31 - 1)
        first, last = tl.sum((head < kv_head * group).to(tl.int32)), tl.sum((head < kv_head * group + group).to(tl.int32))
    return first, last


@triton.jit
def _widen(logits, best, total):
    """Maximum and sum of 2 ** (logit - maximum) of every row, with a further tile of logits."""
    best_now = tl.maximum(best, tl.max(logits, 1))
    return best_now, total * tl.exp2(best - best_now) + tl.sum(tl.exp2(logits - best_now[:, None]), 1)


# Values of these would be compiled in, for 1 and for multiples of 16: a kernel per chunk, and no faster
@triton.jit(do_not_specialize=["T", "group", "query_heads"])
def _denominators(
    queries,
    keys,
    lengths,
    heads,  # [R], or None: all
    key_scale,
    logsumexp,  # [B, Hq, T]: result; natural, fp32 or fp64. Rows of other heads stay unwritten
    scale,
    T,
    group,
    query_heads,
    query_strides,
    key_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    wide: tl.constexpr = logsumexp.dtype.element_ty
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    if heads is not None:
        head = tl.load(heads + head)
    kv_head = head // group
    first = tl.program_id(0) * ROWS
    step = first + tl.arange(0, ROWS)
    queries += sequence * query_strides[0] + head * query_strides[2]
    q = _load_rows(queries, step, query_strides[1], step < T, query_strides[3], D, D_PADDED)
    keys += sequence * key_strides[0] + kv_head * key_strides[2]
    factor = tl.cast(scale, wide) * LOG2_E
    if key_scale is not None:
        factor *= tl.load(key_scale + kv_head)

    length = tl.load(lengths + sequence).to(tl.int32)
    end = length + tl.minimum(first + ROWS, T)
    seen_by_all = (length + first + 1) // KEYS * KEYS
    best = tl.full([ROWS], -float("inf"), wide)
    total = tl.zeros([ROWS], wide)
    for start in range(0, seen_by_all, KEYS):
        k = _load_rows(keys, start + tl.arange(0, KEYS), key_strides[1], None, 1, D, D_PADDED)
        a, b = _operands(q, k)
        best, total = _widen(tl.dot(a, b.T, input_precision="ieee") * factor, best, total)
    for start in range(seen_by_all, end, KEYS):
        token = start + tl.arange(0, KEYS)
        k = _load_rows(keys, token, key_strides[1], token < end, 1, D, D_PADDED)
        a, b = _operands(q, k)
        logits = tl.dot(a, b.T, input_precision="ieee") * factor
        best, total = _widen(tl.where(token[None, :] <= length + step[:, None], logits, -float("inf")), best, total)
    tl.store(logsumexp + (sequence * query_heads + head) * T + step, (best + tl.log2(total)) * LN_2, mask=step < T)


@triton.jit(do_not_specialize=["span", "T", "R", "block", "blocks", "group"])
def _column_sums(
    queries,
    keys,
    lengths,
    heads,  # [R], or None: all
    key_scale,
    biases,  # [B, Hq, NB, TILES * ROWS]: minus log2 of the denominators, contiguous; -inf behind the queries of a block
    listed,  # uint8 by spans of tokens, or None: all
    result,
    scale,
    span,
    N,
    T,
    R,
    block,
    blocks,  # NB
    group,
    query_strides,
    key_strides,
    listed_strides,
    result_strides,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,  # of a block's queries
    HEADS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    wide: tl.constexpr = biases.dtype.element_ty  # logits and sums
    index = tl.program_id(0) % blocks  # blocks first: a tile of keys is read from memory once
    token = tl.program_id(0) // blocks * KEYS + tl.arange(0, KEYS)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    first, last = _rows_of(kv_head, heads, R, group, HEADS)
    result += sequence * result_strides[0] + index.to(tl.int64) * result_strides[1] + token
    start = tl.load(lengths + sequence).to(tl.int32) + index * block
    read = token < start
    if listed is not None:
        listed += (
            sequence * listed_strides[0] + index.to(tl.int64) * listed_strides[1] + kv_head.to(tl.int64) * listed_strides[2]
        )
        read &= tl.load(listed + token // span, mask=read, other=0) > 0

    if tl.max(read.to(tl.int32), 0) == 0:
        for row in range(first, last):
            tl.store(result + tl.cast(row, tl.int64) * result_strides[2], tl.zeros([KEYS], tl.float32), mask=token < N)
    else:
        queries += sequence * query_strides[0] + (index * block).to(tl.int64) * query_strides[1]
        biases += (sequence * tl.num_programs(1) * group * blocks + index) * (TILES * ROWS)
        keys += sequence * key_strides[0] + kv_head.to(tl.int64) * key_strides[2]
        k = _load_rows(keys, token, key_strides[1], token < start, 1, D, D_PADDED)
        factor = tl.cast(scale, wide) * LOG2_E
        if key_scale is not None:
            factor *= tl.load(key_scale + kv_head)
        size = tl.minimum(T - index * block, block)
        share = (1.0 / size).to(wide)  # of a query in the mean
        total = tl.zeros([KEYS], wide)
        for i in range((last - first) * TILES):  # one loop over heads and tiles of queries: loads run ahead across both
            row, tile = first + i // TILES, i % TILES
            head = tl.cast(row, tl.int64)
            if heads is not None:
                head = tl.load(heads + row)
            step = tl.minimum(tile * ROWS + tl.arange(0, ROWS), size - 1)
            q = _load_rows(queries + head * query_strides[2], step, query_strides[1], None, query_strides[3], D, D_PADDED)
            bias = tl.load(biases + head * blocks * (TILES * ROWS) + tile * ROWS + tl.arange(0, ROWS))
            a, b = _operands(q, k)
            logits = tl.dot(b, a.T, input_precision="ieee")  # [KEYS, ROWS]
            total += _sums_of_powers(logits * factor + bias[None, :], HALVINGS)
            if tile == TILES - 1:
                mass = tl.where(read, total * share, 0.0).to(tl.float32)
                tl.store(result + tl.cast(row, tl.int64) * result_strides[2], mass, mask=token < N)
                total = tl.zeros([KEYS], wide)


def _biases(logsumexp: Tensor, block: int, rows: int) -> Tensor:
    """`[B, Hq, NB, block, padded to tiles of rows]`: what is added to a logit in base 2 to make it that of a mass."""
    bias = pad(logsumexp * -math.log2(math.e), (0, -logsumexp.shape[2] % block), value=-math.inf)
    return pad(bias.unflatten(2, (-1, block)), (0, -block % rows), value=-math.inf)


def obstacle(queries: Tensor, keys: Tensor) -> str | None:
    """Why these arguments cannot be run, None if they can."""
    return attention_obstacle(queries, keys)


def block_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    block: int,
    scale: float,
    heads: Tensor | None,
    logsumexp: Tensor | None,
    listed: Tensor | None,
    span: int,
    key_scale: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    B, T, Hq, D = queries.shape
    N, Hkv = keys.shape[1:3]
    R = Hq if heads is None else heads.shape[0]
    block = min(block, T)
    NB = triton.cdiv(T, block)
    device, full = queries.device, queries.dtype == torch.float32
    if out is None:
        out = torch.empty(B, NB, R, N, dtype=dtype, device=device)
    if out.numel() == 0:
        return out
    lengths = lengths.contiguous()
    heads, key_scale = (None if x is None else x.contiguous() for x in (heads, key_scale))
    if listed is not None:
        listed = (listed if listed.stride(-1) == 1 else listed.contiguous()).view(torch.uint8).expand(-1, -1, Hkv, -1)
    D_padded = max(16, triton.next_power_of_2(D))
    wide = torch.float64 if full else torch.float32
    with torch.cuda.device(device) if queries.is_cuda else contextlib.nullcontext():
        if logsumexp is None:
            logsumexp = torch.empty(B, Hq, T, dtype=wide, device=device)
            tile, rows, warps, stages = WIDE_TILES if full else DENOMINATOR_TILES[max(64, D_padded)]
            _denominators[triton.cdiv(T, rows), R, B](
                queries, keys, lengths, heads, key_scale, logsumexp, scale, T, Hq // Hkv, Hq, queries.stride(), keys.stride(),
                D=D, D_PADDED=D_padded, KEYS=tile, ROWS=rows, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        tile, rows, warps, stages = WIDE_TILES if full else COLUMN_TILES[max(64, D_padded)]
        _column_sums[triton.cdiv(N, tile) * NB, Hkv, B](
            queries, keys, lengths, heads, key_scale, _biases(logsumexp.to(wide), block, rows), listed, out,
            scale, span, N, T, R, block, NB, Hq // Hkv, queries.stride(), keys.stride(),
            (0, 0, 0) if listed is None else listed.stride()[:3], out.stride(),
            D=D, D_PADDED=D_padded, KEYS=tile, ROWS=rows, TILES=triton.cdiv(block, rows), HEADS=triton.next_power_of_2(Hq),
            HALVINGS=0 if full else SOFT_HALVINGS, num_warps=warps, num_stages=stages, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return out
