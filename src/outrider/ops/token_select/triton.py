"""Token selection in Triton: one program per list reads its merged score row a few times, tile by tile, and never sorts.

A score's key is the upper 16 bits of its float32 pattern; nonnegative floats order like their patterns, so a key is a number
in 0 .. 0x7F80. The threshold key of a list is found digit by digit from the highest, each digit in one pass over the row:

    top-k   5, 5, 5 bits by histogram                                            counts are exact
    top-p   3, 3, 3 bits by sums in float64, then 6 bits by histogram            the mass of a key is its count times its value

A last pass writes the positions above the threshold and the first `quota` at it. Nothing waits for the host.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# An element is read by one thread in runs of 8: 16 bytes of bfloat16, and sums of 8 that need no other thread.
RUN = tl.constexpr(8)
LARGEST = tl.constexpr(0x7F7F)  # key of the largest finite number: infinity, outside the contract, weighs as much
KEEP_ALL = tl.constexpr(-1)  # threshold below every key
KEEP_NONE = tl.constexpr(0x8000)  # threshold above every key


def obstacle(scores: Tensor, sources: Tensor) -> str | None:
    """Why these arguments cannot run here, or None if they can."""
    if scores.dtype == torch.float64:
        return "the Triton kernel takes bfloat16, float16 and float32 scores, not float64"
    if scores.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton needs a CUDA device, or TRITON_INTERPRET=1, not {scores.device.type}"
    if scores.shape[-1] >= 2**31:
        return f"positions are 32-bit numbers, {scores.shape[-1]} cached tokens are too many"
    return None


def token_select(
    scores: Tensor,
    lengths: Tensor,
    sources: Tensor,
    *,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    sinks: int,
    recent: int,
    merge: str,
    width: int,
) -> tuple[Tensor, Tensor]:
    B, _, S = scores.shape
    Lt, Hs, G = sources.shape
    indices = torch.empty(Lt, B, Hs, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(Lt, B, Hs, dtype=torch.int32, device=scores.device)
    if counts.numel() == 0:
        return indices, counts
    # Numbers become tensors, filled on the device: Triton would pass a Python float in single precision.
    budget = top_p if top_k is None else top_k
    if not isinstance(budget, Tensor):
        assert budget is not None
        dtype = torch.float64 if top_k is None else torch.int64
        budget = torch.full((1,), min(budget, S + 1), dtype=dtype, device=scores.device)  # beyond S, k and p mean all
    long = S > 4096
    with torch.cuda.device(scores.device) if scores.is_cuda else nullcontext():
        _select[(counts.numel(),)](
            scores,
            lengths,
            sources.contiguous(),
            budget,
            indices,
            counts,
            *scores.stride(),
            lengths.stride(0),
            budget.stride(0) if budget.numel() > 1 else 0,
            B,
            Hs,
            S,
            min(sinks, S),
            min(recent, S),
            width,
            G=G,
            MEAN=merge == "mean",
            TOP_P=top_p is not None,
            EXACT=scores.dtype == torch.bfloat16 and G == 1,
            BLOCK=4096 if long else 1024,
            num_warps=16 if long else 4,
            maxnreg=64 if long else None,  # two programs share a processor
        )
    return indices, counts


@triton.jit(do_not_specialize=["stride_length", "stride_budget", "B", "Hs", "sinks", "recent", "width"])
def _select(
    scores,  # [B, R, S]
    lengths,  # [B]
    sources,  # [Lt, Hs, G] int64
    budget,  # [B or 1]: k, or p if TOP_P
    indices,  # [Lt, B, Hs, width] int32
    counts,  # [Lt, B, Hs] int32
    stride_b,
    stride_r,
    stride_s,
    stride_length,
    stride_budget,
    B,
    Hs,
    S,
    sinks,
    recent,
    width,
    G: tl.constexpr,
    MEAN: tl.constexpr,
    TOP_P: tl.constexpr,
    EXACT: tl.constexpr,  # no score is rounded in its key
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    h = item % Hs
    b = (item // Hs) % B
    heads = sources + (item // Hs // B * Hs + h) * G
    length = tl.load(lengths + b * stride_length)
    length = tl.minimum(tl.maximum(length, 0), S).to(tl.int32)
    first = tl.minimum(sinks, length)  # first .. last - 1: the tokens that compete
    last = tl.maximum(length - recent, first)
    forced = first + (length - last)
    room = tl.maximum(width - forced, 0)
    row = (scores + b * stride_b, heads, stride_r, stride_s, S)

    if TOP_P:
        p = tl.load(budget + b * stride_budget).to(tl.float64)
        threshold, quota, kept = _top_p(row, first, last, length, p, G, MEAN, EXACT, BLOCK)
        if kept > room:
            threshold, quota, kept = _top_k(row, first, last, room, G, MEAN, BLOCK)
    else:
        k = tl.load(budget + b * stride_budget).to(tl.int64)
        needed = (tl.minimum(tl.maximum(k, 0), length) - forced).to(tl.int32)
        threshold, quota, kept = _top_k(row, first, last, tl.minimum(needed, room), G, MEAN, BLOCK)

    out = indices + item * width
    lane = tl.arange(0, BLOCK)
    for start in range(0, tl.minimum(first, width), BLOCK):
        tl.store(out + start + lane, start + lane, mask=start + lane < tl.minimum(first, width))
    _emit(out, row, first, last, width, threshold, quota, kept, G, MEAN, BLOCK)
    shift = last - first - kept  # a recent token's position less its slot
    for start in range(first + kept, tl.minimum(forced + kept, width), BLOCK):
        tl.store(out + start + lane, start + lane + shift, mask=start + lane < tl.minimum(forced + kept, width))
    count = tl.minimum(forced + kept, width)
    tl.store(counts + item, count)
    for start in range(count, width, BLOCK):
        tl.store(out + start + lane, tl.full([BLOCK], -1, tl.int32), mask=start + lane < width)


@triton.jit
def _emit(out, row, first, last, width, threshold, quota, kept, G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Write the positions of all keys above the threshold and the first `quota` at it, `kept` in all, from slot `first`."""
    start = first // BLOCK * BLOCK
    above_before = 0
    equal_before = 0
    while (above_before + tl.minimum(equal_before, quota) < kept) & (start < last):
        key = _keys(row, start, first, last, G, MEAN, BLOCK)
        above = key > threshold
        equal = key == threshold
        # Both ranks in one scan, 16 bits each; a tile has fewer than 2^15 elements.
        ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        above_rank = above_before + (ranks & 0xFFFF)
        equal_rank = equal_before + (ranks >> 16)
        slot = first + above_rank + tl.minimum(equal_rank, quota) - 1
        keep = above | (equal & (equal_rank <= quota))
        tl.store(out + slot, start + tl.arange(0, BLOCK), mask=keep & (slot < width))
        above_before += tl.sum(above.to(tl.int32), 0)
        equal_before += tl.sum(equal.to(tl.int32), 0)
        start += BLOCK


