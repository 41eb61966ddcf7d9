"""How a block of keys lies in memory: codes in the order in which tensor cores take them, then the ranges of its channels.

    record = [ D * 2 * bits words of codes ][ D float16 `low` ][ D float16 `step` ]        key ~ low + code * step, by channel

A block is 64 tokens of one KV head. Codes are laid out for a warp: lane `4 g + q` holds tokens `8 g + 2 i + r` (i < 4, r < 2)
and dims `D/4 q + 4 s + 2 h + e` (s < D/16, h, e < 2). A word belongs to one token; its two halves are e = 0 and 1, and in a
half the codes of the (s, h) follow each other from the lowest bits on. A lane has its words in the order of its tokens; four of
them lie together, then those of the next lane.

The kernel takes codes out of their words by an AND alone, half a word's lower and upper eight bits apart. A code at bit n of
eight so counts 2^n times. Its channel's step is stored 2^(5 - n) times as large, which makes up for that; the 2^5 keeps float16
away from its smallest numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # tokens that share the ranges of their channels
EXACT = 64  # newest tokens, at least, whose keys are read as they are
BITS = (2, 4)
LARGEST_STEP = 1024.0  # 2^5 times it is a float16


def record_words(head_dim: int, bits: int) -> int:
    """int32 words of one block of one KV head."""
    return head_dim * (2 * bits + 1)


def coded_blocks(lengths: Tensor) -> Tensor:
    """How many blocks of sequences with so many cached tokens are read as codes; the newest 64 to 127 tokens are not."""
    return (lengths - EXACT).clamp(min=0) // BLOCK


def encode(keys: Tensor, bits: int) -> Tensor:
    """keys [..., 64, D] float32 -> records [..., W] int32."""
    keys = keys + 0.0  # no -0: which of two zeros is the smaller one is nobody's business
    low, factor = keys.amin(-2, keepdim=True), _factors(keys.shape[-1], bits, keys.device)
    levels = low.new_full((), 2**bits - 1)  # on a GPU torch divides by a tensor, but multiplies by the inverse of a number
    step = ((keys.amax(-2, keepdim=True) - low) / levels).clamp(max=LARGEST_STEP)
    stored, low = (step * factor).half(), low.clamp(-65504, 65504).half()
    inverse = torch.where(stored > 0, factor / stored.float(), 0)
    codes = ((keys - low.float()) * inverse).round().clamp(0, 2**bits - 1).long()
    return torch.cat([_pack(codes, bits), torch.cat([low, stored], -1).squeeze(-2).view(torch.int32)], -1)


def decode(records: Tensor, head_dim: int, bits: int) -> Tensor:
    """records [..., W] int32 -> keys [..., 64, D] float32."""
    codes, ranges = records.split([2 * bits * head_dim, head_dim], -1)
    low, stored = ranges.contiguous().view(torch.float16).float().unsqueeze(-2).chunk(2, -1)
    return low + _unpack(codes, head_dim, bits) * (stored / _factors(head_dim, bits, records.device))


def _factors(head_dim: int, bits: int, device: torch.device) -> Tensor:
    """What the step of each dim is stored times, [D]."""
    pair = torch.arange(head_dim, device=device) % (head_dim // 4) // 2
    return torch.exp2(5.0 - pair * bits % 8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[..., 64, D] int64 -> words [..., D * 2 * bits] int32."""
    lead, d = codes.shape[:-2], codes.shape[-1]
    of_token = d * bits // 128  # words of a lane
    codes = codes.reshape(*lead, 8, 4, 2, 4, of_token, 16 // bits, 2)  # g, i, r, q, w, p, e: (s, h) is p + 16 / bits * w
    words = (codes << _shifts(bits, codes.device)).sum((-2, -1))  # g, i, r, q, w
    words = words.movedim((-5, -2), (-2, -1)).flatten(-5, -3)  # (i, r, w), g, q
    words = words.unflatten(-3, (2 * of_token, 4)).movedim(-3, -1).reshape(*lead, 2 * bits * d)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpack(words: Tensor, head_dim: int, bits: int) -> Tensor:
    """Words [..., D * 2 * bits] int32 -> codes [..., 64, D] float32."""
    lead, of_token = words.shape[:-1], head_dim * bits // 128
    words = words.long().reshape(*lead, 2 * of_token, 8, 4, 4).movedim(-1, -3).flatten(-4, -3)  # (i, r, w), g, q
    words = words.unflatten(-3, (4, 2, of_token)).movedim((-2, -1), (-5, -2))  # g, i, r, q, w
    codes = words[..., None, None] >> _shifts(bits, words.device) & 2**bits - 1
    return codes.reshape(*lead, BLOCK, head_dim).float()


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where in a word the codes (p, e) are, [16 / bits, 2]."""
    return bits * torch.arange(16 // bits, device=device)[:, None] + 16 * torch.arange(2, device=device)
