"""From logits to the distributions tokens are drawn from, and the draw itself: on the device, whatever the rows ask for."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.config import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The sampling parameters of the rows of a batch. The two flags say on the host what no row needs."""

    temperature: Tensor  # [B] fp32; 0 is greedy
    top_k: Tensor  # [B] int64; 0 is off
    top_p: Tensor  # [B] fp32; 1 is off
    greedy: bool  # every row is greedy: distributions are one-hot
    filtered: bool  # some row has a top-k or top-p

    @classmethod
    def of(cls, params: Rows[SamplingParams], device: torch.device | str = "cpu") -> Sampling:
        return cls(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            greedy=all_greedy(params),
            filtered=any_filtered(params),
        )


def all_greedy(params: Rows[SamplingParams]) -> bool:
    return all(p.temperature == 0 for p in params)


def any_filtered(params: Rows[SamplingParams]) -> bool:
    return any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params)


def greedy(logits: Tensor) -> Tensor:
    """The most probable token: logits [B, T, V] -> [B, T] int64."""
    best, place = in_parts(logits).max(-1)
    part = best.argmax(-1, keepdim=True)
    return (part * (logits.shape[-1] // best.shape[-1]) + place.gather(-1, part))[..., 0]


def in_parts(logits: Tensor) -> Tensor:
    """[..., V] as [..., parts, width], to be reduced in two steps: a long row alone would keep few multiprocessors busy."""
    width = next((width for width in (256, 128, 64, 32, 16) if logits.shape[-1] % width == 0), logits.shape[-1])
    return logits.unflatten(-1, (-1, width))


def distributions(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution each row samples from: logits [B, T, V] of any float dtype -> probs [B, T, V] fp32.

    Temperature, then top-k, then top-p, each renormalised. Greedy rows become one-hot, so that greedy and sampled rows pass
    through the same verification.
    """
    logits = logits.float()
    best = torch.zeros_like(logits).scatter_(-1, greedy(logits)[..., None], 1)
    if sampling.greedy:
        return best
    temperature, top_k, top_p = (x[:, None, None] for x in (sampling.temperature, sampling.top_k, sampling.top_p))
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=1e-30)  # no overflow however low it is
    if sampling.filtered:
        logits = _filter(logits, top_k, top_p)
    return torch.where(temperature == 0, best, logits.softmax(-1))


def _filter(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Without the tokens that top-k and then top-p drop; ties with the k-th stay."""
    width = logits.shape[-1]
    ordered, order = logits.sort(descending=True)
    last = torch.where((top_k > 0) & (top_k < width), top_k, width) - 1
    kth = ordered.gather(-1, last.expand(*logits.shape[:-1], 1))
    ordered = ordered.masked_fill(ordered < kth, float("-inf"))
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the more probable tokens
    dropped = ordered.isneginf() | ((before >= top_p) & (top_p < 1))
    return logits.masked_fill(torch.zeros_like(dropped).scatter_(-1, order, dropped), float("-inf"))


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverse CDF: probs [B, V], uniforms [B] in [0, 1) -> [B] int64."""
    cumulative = probs.double().cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)
