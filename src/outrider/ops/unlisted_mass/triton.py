"""Unlisted mass in Triton, three launches.

    _sum_rows    score rows x splits: the sum of a part of a row's cached tokens
    _sum_listed  lists x splits: the sum of the scores of a part of a list's tokens, in all of its rows
    _settle      a program per list: adds both up, in a fixed order

Splits share out the length and the count, read on the device; the host looks at shapes alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_SM = 8
MAX_SPLITS = 64
BLOCK = 1024


def obstacle(scores: Tensor) -> str | None:
    """Why these arguments cannot run here, or None if they can."""
    if scores.dtype == torch.float64:
        return "the Triton kernel takes bfloat16, float16 and float32 scores, not float64"
    if scores.device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton needs a CUDA device, or TRITON_INTERPRET=1, not {scores.device.type}"
    return None


def unlisted_mass(scores: Tensor, lengths: Tensor, sources: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    B, R, S = scores.shape
    Lt, Hs, G = sources.shape
    lists, M, device = Lt * B * Hs, indices.shape[3], scores.device
    result = torch.empty(Lt, B, Hs, dtype=torch.float32, device=device)
    if lists == 0:
        return result
    indices = indices if indices.stride(3) == 1 else indices.contiguous()
    # by the work of one sequence: sums are cut, and so rounded, alike in any batch
    row_splits, list_splits = _splits(R, S, device), _splits(Lt * Hs, M, device)
    of_rows = torch.empty(B, R, row_splits, dtype=torch.float32, device=device)
    of_lists = torch.empty(lists, list_splits, dtype=torch.float32, device=device)
    lengths, sources = lengths.contiguous(), sources.contiguous()
    with torch.cuda.device(device) if scores.is_cuda else nullcontext():
        _sum_rows[B * R * row_splits,](
            scores, scores.stride(), lengths, of_rows, R, row_splits, BLOCK=BLOCK,
        )  # fmt: skip
        _sum_listed[lists * list_splits,](
            scores, scores.stride(), sources, indices, indices.stride()[:3], counts, counts.stride(), of_lists,
            B, Hs, M, list_splits, G=G, BLOCK=BLOCK,
        )  # fmt: skip
        _settle[lists,](
            of_rows, of_lists, lengths, sources, counts, counts.stride(), result, B, Hs, R, row_splits, list_splits,
            G=G, SPLITS=MAX_SPLITS,
        )  # fmt: skip
    return result


def _splits(rows: int, width: int, device: torch.device) -> int:
    room = PROGRAMS_PER_SM * _processors(device) // rows
    return max(1, min(room, triton.cdiv(width, BLOCK), MAX_SPLITS))


@lru_cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a number that makes a few splits in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@triton.jit(do_not_specialize=["R", "splits"])
def _sum_rows(scores, strides, lengths, sums, R, splits, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row, split = program // splits, (program % splits).to(tl.int32)
    b = row // R
    scores += b * strides[0] + row % R * strides[1]
    start, end = _part(tl.load(lengths + b).to(tl.int32), split, splits, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(start, end, BLOCK):
        position = at + tl.arange(0, BLOCK)
        total += _score(scores + position.to(tl.int64) * strides[2], position < end)
    tl.store(sums + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=["B", "Hs", "M", "splits"])
def _sum_listed(
    scores, strides, sources, indices, index_strides, counts, count_strides, sums, B, Hs, M, splits,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    item, split = program // splits, (program % splits).to(tl.int32)
    layer, b, h = item // Hs // B, item // Hs % B, item % Hs
    scores += b * strides[0]
    sources += (layer * Hs + h) * G
    indices += layer * index_strides[0] + b * index_strides[1] + h * index_strides[2]
    count = tl.load(counts + layer * count_strides[0] + b * count_strides[1] + h * count_strides[2])
    start, end = _part(tl.minimum(count, M), split, splits, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(start, end, BLOCK):
        slot = at + tl.arange(0, BLOCK)
        position = tl.load(indices + slot, mask=slot < end, other=0).to(tl.int64)
        for g in range(G):
            total += _score(scores + tl.load(sources + g) * strides[1] + position * strides[2], slot < end)
    tl.store(sums + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=["B", "Hs", "R", "row_splits", "list_splits"])
def _settle(
    of_rows, of_lists, lengths, sources, counts, count_strides, result, B, Hs, R, row_splits, list_splits,
    G: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    layer, b, h = item // Hs // B, item // Hs % B, item % Hs
    split = tl.arange(0, SPLITS)
    listed = tl.sum(tl.load(of_lists + item * list_splits + split, mask=split < list_splits, other=0.0), 0)
    each = tl.zeros([SPLITS], tl.float32)
    for g in range(G):
        row = tl.load(sources + (layer * Hs + h) * G + g)
        each += tl.load(of_rows + (b * R + row) * row_splits + split, mask=split < row_splits, other=0.0)
    total = tl.sum(each, 0)
    count = tl.load(counts + layer * count_strides[0] + b * count_strides[1] + h * count_strides[2])
    share = tl.minimum(tl.maximum(1 - listed / tl.where(total > 0, total, 1.0), 0.0), 1.0)
    some = (count < tl.load(lengths + b)) & (total > 0)
    tl.store(result + item, tl.where(some, share, 0.0))


@triton.jit
def _part(size, split, splits, BLOCK: tl.constexpr):
    """First and last but one of a split's part of `size` tokens, in whole blocks."""
    part = tl.cdiv(tl.cdiv(size, splits), BLOCK) * BLOCK
    start = tl.minimum(split * part, size)
    return start, tl.minimum(start + part, size)


@triton.jit
def _score(place, mask):
    x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return tl.where(x > 0, x, 0.0)
