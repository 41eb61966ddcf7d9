"""Token selection in Triton: a sample of the row says where the threshold is, one pass proves it, another writes the list.

A score's key is the upper 16 bits of its float32 pattern; nonnegative floats order like their patterns, so a key is a number
in 0 .. 0x7F80. The threshold key of a list is found in four launches:

    _sample   a program per list. From a sample of the row, spread evenly: a window of at most 1024 keys for the threshold.
    _count    lists x splits. Exact, for each split: how often each key of the window occurs, how many keys lie above it; for
              top-p the mass above the window, too, and the total. Few tokens fall into the window: those are counted by atomic
              additions of integers to a table of the split's own.
    _settle   a program per list. Adds up the splits' tables; threshold, quota of tokens at it, every split's first slot. A
              threshold outside the window is found by bisection, in passes over the whole row: slow, but rarely needed.
    _write    lists x splits. Positions of the keys above the threshold and of the first at it.

The sample decides about time, never about the result. Splits share out the length, read on the device; the host looks at shapes
alone. Where several rows are merged, _count leaves the keys, 2 bytes a token, for the launches after it.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_SM = 8  # of a launch over splits, about four of which run at a time
MAX_SPLITS = 128  # _settle holds the tables of all splits of a list
SAMPLE = 8192  # tokens

# An element is read by one thread in runs of 8: 16 bytes of bfloat16, and sums of 8 that need no other thread.
RUN = tl.constexpr(8)
WINDOW = tl.constexpr(1024)  # keys: eight powers of two
LARGEST = tl.constexpr(0x7F7F)  # key of the largest finite number: infinity, outside the contract, weighs as much
KEEP_NONE = tl.constexpr(0x8000)  # threshold above every key


def obstacle(scores: Tensor, sources: Tensor) -> str | None:
    """Why these arguments cannot run here, or None if they can."""
    if scores.dtype == torch.float64:
        return "the Triton kernel takes bfloat16, float16 and float32 scores, not float64"
    if scores.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton needs a CUDA device, or TRITON_INTERPRET=1, not {scores.device.type}"
    if scores.shape[-1] > 2**31 - 2**13:  # the last tile ends behind the row
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
    device, lists = scores.device, Lt * B * Hs
    indices = torch.empty(Lt, B, Hs, width, dtype=torch.int32, device=device)
    counts = torch.empty(Lt, B, Hs, dtype=torch.int32, device=device)
    if lists == 0:
        return indices, counts
    # Numbers become tensors, filled on the device: Triton would pass a Python float in single precision.
    budget = top_p if top_k is None else top_k
    if not isinstance(budget, Tensor):
        assert budget is not None
        dtype = torch.float64 if top_k is None else torch.int64
        budget = torch.full((1,), min(budget, S + 1), dtype=dtype, device=device)  # beyond S, k and p mean all

    by_mass = top_p is not None
    block, warps = (4096, 8) if S > 4096 else (1024, 4)
    splits = max(1, min(triton.cdiv(S, block), PROGRAMS_PER_SM * _processors(device) // lists, MAX_SPLITS))
    padded = triton.next_power_of_2(splits)
    pitch = triton.cdiv(S, 16) * 16
    keys = torch.empty(lists, pitch, dtype=torch.int16, device=device) if G > 1 else None
    windows = torch.empty(lists, 2, dtype=torch.int32, device=device)
    tables = torch.empty(lists, splits, WINDOW.value, dtype=torch.int32, device=device)
    totals = torch.empty(lists, splits, 2, dtype=torch.int32, device=device)
    masses = torch.empty(lists, splits, 2, dtype=torch.float64, device=device) if by_mass else None
    held = torch.empty(lists, dtype=torch.float64, device=device) if by_mass else None
    plan = torch.empty(lists, splits, 4, dtype=torch.int32, device=device)
    by_list = budget.dim() == 3
    budget = budget.contiguous() if by_list else budget
    stride_item = 1 if by_list else 0
    stride_budget = budget.stride(0) if budget.dim() == 1 and budget.numel() > 1 else 0
    row = scores, scores.stride(), lengths, lengths.stride(0), sources.contiguous(), keys, pitch
    shapes = B, Hs, S, min(sinks, S), min(recent, S), width
    options = {"G": G, "MEAN": merge == "mean"}
    exact = scores.dtype == torch.bfloat16 and G == 1
    sample = min(SAMPLE, max(1024, triton.next_power_of_2(S)))
    with torch.cuda.device(device) if scores.is_cuda else nullcontext():
        _sample[lists,](
            *row, *shapes, budget, stride_budget, stride_item, windows, held, TOP_P=by_mass, SAMPLE=sample, **options,
            num_warps=max(4, sample // 1024),
        )  # fmt: skip
        _count[lists * splits,](
            *row, *shapes, budget, stride_budget, stride_item, splits, windows, tables, totals, masses,
            TOP_P=by_mass, BLOCK=block, **options, num_warps=warps, maxnreg=80 if by_mass else 64,
        )  # fmt: skip
        _settle[lists,](
            *row, *shapes, budget, stride_budget, stride_item, splits, windows, tables, totals, masses, held, plan, counts,
            TOP_P=by_mass, EXACT=exact, SPLITS=padded, BLOCK=block, **options, num_warps=max(4, min(16, padded // 8)),
        )  # fmt: skip
        _write[lists * splits,](
            *row, *shapes, splits, plan, counts, indices, BLOCK=block, **options, num_warps=warps, maxnreg=64,
        )  # fmt: skip
    return indices, counts


@lru_cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a number that makes a few splits in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


# Values of these would be compiled in, for 1 and for multiples of 16: a kernel per batch size and width, and no faster
VARYING = ["stride_length", "B", "Hs", "sinks", "recent", "width", "stride_budget", "stride_item", "splits"]


@triton.jit(do_not_specialize=VARYING)
def _sample(
    scores,  # [B, R, S]
    strides,
    lengths,  # [B]
    stride_length,
    sources,  # [Lt, Hs, G] int64
    keys,  # [lists, pitch] int16: merged; None for G = 1
    pitch,
    B,
    Hs,
    S,
    sinks,
    recent,
    width,
    budget,  # [1], [B] or [Lt, B, Hs]: k, or p if TOP_P
    stride_budget,
    stride_item,
    windows,  # [lists, 2] int32: lowest and highest key
    held,  # [lists] float64: mass of the forced tokens
    TOP_P: tl.constexpr,
    SAMPLE: tl.constexpr,
    G: tl.constexpr,
    MEAN: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    b, row, length, first, last = _list(item, scores, strides, lengths, stride_length, sources, B, Hs, S, sinks, recent, G)
    number, p = _budget(budget + b * stride_budget + item * stride_item, length, first, last, width, TOP_P)
    competing = last - first

    # Runs of 8 tokens, spread over the tokens that compete: all of them if they fit.
    i = tl.arange(0, SAMPLE)
    runs = tl.maximum(tl.cdiv(last, RUN) - first // RUN, SAMPLE // RUN)
    run = ((i // RUN).to(tl.int64) * runs // (SAMPLE // RUN)).to(tl.int32)
    position = (first // RUN + run) * RUN + i % RUN
    key = tl.where((position >= first) & (position < last), _merged_keys(row, position, G, MEAN), -1)
    size = tl.sum((key >= 0).to(tl.int32), 0)
    share = size / tl.maximum(competing, 1).to(tl.float32)

    # Rank of the threshold in the sample, and how far it may be off: eight standard errors, since neighbours may be alike.
    rank = tl.minimum(number, competing) * share
    margin = 8 * tl.sqrt(rank)
    if TOP_P:
        forced = _mass(row, 0, first, G, MEAN) + _mass(row, last, length, G, MEAN)
        tl.store(held + item, forced)
        if p < float("inf"):
            value = tl.where(key >= 0, _value(key).to(tl.float32), 0.0)
            largest = tl.maximum(tl.max(value, 0), 1e-30)
            value = value / largest
            total = tl.sum(value, 0)
            error = tl.sqrt(tl.sum(value * value, 0)) / tl.maximum(total, 1e-30)  # of the total mass, relative
            forced *= share / largest
            wanted = (p * (forced + total) - forced).to(tl.float32)
            threshold = 0
            for step in range(15):
                trial = threshold + (16384 >> step)
                if tl.sum(tl.where(key >= trial, value, 0.0), 0) >= wanted:
                    threshold = trial
            rank = tl.minimum(rank, tl.sum((key >= threshold).to(tl.int32), 0).to(tl.float32))
            margin = 4 * tl.sqrt(rank) + 4 * error * rank
    if size == competing:
        margin = tl.minimum(margin, 1.0)
    fewest = tl.floor(rank - margin).to(tl.int32)  # below 1 the sample sets no upper end
    most = tl.minimum(tl.maximum(tl.ceil(rank + margin), 1.0).to(tl.int32), size)

    lowest = 0  # the largest keys that `most` and `fewest` tokens of the sample reach
    highest = 0
    for step in range(15):
        low = lowest + (16384 >> step)
        high = highest + (16384 >> step)
        reached = tl.sum((key >= low).to(tl.int32) + tl.where(key >= high, 65536, 0), 0)
        if reached % 65536 >= most:
            lowest = low
        if reached // 65536 >= fewest:
            highest = high
    tl.store(windows + item * 2, lowest)
    tl.store(windows + item * 2 + 1, tl.minimum(highest, lowest + (WINDOW - 1)))


@triton.jit(do_not_specialize=VARYING)
def _count(
    scores, strides, lengths, stride_length, sources, keys, pitch, B, Hs, S, sinks, recent, width,
    budget, stride_budget, stride_item, splits, windows,
    tables,  # [lists, splits, WINDOW] int32: counts of the keys of the window but the lowest
    totals,  # [lists, splits, 2] int32: counts of the keys from the window's lowest on, and of those above the window
    masses,  # [lists, splits, 2] float64: of all keys, and of those above the window
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    item, split = program // splits, (program % splits).to(tl.int32)
    b, row, length, first, last = _list(item, scores, strides, lengths, stride_length, sources, B, Hs, S, sinks, recent, G)
    stored = keys if keys is None else keys + item * pitch
    number, p = _budget(budget + b * stride_budget + item * stride_item, length, first, last, width, TOP_P)
    lowest = tl.load(windows + item * 2)
    highest = tl.load(windows + item * 2 + 1)
    table = tables + program * WINDOW
    bins = tl.arange(0, WINDOW)
    tl.store(table + bins, tl.zeros([WINDOW], tl.int32), mask=bins <= highest - lowest)
    tl.debug_barrier()  # before any thread adds to what another has cleared

    start, end = _share(split, splits, length, first, last, BLOCK)
    if _keeps_all_or_none(number, p, first, last):
        end = start
    reached = tl.zeros([BLOCK // RUN], tl.int32)
    above = tl.zeros([BLOCK // RUN], tl.int32)
    mass = tl.zeros([BLOCK // RUN], tl.float64)
    mass_above = tl.zeros([BLOCK // RUN], tl.float64)
    for tile in tl.range(start, end, BLOCK):
        position = tile + tl.arange(0, BLOCK)
        key = _merged_keys(row, position, G, MEAN)
        if stored is not None:
            tl.store(stored + position, key.to(tl.int16), mask=position < S)
        key = _competing(key, tile, first, last, BLOCK)
        reached += _sum_runs((key >= lowest).to(tl.int32), BLOCK)
        above += _sum_runs((key > highest).to(tl.int32), BLOCK)
        bin = _in_any_order(key, BLOCK) - (lowest + 1)  # the lowest key is counted by `reached`: whole rows may equal it
        tl.atomic_add(table + 1 + bin, 1, mask=bin.to(tl.uint32) < (highest - lowest).to(tl.uint32), sem="relaxed")
        if TOP_P:
            value = _value(tl.maximum(key, 0))
            mass += _sum_runs(value, BLOCK)
            mass_above += _sum_runs(tl.where(key > highest, value, 0.0), BLOCK)
    tl.store(totals + program * 2, tl.sum(reached, 0))
    tl.store(totals + program * 2 + 1, tl.sum(above, 0))
    if TOP_P:
        tl.store(masses + program * 2, tl.sum(mass, 0))
        tl.store(masses + program * 2 + 1, tl.sum(mass_above, 0))


@triton.jit(do_not_specialize=VARYING)
def _settle(
    scores, strides, lengths, stride_length, sources, keys, pitch, B, Hs, S, sinks, recent, width,
    budget, stride_budget, stride_item, splits, windows, tables, totals, masses, held,
    plan,  # [lists, splits, 4] int32: threshold; quota of tokens at it; tokens kept by the splits before; tokens kept
    counts,  # [Lt, B, Hs] int32
    TOP_P: tl.constexpr,
    EXACT: tl.constexpr,  # no score is rounded in its key
    SPLITS: tl.constexpr,  # padded
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    b, row, length, first, last = _list(item, scores, strides, lengths, stride_length, sources, B, Hs, S, sinks, recent, G)
    stored = keys if keys is None else keys + item * pitch
    number, p = _budget(budget + b * stride_budget + item * stride_item, length, first, last, width, TOP_P)
    split = tl.arange(0, SPLITS)
    there = split < splits
    program = item * splits + split

    threshold = KEEP_NONE + 0
    quota = 0
    above = tl.zeros([SPLITS], tl.int32)  # above the threshold, by split
    equal = tl.zeros([SPLITS], tl.int32)
    if _keeps_all_or_none(number, p, first, last):
        if number > 0:  # _write needs no places in a list of all tokens
            above = tl.where(split == 0, last - first, 0)
    else:
        bins = tl.arange(0, WINDOW)
        lowest = tl.load(windows + item * 2)
        size = tl.load(windows + item * 2 + 1) - lowest + 1
        count = tl.zeros([WINDOW], tl.int32)
        for s in range(0, splits, 8):
            some = s + tl.arange(0, 8)
            place = (item * splits + some)[:, None] * WINDOW + bins[None, :]
            count += tl.sum(tl.load(tables + place, mask=(some < splits)[:, None] & (bins < size)[None, :], other=0), 0)
        at_least = tl.load(totals + program * 2, mask=there, other=0)  # the window's lowest key
        above = tl.load(totals + program * 2 + 1, mask=there, other=0)
        count += tl.where(bins == 0, tl.sum(at_least - above, 0) - tl.sum(count, 0), 0)
        reached = tl.sum(above, 0) + tl.cumsum(count, 0, reverse=True)  # by a key and all above
        bin = tl.max(tl.where(reached >= number, bins, -1), 0)
        higher = tl.sum(above, 0) >= number  # the threshold lies above the window
        wanted = tl.full([], float("inf"), tl.float64)
        mass_above = tl.zeros([], tl.float64)
        if TOP_P and p < float("inf"):
            total = tl.sum(tl.load(masses + program * 2, mask=there, other=0), 0)
            mass_above = tl.sum(tl.load(masses + program * 2 + 1, mask=there, other=0), 0)
            wanted = _wanted(p, tl.load(held + item), total, EXACT)
            mass = count * _value(lowest + bins)
            mass_reached = mass_above + tl.cumsum(mass, 0, reverse=True)
            bin = tl.maximum(bin, tl.max(tl.where(mass_reached >= wanted, bins, -1), 0))
            higher = higher | (mass_above >= wanted)
            mass_above += tl.sum(tl.where(bins > bin, mass, 0.0), 0)
        if higher | ((bin < 0) & (lowest > 0)):
            threshold = _bisect(row, stored, length, first, last, number, wanted, TOP_P, G, MEAN, BLOCK)
            above = tl.zeros([SPLITS], tl.int32)
            mass_above = tl.zeros([], tl.float64)
            for s in range(splits):
                start, end = _share(s, splits, length, first, last, BLOCK)
                ties, _ = _reach(row, stored, start, end, first, last, threshold, TOP_P, G, MEAN, BLOCK)
                over, mass_over = _reach(row, stored, start, end, first, last, threshold + 1, TOP_P, G, MEAN, BLOCK)
                above += tl.where(split == s, over, 0)
                equal += tl.where(split == s, ties - over, 0)
                mass_above += mass_over
        else:
            bin = tl.maximum(bin, 0)  # where p is 1 but for rounding, the mass may not be reached
            threshold = lowest + bin
            for start in range(0, size, 64):
                some = start + tl.arange(0, 64)
                place = program[:, None] * WINDOW + some[None, :]
                table = tl.load(tables + place, mask=there[:, None] & (some < size)[None, :], other=0)
                above += tl.sum(tl.where(some > bin, table, 0), 1)
                equal += tl.sum(tl.where(some == bin, table, 0), 1)
            equal = tl.where(bin == 0, at_least - above, equal)
        quota = tl.minimum(number - tl.sum(above, 0), tl.sum(equal, 0))
        if TOP_P and wanted < float("inf"):
            value = _value(threshold)
            missing = tl.maximum(tl.ceil((wanted - mass_above) / tl.where(value > 0, value, 1.0)), 0.0)
            quota = tl.minimum(missing, quota.to(tl.float64)).to(tl.int32)
            quota = tl.where(value > 0, quota, 0)  # zeros add no mass: every positive key is kept

    quotas = tl.minimum(tl.maximum(quota - (tl.cumsum(equal, 0) - equal), 0), equal)
    kept = above + quotas
    plan += program * 4
    tl.store(plan, tl.where(quotas == equal, threshold - 1, threshold), mask=there)
    tl.store(plan + 1, tl.where(quotas == equal, 0, quotas), mask=there)
    tl.store(plan + 2, tl.cumsum(kept, 0) - kept, mask=there)
    tl.store(plan + 3, kept, mask=there)
    tl.store(counts + item, tl.minimum(first + length - last + tl.sum(kept, 0), width))


@triton.jit(do_not_specialize=VARYING)
def _write(
    scores, strides, lengths, stride_length, sources, keys, pitch, B, Hs, S, sinks, recent, width,
    splits, plan, counts,
    indices,  # [Lt, B, Hs, width] int32
    BLOCK: tl.constexpr,
    G: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    # Backwards: what _count read last is still in the L2 cache.
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    item, split = program // splits, (program % splits).to(tl.int32)
    _, row, length, first, last = _list(item, scores, strides, lengths, stride_length, sources, B, Hs, S, sinks, recent, G)
    stored = keys if keys is None else keys + item * pitch
    out = indices + item * width
    count = tl.load(counts + item)
    ahead, stride = split * BLOCK, splits * BLOCK  # the splits take turns with what needs no scores
    if count == length:
        _fill(out, ahead, length, stride, 0, 1, BLOCK)
    else:
        threshold = tl.load(plan + program * 4)  # keys above it are kept
        quota = tl.load(plan + program * 4 + 1)  # and so many of those at it
        slot = first + tl.load(plan + program * 4 + 2)
        start, end = _share(split, splits, length, first, last, BLOCK)
        if tl.load(plan + program * 4 + 3) == 0:
            end = start
        for tile in tl.range(start, end, BLOCK):
            key = _competing(_known_keys(row, stored, tile, G, MEAN, BLOCK), tile, first, last, BLOCK)
            keep = (key > threshold).to(tl.int32)
            if quota > 0:
                tie = (key == threshold).to(tl.int32)
                tie = tl.where(tl.cumsum(tie, 0) <= quota, tie, 0)
                quota -= tl.sum(tie, 0)
                keep += tie
            # Slot and position in one number, since they must keep together; with it -1 for tokens that are dropped.
            place = tl.where(keep > 0, tl.cumsum(keep, 0) * BLOCK + tl.arange(0, BLOCK), -1)
            place = _in_any_order(place, BLOCK)
            tl.store(out + slot - 1 + place // BLOCK, tile + (place & (BLOCK - 1)), mask=place >= 0)
            slot += tl.sum(keep, 0)
        _fill(out, ahead, tl.minimum(first, count), stride, 0, 1, BLOCK)
        recents = tl.maximum(count - (length - last), tl.minimum(first, count))
        _fill(out, recents + ahead, count, stride, last - recents, 1, BLOCK)
    _fill(out, count + ahead, width, stride, -1, 0, BLOCK)


@triton.jit
def _fill(out, start, end, stride, offset, slope, BLOCK: tl.constexpr):
    """out[i] = offset + slope i for the i of every stride-th block from `start` to below `end`."""
    for base in range(start, end, stride):
        i = base + tl.arange(0, BLOCK)
        tl.store(out + i, offset + slope * i, mask=i < end)


@triton.jit
def _list(item, scores, strides, lengths, stride_length, sources, B, Hs, S, sinks, recent, G: tl.constexpr):
    """A list's sequence, its rows, its length, and the tokens first .. last - 1 that compete."""
    h = item % Hs
    b = (item // Hs) % B
    heads = sources + (item // Hs // B * Hs + h) * G
    length = tl.load(lengths + b * stride_length)
    length = tl.minimum(tl.maximum(length, 0), S).to(tl.int32)
    first = tl.minimum(sinks, length)
    last = tl.maximum(length - recent, first)
    row = (scores + b * strides[0], heads, strides[1], strides[2], S)
    return b, row, length, first, last


@triton.jit
def _share(split, splits, length, first, last, BLOCK: tl.constexpr):
    """The tiles of a split's share that hold competing tokens: first position, and the one behind the last."""
    tiles = tl.cdiv(length, BLOCK)
    share = tl.cdiv(tiles, splits)
    start = tl.minimum(split * share, tiles)
    end = tl.minimum(start + share, tl.cdiv(last, BLOCK))
    return tl.maximum(start, first // BLOCK) * BLOCK, end * BLOCK


@triton.jit
def _budget(budget, length, first, last, width, TOP_P: tl.constexpr):
    """Largest number of competing tokens to keep, and p: infinite where the number decides alone."""
    forced = first + length - last
    room = tl.maximum(width - forced, 0)
    p = tl.full([], float("inf"), tl.float64)
    if TOP_P:
        number = room
        p = tl.load(budget).to(tl.float64)
        if p >= 1:
            number = tl.minimum(room, last - first)
            p = tl.full([], float("inf"), tl.float64)
    else:
        number = tl.minimum(tl.maximum(tl.load(budget).to(tl.int64), 0), length).to(tl.int32)
        number = tl.minimum(tl.maximum(number - forced, 0), room)
    return number, p


@triton.jit
def _keeps_all_or_none(number, p, first, last):
    return (number == 0) | ((number == last - first) & (p == float("inf")))


@triton.jit
def _wanted(p, held, total, EXACT: tl.constexpr):
    """Mass that the competing tokens must bring, from that of the forced ones and that of all competing ones.

    Where keys round scores, the kept ones are counted as their keys, the dropped ones as the next: kept (1 - p) >= p dropped c.
    """
    if EXACT:
        wanted = p * (held + total) - held
    else:
        share = p * 1.0078125
        wanted = (share * total - (1 - p) * held) / (1 - p + share)
    return wanted


@triton.jit
def _bisect(
    row, stored, length, first, last, number, wanted, TOP_P: tl.constexpr,
    G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The threshold, bit by bit: the largest key that, with all above, reaches the number or the mass."""
    start, end = _share(0, 1, length, first, last, BLOCK)
    threshold = 0
    for step in range(15):
        trial = threshold + (16384 >> step)
        count, mass = _reach(row, stored, start, end, first, last, trial, TOP_P, G, MEAN, BLOCK)
        if (count >= number) | (mass >= wanted):
            threshold = trial
    return threshold


@triton.jit
def _reach(
    row, stored, start, end, first, last, threshold, TOP_P: tl.constexpr,
    G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count and mass of the keys from `threshold` on in the tiles from `start` to `end`."""
    count = tl.zeros([BLOCK // RUN], tl.int32)
    mass = tl.zeros([BLOCK // RUN], tl.float64)
    for tile in tl.range(start, end, BLOCK):
        key = _competing(_known_keys(row, stored, tile, G, MEAN, BLOCK), tile, first, last, BLOCK)
        count += _sum_runs((key >= threshold).to(tl.int32), BLOCK)
        if TOP_P:
            mass += _sum_runs(tl.where(key >= threshold, _value(key), 0.0), BLOCK)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _mass(row, start, end, G: tl.constexpr, MEAN: tl.constexpr):
    """Sum over the tokens start .. end - 1."""
    total = tl.zeros([1024 // RUN], tl.float64)
    for tile in range(start // 1024 * 1024, end, 1024):
        position = tile + tl.arange(0, 1024)
        key = tl.where((position >= start) & (position < end), _merged_keys(row, position, G, MEAN), 0)
        total += _sum_runs(_value(key), 1024)
    return tl.sum(total, 0)


@triton.jit
def _sum_runs(x, BLOCK: tl.constexpr):
    return tl.sum(tl.reshape(x, [BLOCK // RUN, RUN]), 1)


@triton.jit
def _in_any_order(x, BLOCK: tl.constexpr):
    """The elements of `x` as the threads hold them: a scattered store asks for another order, through shared memory."""
    return tl.reshape(tl.reshape(x, [BLOCK // RUN, RUN]), [BLOCK], can_reorder=True)


@triton.jit
def _known_keys(row, stored, tile, G: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of a tile: those that _count stored, or where it stored none, again from the scores."""
    position = tile + tl.arange(0, BLOCK)
    if stored is None:
        key = _merged_keys(row, position, G, MEAN)
    else:
        key = tl.load(stored + position, mask=position < row[4], other=0).to(tl.int32)
    return key


@triton.jit
def _competing(key, tile, first, last, BLOCK: tl.constexpr):
    """-1 in place of the keys of tokens that do not compete."""
    if (tile < first) | (tile + BLOCK > last):  # few tiles have any
        position = tile + tl.arange(0, BLOCK)
        key = tl.where((position >= first) & (position < last), key, -1)
    return key


@triton.jit
def _merged_keys(row, position, G: tl.constexpr, MEAN: tl.constexpr):
    """Keys, int32, of the merged scores, behind the length too."""
    scores, heads, stride_r, stride_s, S = row
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
        merged = tl.div_rn(merged, tl.full(position.shape, G, tl.float32))
    return merged.to(tl.int32, bitcast=True) >> 16


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
