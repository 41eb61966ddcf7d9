"""The output layer, as one launch for rounds of few tokens, where it is the last thing that a model computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outrider.ops import fused_linear


@dataclass(frozen=True, slots=True)
class FusedHead:
    """From the decoder's hidden states [B, T, hidden], last norm applied, to logits [B, T, V]."""

    layer: nn.Linear
    backend: str

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return fused_linear(rows, self.layer.weight, self.layer.bias, backend=self.backend).view(*hidden.shape[:-1], -1)


@torch.inference_mode()
def fused_head(module: Any, run: Callable[[], Tensor], backend: str) -> FusedHead | None:
    """The output layer of `module`, or None if it is no plain one, or no kernel of `backend` takes it.

    `run` makes the module compute some logits. They have to be what the output layer gives, and what it reads what the decoder
    gives, bit by bit: a model that scales or caps either keeps its own.
    """
    layer = module.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    seen: list[Tensor] = []
    handles = (
        module.get_decoder().register_forward_hook(lambda _, inputs, output: seen.append(output.last_hidden_state)),
        layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output))),
    )
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    head = FusedHead(layer, backend)
    if len(seen) != 3 or not (torch.equal(seen[0], seen[1]) and torch.equal(seen[2], logits)):
        return None
    try:
        head(seen[0])
    except (TypeError, ValueError):
        return None
    return head
