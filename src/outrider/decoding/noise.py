"""Common noise: draft, sparse and dense target choose a token by the same random numbers, so they mostly choose the same one.

    E(seed, i, v) ~ Exp(1), independent for every position i and token v: a hash, so whoever asks gets the same
    choice of p at i  =  argmin over v of E(seed, i, v) / p(v)                     is distributed as p

A sequence is then a function of its seed, its prompt and the distributions that somebody holds, as in greedy decoding: a token
that one model has chosen *is* the choice of another one, or it is not. Where two distributions are t apart in total variation
both choose the same token with probability (1 - t) / (1 + t) at least; of all draws together at most 1 - t could be.

Source: the race is Gumbel's maximum in other words; for speculative decoding Daliri, Musco and Suresh (arXiv 2408.07978).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEY_BITS = 52  # of a key: a double holds it exactly
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def key_of(seed: int) -> int:
    """The key of a sequence, in 0 .. 2^52 - 1."""
    return int(torch.randint(2**KEY_BITS, (1,), generator=torch.Generator().manual_seed(seed)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The noise of a batch from some position on."""

    keys: Tensor  # [B] int64
    first: Tensor  # [B] int64: the position, in its text, of the first token to be chosen

    def choose(self, probs: Tensor, skip: int = 0) -> Tensor:
        """The choice of every distribution: probs [B, T, V], of the tokens `skip` behind the first -> [B, T] int64.

        Waits for nothing. A token of probability 0 is never chosen.
        """
        positions = self.first[:, None] + torch.arange(skip, skip + probs.shape[1], device=probs.device)
        state = _mixed(self.keys[:, None] ^ _mixed(positions * GOLDEN))
        tokens = torch.arange(1, probs.shape[2] + 1, device=probs.device)
        bits = _logical_shift(_mixed(state[..., None] + tokens * GOLDEN), 64 - KEY_BITS)
        uniform = (bits.double() + 0.5) * 2.0**-KEY_BITS  # in (0, 1), both ends left out
        return (-uniform.log() / probs.double()).argmin(-1)


def _mixed(numbers: Tensor) -> Tensor:
    """A permutation of int64 in which every bit depends on all: the finalizer of splitmix64 (Steele et al., 2014)."""
    numbers = (numbers ^ _logical_shift(numbers, 30)) * FIRST
    numbers = (numbers ^ _logical_shift(numbers, 27)) * SECOND
    return numbers ^ _logical_shift(numbers, 31)


def _logical_shift(numbers: Tensor, by: int) -> Tensor:
    return (numbers >> by) & (2 ** (64 - by) - 1)
