"""Everything of a layer but its attention, compiled by torch.compile.

Layers are compiled one by one: they are alike, so one compilation serves all of a model, and takes seconds where a whole model
takes minutes. The attention function stays outside: the compiler sees a layer up to it and from it on. So are the small modules
around the layers, position encoding and last norm, which are a dozen launches otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from outrider.models.attention import NAME, attend

BACKEND = "inductor"
SHAPES = 64  # that a layer is compiled for: by rows and tokens, in all models of a family together


def compile_layers(module: Any) -> None:
    """Compile the decoder layers of `module` and what is around them, in place. What was compiled before comes from a cache."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config
    from transformers import AttentionInterface

    dynamo.recompile_limit = max(dynamo.recompile_limit, SHAPES)  # beyond it layers would run uncompiled
    config.emulate_precision_casts = True  # 16-bit results are rounded where PyTorch rounds them: the tokens stay the same
    config.combo_kernels = True  # kernels that do not depend on each other, such as the rotations of queries and keys, as one
    AttentionInterface.register(NAME, torch.compiler.disable(attend))
    for part in _parts(module):
        if not _is_compiled(part):
            route: Any = part._compiled_call_impl  # None, or to a fused layer: it stays, in front of what is compiled
            part.compile(backend=BACKEND)
            if route is not None:
                part._compiled_call_impl = replace(route, own=part._compiled_call_impl)


def has_compiled_layers(module: Any) -> bool:
    return any(_is_compiled(part) for part in _parts(module))


def _is_compiled(part: nn.Module) -> bool:
    call = part._compiled_call_impl
    return getattr(call, "own", call) not in (None, part._call_impl)


def decoder_layers(module: Any) -> Iterator[nn.Module]:
    """The layers of a decoder, whatever the family calls their list."""
    for child in module.get_decoder().children():
        if isinstance(child, nn.ModuleList):
            yield from child


def _parts(module: Any) -> Iterator[nn.Module]:
    """What a decoder is made of: its layers, one by one, and all else but the embedding."""
    yield from decoder_layers(module)
    yield from (child for child in module.get_decoder().children() if not isinstance(child, nn.ModuleList | nn.Embedding))
