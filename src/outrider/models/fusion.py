"""Projections that read the same input become one product: fewer, larger reads of weights when a forward has few tokens.

    q_proj, k_proj, v_proj     ->  one matrix [(Hq + 2 Hkv) D, hidden]
    gate_proj, up_proj         ->  one matrix [2 intermediate, hidden]

The modules stay where they are, as `Part`s of the matrix, so that transformers' own forward runs unchanged: the first one that
is called computes all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Product:
    """The common matrix, and the product until every part has taken its share."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.bias = torch.cat([layer.bias.data for layer in layers]) if layers[0].bias is not None else None
        self.parts = len(layers)
        self.waiting = 0  # parts that have not taken theirs
        self.output: Tensor | None = None

    def share(self, inputs: Tensor, start: int, stop: int) -> Tensor:
        if self.output is None:
            self.output, self.waiting = linear(inputs, self.weight, self.bias), self.parts
        output = self.output
        self.waiting -= 1
        if self.waiting == 0:
            self.output = None
        return output[..., start:stop]


class Part(nn.Module):
    """Some rows of a common matrix, called like the `nn.Linear` it replaces."""

    def __init__(self, product: _Product, start: int, stop: int) -> None:
        super().__init__()
        self.product, self.start, self.stop = product, start, stop
        self.weight = nn.Parameter(product.weight[start:stop], requires_grad=False)
        self.bias = None if product.bias is None else nn.Parameter(product.bias[start:stop], requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.product.share(inputs, self.start, self.stop)


def fuse_projections(module: nn.Module) -> int:
    """Fuse what can be fused, in place, on the device where the weights are; returns how many matrices were made."""
    made = 0
    for parent in list(module.modules()):
        for names in SIBLINGS:
            layers = [layer for name in names if type(layer := getattr(parent, name, None)) is nn.Linear]
            if len(layers) < len(names) or len({_kind(layer) for layer in layers}) > 1:
                continue
            product, start = _Product(layers), 0
            for name, layer in zip(names, layers, strict=True):
                setattr(parent, name, Part(product, start, start + layer.out_features))
                start += layer.out_features
            made += 1
    return made


def _kind(layer: nn.Linear) -> tuple[int, bool, torch.dtype, torch.device]:
    """What must agree for a common matrix."""
    return layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device
