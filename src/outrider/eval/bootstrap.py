"""Percentile bootstrap over documents (Efron & Tibshirani 1993, chapter 13): how far a mean depends on which were drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Interval = tuple[float, float]

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0


def mean_interval(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval | None:
    """The 95% interval of the mean of one value a document, or of sum(values) / sum(weights); None for one document."""
    documents = len(values)
    if documents < 2:
        return None
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(documents, (RESAMPLES, documents), generator=generator)
    above = torch.tensor(values, dtype=torch.float64)[drawn].sum(1)
    below = torch.tensor([1.0] * documents if weights is None else weights, dtype=torch.float64)[drawn].sum(1)
    low, high = (above / below).quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high


def change_interval(values: Sequence[float], base: Sequence[float]) -> Interval | None:
    """The 95% interval of the mean change in percent, each document paired with its own base: what documents share cancels."""
    return mean_interval([100 * (value / other - 1) for value, other in zip(values, base, strict=True)])
