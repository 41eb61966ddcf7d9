"""A decoder layer in six launches, for rounds of few tokens, or ten, for chunks of a prompt.

    launch           from                             to
    fused_linear     hidden states                    projected [B, T, Hq + 2 Hkv, D]: input norm, common projection
    rotary_append    projected, cos and sin           queries [B, T, Hq, D]; keys and values go into the cache
    attention        queries, cache, token lists      mixed [B, T, Hq, D]
    fused_linear     mixed, hidden states             hidden states: output projection, residual
    fused_linear     hidden states                    gated [B T, intermediate]: norm behind attention, gate, up, SwiGLU
    fused_linear     gated, hidden states             hidden states: down projection, residual

Of a chunk's many tokens products are PyTorch's, and the norms and the activation launches of their own (`fused_linear`).

Llama, Mistral, Qwen2, Qwen3 and many others have this layer; the kernels take bfloat16. `recognise` tells by its parts which
layer may be one; whether it is one, is measured (`agreement`). transformers' own model goes on calling its layers: a `route` in
front of a layer takes the fused path in forwards that bring it (`Forward.fused`), and the layer's own in all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outrider.models.attention import Forward, attend_cached, record
from outrider.models.fusion import SIBLINGS, Part
from outrider.models.ranks import ALONE, Ranks
from outrider.ops import fused_linear, rotary_append
from outrider.ops.fused_linear import MAX_ROWS

QKV, GATE_UP = SIBLINGS
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")  # an attention layer has both or none


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """The path through the weights of one of transformers' layers, its projections common matrices (`fusion`)."""

    layer: Any
    index: int
    backend: str  # of `fused_linear` (few rows) and `rotary_append`; attention has the forward's
    ranks: Ranks = ALONE  # the residual is added by the first one alone

    def __call__(self, hidden: Tensor, position: tuple[Tensor, Tensor], forward: Forward) -> Tensor:
        """Hidden states [B, T, hidden], and cos and sin [B, T, D] of their positions -> hidden states.

        Raises OptionError when the cache has no room (on a CPU), ValueError or TypeError for what the ops do not take.
        """
        attention, mlp = self.layer.self_attn, self.layer.mlp
        B, T, _ = hidden.shape
        forward.cache.check_room(T)
        rows = hidden.reshape(B * T, -1)
        projected = self._linear(rows, attention.q_proj.product, norm=self.layer.input_layernorm)
        mixed = self._attend(projected.view(B, T, -1, forward.cache.layers[self.index].head_dim), position, forward)
        if forward.ends == self.index:
            return hidden
        rows = self._summed(mixed.reshape(B * T, -1), attention.o_proj, rows)
        gated = self._linear(rows, mlp.gate_proj.product, norm=self.layer.post_attention_layernorm, swiglu=True)
        return self._summed(gated, mlp.down_proj, rows).view(B, T, -1)

    def _attend(self, projected: Tensor, position: tuple[Tensor, Tensor], forward: Forward) -> Tensor:
        """What the heads mix [B, T, Hq, D] from projected queries, keys and values; the queries where nobody reads that."""
        if forward.parts:
            n = len(forward.parts)
            rows = zip(forward.parts, projected.chunk(n), *(x.chunk(n) for x in position), strict=True)
            return torch.cat([self._attend(own, (cos, sin), part) for part, own, cos, sin in rows])
        attention, cache = self.layer.self_attn, forward.cache
        shape, query_norm = cache.layers[self.index], getattr(attention, "q_norm", None)
        queries = rotary_append(
            projected,
            *position,
            cache.keys(self.index),
            cache.values(self.index),
            cache.lengths,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if query_norm is None else attention.k_norm.weight,
            eps=1e-6 if query_norm is None else query_norm.variance_epsilon,
            key_scale=cache.key_scales[self.index],
            value_scale=cache.value_scales[self.index],
            backend=self.backend,
        )
        if forward.ends == self.index and forward.logsumexp is None:
            record(queries, forward)
            return queries
        return attend_cached(queries, forward, self.index, shape.scale, shape.window)

    def _summed(self, rows: Tensor, matrix: Any, residual: Tensor) -> Tensor:
        """What all ranks make of their columns of a matrix, and the residual."""
        return self.ranks.sum(self._linear(rows, matrix, residual=residual if self.ranks.leads else None))

    def _linear(self, rows: Tensor, matrix: Any, norm: Any = None, **options: Any) -> Tensor:
        if norm is not None:
            options |= {"norm": norm.weight, "eps": norm.variance_epsilon}
        backend = "triton" if self.backend == "cuda" and len(rows) > MAX_ROWS else self.backend
        return fused_linear(rows, matrix.weight, matrix.bias, **options, backend=backend)


def recognise(layer: Any, backend: str, ranks: Ranks = ALONE) -> FusedLayer | None:
    """`layer` as a fused one, if it has the parts of one and no others; None otherwise."""
    if _parts(layer) != {"self_attn", "mlp", *NORMS}:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = [getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)]
    fits = (
        _parts(attention) in ({*QKV, "o_proj"}, {*QKV, "o_proj", *HEAD_NORMS})
        and _parts(mlp) == {*GATE_UP, "down_proj"}
        and all(_is_common(parent, names) for parent, names in ((attention, QKV), (mlp, GATE_UP)))
        # what derives from nn.Linear, adapters and quantised ones, computes something else
        and type(attention.o_proj) is nn.Linear
        and type(mlp.down_proj) is nn.Linear
        and all(_is_norm(norm) for norm in (*(getattr(layer, name) for name in NORMS), *head_norms))
        and len({norm.variance_epsilon for norm in head_norms}) <= 1
    )
    return FusedLayer(layer, int(attention.layer_idx), backend, ranks) if fits else None


def route(layer: Any, index: int) -> None:
    """Let calls of `layer` take its fused path in forwards that bring one. In place, once.

    It stands where a compiled call would, in front of the layer's own call, compiled or not. So the compiler never sees it, and
    a copy of the layer comes without it, as it comes without what was compiled.
    """
    if not isinstance(layer._compiled_call_impl, _Route):
        layer._compiled_call_impl = _Route(index, layer._compiled_call_impl or layer._call_impl)


@dataclass(frozen=True, slots=True)
class _Route:
    index: int
    own: Any  # the layer's call as it was

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward: Forward | None = kwargs.get("outrider")
        if forward is None or self.index not in forward.fused:
            return self.own(hidden_states, *args, **kwargs)
        return forward.fused[self.index](hidden_states, kwargs["position_embeddings"], forward)


def _parts(module: nn.Module) -> set[str]:
    """Names of the children that have weights. What activations do shows when it is measured; dropout does nothing."""
    return {name for name, child in module.named_children() if next(child.parameters(), None) is not None}


def _is_common(parent: Any, names: tuple[str, ...]) -> bool:
    parts = [getattr(parent, name) for name in names]
    return all(type(part) is Part for part in parts) and all(part.product is parts[0].product for part in parts)


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "variance_epsilon") and [name for name, _ in module.named_parameters()] == ["weight"]
