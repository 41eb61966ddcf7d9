"""A rank's part of a model, by transformers' own plan for tensor parallelism (`tp_plan`).

    colwise            q, k, v, gate, up projections    a rank has some rows of the weight: some heads, some columns of the MLP
    rowwise            output, down projections         some columns; what ranks compute is summed
    colwise gathered   output layer                     some rows; logits of all ranks stand side by side

All else (embedding, norms) every rank has. What is left is transformers' own modules with smaller `nn.Linear`s in them, so
layers are fused and compiled as on one device. A layer's two sums are all that ranks tell each other, T x hidden numbers each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from outrider.errors import ModelError, OptionError
from outrider.models.ranks import Ranks

GATHERED = ("colwise_gather_output", "colwise_rep")  # the second is its name in older releases
STYLES = ("colwise", "rowwise", *GATHERED)
WHOLE = ("embedding_rowwise", "replicated_with_grad_allreduce")  # transformers shares tables, too; a token reads one row
HEADS = ("q_proj", "k_proj", "v_proj")


def check_shards(config: Any, ranks: Ranks, what: str) -> None:
    """Raise OptionError unless the heads and the MLP of a model with this configuration can be shared equally among ranks."""
    own = config.get_text_config(decoder=True)
    names = "num_key_value_heads", "num_attention_heads", "intermediate_size"
    counts = {name: count for name in names if isinstance(count := getattr(own, name, None), int)}
    if any(count % ranks.size for count in counts.values()):
        fitting = [str(n) for n in range(1, min(counts.values()) + 1) if not any(count % n for count in counts.values())]
        shown = ", ".join(f"{name.removeprefix('num_').replace('_', ' ')} {count}" for name, count in counts.items())
        raise OptionError("tensor-parallel", ranks.size, f"{', '.join(fitting)} for {what} ({shown})")


def shard(module: Any, ranks: Ranks, what: str) -> None:
    """Leave this rank's part of a transformers model, in place.

    Raises OptionError where the parts would not be equal, ModelError for a model whose plan has other parts than those above.
    """
    if ranks.size == 1:
        return
    check_shards(module.config, ranks, what)
    plan = {_pattern(name): style for name, style in (module.tp_plan or {}).items()}
    found = {name: (child, plan.get(_pattern(name))) for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    heads = {style for name, (_, style) in found.items() if name.endswith(HEADS)}
    if heads != {"colwise"} or not {*plan.values()} <= {*STYLES, *WHOLE}:
        raise ModelError(
            f"{what} ({module.config.model_type}): transformers' plan for its heads is one that ranks do not follow; allowed: "
            "tensor-parallel 1, or a family whose q_proj, k_proj and v_proj are separate and whose MLP is dense, such as llama"
        )
    for child, style in found.values():
        if style in STYLES and not (style in GATHERED and child.out_features % ranks.size):  # an odd vocabulary stays whole
            _cut(child, style, ranks)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _cut(linear: nn.Linear, style: str, ranks: Ranks) -> None:
    """Keep a rank's part of the weight, a copy: the rest can be freed."""
    weight = linear.weight.data
    bias: Tensor | None = None if linear.bias is None else linear.bias.data
    if style == "rowwise":
        part, shared = weight[:, ranks.own(weight.shape[1])], bias if ranks.leads else None
    else:
        own = ranks.own(weight.shape[0])
        part, shared = weight[own], None if bias is None else bias[own]
    linear.weight = nn.Parameter(part.clone(), requires_grad=False)
    linear.register_parameter("bias", None if shared is None else nn.Parameter(shared.clone(), requires_grad=False))
    linear.out_features, linear.in_features = part.shape
    if style == "rowwise":
        linear.register_forward_hook(_behind(ranks.sum))
    elif style in GATHERED:
        linear.register_forward_hook(_behind(ranks.gather))


def _behind(collective: Callable[[Tensor], Tensor]) -> Any:
    """A hook that brings what a module has computed to all ranks. The compiler sees a layer up to it and from it on."""
    return torch.compiler.disable(lambda module, given, output: collective(output))
