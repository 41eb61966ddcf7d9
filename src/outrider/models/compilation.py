"""Everything of a layer but its attention, compiled by torch.compile.

Layers are compiled one by one: they are alike, so one compilation serves all of a model, and takes seconds where a whole model
takes minutes. The attention function stays outside: the compiler sees a layer up to it and from it on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from outrider.models.attention import NAME, attend

BACKEND = "inductor"


def compile_layers(module: Any) -> None:
    """Compile the decoder layers of `module`, in place. What another process has compiled before comes from a cache."""
    from torch._inductor import config
    from transformers import AttentionInterface

    config.emulate_precision_casts = True  # 16-bit results are rounded where PyTorch rounds them: the tokens stay the same
    AttentionInterface.register(NAME, torch.compiler.disable(attend))
    for layer in _layers(module):
        if layer._compiled_call_impl is None:
            layer.compile(backend=BACKEND)


def has_compiled_layers(module: Any) -> bool:
    return any(layer._compiled_call_impl is not None for layer in _layers(module))


def _layers(module: Any) -> nn.ModuleList:
    """The decoder's layers, whatever the family calls them."""
    return next(child for child in module.get_decoder().children() if isinstance(child, nn.ModuleList))
