"""How much each layer of a model changes the hidden states of a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outrider.models.cache import KVCache
from outrider.models.language_model import LanguageModel


def hidden_drift(model: LanguageModel, cache: KVCache, tokens: Tensor, chunk: int) -> Tensor:
    """The relative drift of every layer, the mean over tokens of |output - input| / |input|: [L] fp64.

    Reads `tokens` [B, T] densely into the empty `cache`, `chunk` at a time, and leaves it empty.

    Source: Token Sparse Attention (arXiv 2602.03216), of which it tells the layers that may be sparse.
    """
    model = model.unfused()  # hooks see transformers' own layers alone
    layers = model.module.get_decoder().layers
    sums = torch.zeros(len(layers), dtype=torch.float64, device=model.spec.device)

    def measure(index: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            before, after = inputs[0].float(), output.float()
            sums[index] += ((after - before).norm(dim=-1) / before.norm(dim=-1)).sum(dtype=torch.float64)

        return hook

    hooks = [layer.register_forward_hook(measure(index)) for index, layer in enumerate(layers)]
    try:
        for start in range(0, tokens.shape[1], chunk):
            part = tokens[:, start : start + chunk]
            model.forward(part, cache, stop=start + part.shape[1], logits=False)
            cache.advance(part.shape[1])
    finally:
        for hook in hooks:
            hook.remove()
    cache.truncate(0)
    return sums / tokens.numel()
