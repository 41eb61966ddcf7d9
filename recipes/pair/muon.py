"""Muon: momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration.

Matrices of one shape are stacked and orthogonalised together, so that small models are not bound by
kernel launches. After Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move the singular values of each of ``matrices`` [N, rows, columns] near 1 (about 0.7 to 1.2).

    Works in bf16 on CUDA, in fp32 elsewhere; returns the dtype it computed in.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, for matrices alone; decoupled weight decay."""

    def __init__(self, matrices: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        matrices = list(matrices)
        if any(m.ndim != 2 for m in matrices):
            raise ValueError("Muon takes matrices; give embeddings, norms and biases to another optimiser")
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.orthogonalise = orthogonalise

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(group, shape, parameters)

    def _update(self, group: dict, shape: torch.Size, parameters: list[Tensor]) -> None:
        grads = [p.grad for p in parameters]
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
        updates = self.orthogonalise(torch.stack(ahead)).float()
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)
