"""The product in plain PyTorch, rounded where transformers' layers round: the specification of the op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, norm: Tensor | None, eps: float, swiglu: bool, residual: Tensor | None
) -> Tensor:
    if norm is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        x = norm * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = linear(x, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = silu(gate) * up
    return y if residual is None else residual + y
