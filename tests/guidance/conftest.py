"""Synthetic attention masses whose structure the tests know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def peaked(*shape: int, seed: int = 0, sharpness: float = 2.5) -> Tensor:
    """Softmax masses [..., S] with a few heavy tokens, every row its own."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * sharpness).softmax(-1)


def cut(mass: Tensor, lengths: Tensor) -> Tensor:
    """mass [N, ..., S] with zeros at and past each length."""
    past = torch.arange(mass.shape[-1]) >= lengths.view(-1, *(1,) * (mass.dim() - 1))
    return mass.masked_fill(past, 0)


def noisy(mass: Tensor, seed: int, amount: float = 0.5) -> Tensor:
    """A copy of masses [..., S], each entry times a log-normal factor, normalised again."""
    generator = torch.Generator().manual_seed(seed)
    mass = mass * (torch.randn(mass.shape, generator=generator) * amount).exp()
    return mass / mass.sum(-1, keepdim=True)


@pytest.fixture(scope="session")
def masses():
    """The functions above, by name."""
    return {"peaked": peaked, "cut": cut, "noisy": noisy}
