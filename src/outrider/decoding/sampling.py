"""From logits to the distributions tokens are drawn from, and the draw itself."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from outrider.config import SamplingParams


def distributions(logits: Tensor, params: Rows[SamplingParams]) -> Tensor:
    """The distribution each row samples from: logits [B, T, V] fp32 and one `SamplingParams` a row -> probs [B, T, V] fp32.

    Greedy rows become one-hot, so that greedy and sampled rows pass through the same verification.
    """
    return torch.stack([_distribution(row, p) for row, p in zip(logits, params, strict=True)])


def _distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """[T, V] -> [T, V]: temperature, then top-k, then top-p, each renormalised."""
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, 1e-30)  # no overflow however low it is
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the more probable tokens
        logits = logits.masked_fill((before >= params.top_p).scatter(-1, order, before >= params.top_p), float("-inf"))
    return logits.softmax(-1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverse CDF: probs [B, V], uniforms [B] in [0, 1) -> [B] int64."""
    cumulative = probs.double().cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)