@triton.jit
def _top_k(row, first, last, needed, G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Threshold, quota at the threshold, and number of kept tokens of the `needed` best (all, none: without reading)."""
    threshold = KEEP_NONE + 0
    quota = 0
    kept = tl.minimum(tl.maximum(needed, 0), last - first)
    if kept == last - first:
        threshold = KEEP_ALL + 0
    elif kept > 0:
        bins = tl.arange(0, 32)
        threshold = 0
        quota = kept  # still wanted from the keys that begin with the digits found so far
        for step in tl.static_range(3):
            count, _ = _counts(row, first, last, threshold, 10 - 5 * step, 5, G, MEAN, BLOCK)
            reached = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # by this digit and all above
            digit = tl.sum((reached >= quota).to(tl.int32), 0) - 1
            quota -= tl.sum(tl.where(bins > digit, count, 0), 0)
            threshold = threshold * 32 + digit
    return threshold, quota, kept


@triton.jit
def _top_p(row, first, last, length, p, G: tl.constexpr, MEAN: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Threshold, quota at the threshold, and number of kept tokens of the smallest list that holds the mass."""
    threshold = KEEP_ALL + 0
    quota = 0
    kept = last - first
    if p < 1:
        held = _mass(row, 0, first, G, MEAN, BLOCK) + _mass(row, last, length, G, MEAN, BLOCK)
        masses = _masses(row, first, last, 0, 12, G, MEAN, BLOCK)
        wanted = _wanted(p, held, masses, EXACT)
        threshold = KEEP_NONE + 0
        kept = 0
        if wanted > 0:
            above = tl.zeros([], tl.float64)  # mass above the digits found so far
            digit, above = _digit(masses, above, wanted)
            prefix = digit
            masses = _masses(row, first, last, prefix, 9, G, MEAN, BLOCK)
            digit, above = _digit(masses, above, wanted)
            prefix = prefix * 8 + digit
            masses = _masses(row, first, last, prefix, 6, G, MEAN, BLOCK)
            digit, above = _digit(masses, above, wanted)
            prefix = prefix * 8 + digit
            count, over = _counts(row, first, last, prefix, 0, 6, G, MEAN, BLOCK)
            bins = tl.arange(0, 64)
            mass = count * _value(prefix * 64 + bins)  # exact, as are their sums: all have the same exponent
            reached = tl.sum(mass, 0) - tl.cumsum(mass, 0) + mass
            low = tl.maximum(tl.sum((above + reached >= wanted).to(tl.int32), 0) - 1, 0)
            threshold = prefix * 64 + low
            above += tl.sum(tl.where(bins > low, mass, 0.0), 0)
            over += tl.sum(tl.where(bins > low, count, 0), 0)
            ties = tl.sum(tl.where(bins == low, count, 0), 0)
            value = tl.sum(tl.where(bins == low, _value(prefix * 64 + bins), 0.0), 0)
            if value > 0:  # else p is 1 but for rounding: every positive key is kept, zeros add no mass
                quota = tl.minimum(tl.ceil((wanted - above) / value), ties.to(tl.float64)).to(tl.int32)
            kept = over + quota
    return threshold, quota, kept


@triton.jit
def _wanted(p, held, masses, EXACT: tl.constexpr):
    """Mass that the competing tokens must bring, from that of the forced ones and the eight masses of all competing ones.

    Where keys round scores, the kept ones are counted as their keys, the dropped ones as the next: kept (1 - p) >= p dropped c.
    """
    total = tl.zeros([], tl.float64)
    for i in tl.static_range(8):
        total += masses[7 - i]
    if EXACT:
        wanted = p * (held + total) - held
    else:
        share = p * 1.0078125
        wanted = (share * total - (1 - p) * held) / (1 - p + share)
    return wanted


@triton.jit
def _digit(masses, above, wanted):
    """The largest of eight digits whose mass, with all above it, reaches what is wanted; and the mass above that digit."""
    digit = 0
    reached = above
    for i in tl.static_range(7):
        reached += masses[7 - i]
        enough = reached >= wanted
        digit += enough.to(tl.int32)
        above = tl.where(enough, above, reached)
    return digit, above


@triton.jit
def _masses(row, first, last, prefix, SHIFT: tl.constexpr, G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the keys that begin with `prefix`, one for each value of the next three bits, the lowest of them bit SHIFT."""
    a0 = tl.zeros([BLOCK // RUN], tl.float64)
    a1 = tl.zeros([BLOCK // RUN], tl.float64)
    a2 = tl.zeros([BLOCK // RUN], tl.float64)
    a3 = tl.zeros([BLOCK // RUN], tl.float64)
    a4 = tl.zeros([BLOCK // RUN], tl.float64)
    a5 = tl.zeros([BLOCK // RUN], tl.float64)
    a6 = tl.zeros([BLOCK // RUN], tl.float64)
    a7 = tl.zeros([BLOCK // RUN], tl.float64)
    for start in range(first // BLOCK * BLOCK, last, BLOCK):
        key = _keys(row, start, first, last, G, MEAN, BLOCK)
        key = tl.reshape(key, [BLOCK // RUN, RUN])
        value = _value(key)
        digit = (key >> SHIFT) - prefix * 8  # 0 .. 7 where the prefix agrees, and nowhere else
        a0 += tl.sum(tl.where(digit == 0, value, 0.0), 1)
        a1 += tl.sum(tl.where(digit == 1, value, 0.0), 1)
        a2 += tl.sum(tl.where(digit == 2, value, 0.0), 1)
        a3 += tl.sum(tl.where(digit == 3, value, 0.0), 1)
        a4 += tl.sum(tl.where(digit == 4, value, 0.0), 1)
        a5 += tl.sum(tl.where(digit == 5, value, 0.0), 1)
        a6 += tl.sum(tl.where(digit == 6, value, 0.0), 1)
        a7 += tl.sum(tl.where(digit == 7, value, 0.0), 1)
    a = tl.sum(a0, 0), tl.sum(a1, 0), tl.sum(a2, 0), tl.sum(a3, 0), tl.sum(a4, 0), tl.sum(a5, 0), tl.sum(a6, 0), tl.sum(a7, 0)
    return a


@triton.jit
def _mass(row, first, last, G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the tokens first .. last - 1."""
    total = tl.zeros([BLOCK // RUN], tl.float64)
    for start in range(first // BLOCK * BLOCK, last, BLOCK):
        key = _keys(row, start, first, last, G, MEAN, BLOCK)
        key = tl.reshape(key, [BLOCK // RUN, RUN])
        total += tl.sum(tl.where(key >= 0, _value(key), 0.0), 1)
    return tl.sum(total, 0)


@triton.jit
def _counts(
    row, first, last, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """Counts of the next BITS bits, from bit SHIFT, of the keys that begin with `prefix`; and of all keys that begin higher."""
    count = tl.zeros([1 << BITS], tl.int32)
    higher = tl.zeros([BLOCK // RUN], tl.int32)
    for start in range(first // BLOCK * BLOCK, last, BLOCK):
        key = _keys(row, start, first, last, G, MEAN, BLOCK) >> SHIFT
        same = (key >> BITS) == prefix
        count += tl.histogram(tl.where(same, key - (prefix << BITS), 0), 1 << BITS, mask=same)
        higher += tl.sum(tl.reshape(((key >> BITS) > prefix).to(tl.int32), [BLOCK // RUN, RUN]), 1)
    return count, tl.sum(higher, 0)


@triton.jit
def _keys(row, start, first, last, G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Keys [BLOCK] int32 of the merged scores from position `start`; -1 outside first .. last - 1."""
    scores, heads, stride_r, stride_s, S = row
    position = start + tl.arange(0, BLOCK)
    # What is read is bounded by S, often a multiple of 16, so that threads read 16 bytes at once; lengths are not.
    place = scores + position.to(tl.int64) * stride_s
    merged = _score(place + tl.load(heads) * stride_r, position < S)
    if G <= 8:
        for g in tl.static_range(1, G):
            x = _score(place + tl.load(heads + g) * stride_r, position < S)
            merged = merged + x if MEAN else tl.maximum(merged, x)
    else:
        for g in range(1, G):
            x = _score(place + tl.load(heads + g) * stride_r, position < S)
            merged = merged + x if MEAN else tl.maximum(merged, x)
    if MEAN and G > 1:
        merged = tl.div_rn(merged, tl.full([BLOCK], G, tl.float32))
    key = merged.to(tl.int32, bitcast=True) >> 16
    return tl.where((position >= first) & (position < last), key, -1)


@triton.jit
def _score(place, mask):
    x = tl.load(place, mask=mask, other=0)
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return tl.where(x > 0, x, 0.0)  # also for NaN and -0


@triton.jit
def _value(key):
    """The number that a key stands for, in float64."""
    return (tl.minimum(key, LARGEST) << 16).to(tl.float32, bitcast=True).to(tl.float64)
