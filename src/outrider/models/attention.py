"""The attention function that transformers calls in every layer: append to the cache, then attend densely or to lists.

It reaches a model through transformers' `AttentionInterface` under the name "outrider"; everything it needs about the running
forward travels as the forward argument `outrider` (a `Forward`), never through module state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from outrider.errors import ModelError
from outrider.models.cache import KVCache, LayerShape, aligned
from outrider.models.quantization import dequantize
from outrider.ops import chunk_attention, sparse_attention
from outrider.ops.chunk_attention import kernel_obstacle
from outrider.types import BlockLists, Lists, PromptAttention

NAME = "outrider"
DENSE_BLOCK = 1024  # queries of a prompt read at once that the reference attends with at a time
ROUND = 16  # query tokens up to which the op for rounds is used, which needs no length on the host
UNROUTABLE = ("softcap", "s_aux", "position_bias", "head_mask")  # change the scores in ways that our ops do not compute


@dataclass(slots=True, kw_only=True)
class Forward:
    """One running forward of T tokens over a cache."""

    cache: KVCache
    stop: int  # on the host: no sequence has more tokens, the new ones included
    selection: Lists | BlockLists | PromptAttention | None = None  # None: every layer reads its whole cache (or window)
    queries: list[Tensor] | None = None  # when a list: receives [B, T, Hq, D] of every layer
    logsumexp: list[Tensor] | None = None  # when a list: receives the log of every query's softmax denominator, [B, Hq, T] fp32
    backend: str = "auto"
    ends: int | None = None  # nobody reads what this layer adds to the hidden states: a fused one stops at the cache
    parts: tuple[Forward, ...] = ()  # forwards over the same cache, whose rows stand one behind the other in this one's
    probe: dict[int, LayerShape] | None = None  # when a dict: layers only report their shape here
    # layers that run in other launches than transformers' own (see `fused_layer`): of hidden states, (cos, sin) and this
    fused: Mapping[int, Callable[[Tensor, tuple[Tensor, Tensor], Forward], Tensor]] = field(default_factory=dict)
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window: made once, used by every layer


def register() -> None:
    """Make "outrider" known to transformers: the attention function, and a mask function that builds no mask.

    The mask must be registered under the same name, or transformers would silently leave causality to chance.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def attend(
    module: Any,  # transformers' attention layer
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    outrider: Forward | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, Hq, T, D], key and value [B, Hkv, T, D] -> ([B, T, Hq, D], None).

    Raises ModelError when the layer asks for a score function that Outrider does not compute.
    """
    if outrider is None:
        raise ModelError("attention 'outrider' was called without its forward argument; run the model through LanguageModel")
    unroutable = [name for name in UNROUTABLE if kwargs.get(name) is not None]
    if unroutable:
        raise ModelError(
            f"layer {module.layer_idx} of {type(module).__name__} uses {', '.join(unroutable)}, which Outrider cannot route"
        )
    if not getattr(module, "is_causal", True):
        raise ModelError(f"layer {module.layer_idx} of {type(module).__name__} is not causal, which Outrider cannot route")
    if outrider.parts:
        rows = zip(*(x.chunk(len(outrider.parts)) for x in (query, key, value)), strict=True)
        options = {"scaling": scaling, "sliding_window": sliding_window, **kwargs}
        found = [attend(module, *own, outrider=part, **options)[0] for part, own in zip(outrider.parts, rows, strict=True)]
        return torch.cat(found), None
    layer = int(module.layer_idx)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if value.shape != key.shape or query.shape[1] % key.shape[1]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ModelError(
            f"layer {layer} of {type(module).__name__} has {shapes}; allowed: equal key and value heads, grouped queries"
        )
    if outrider.probe is not None:
        outrider.probe[layer] = LayerShape(
            query_heads=query.shape[1], kv_heads=key.shape[1], head_dim=key.shape[3], scale=scale, window=sliding_window
        )
        return torch.zeros_like(query).transpose(1, 2), None
    append_backend = "auto" if outrider.backend == "cuda" else outrider.backend  # it has no kernel in CUDA C++
    outrider.cache.append(layer, key.transpose(1, 2), value.transpose(1, 2), append_backend)
    return attend_cached(query.transpose(1, 2), outrider, layer, scale, sliding_window), None


def record(queries: Tensor, forward: Forward) -> None:
    """Keep a layer's queries [B, T, Hq, D] where the forward asks for them."""
    if forward.queries is not None:
        forward.queries.append(queries)


def attend_cached(queries: Tensor, forward: Forward, layer: int, scale: float, window: int | None) -> Tensor:
    """Attention of queries [B, T, Hq, D] whose own keys and values are in the cache already -> [B, T, Hq, D].

    Records the queries. A layer reads its lists, its window or the whole cache, or a method attends in its place.
    """
    record(queries, forward)
    cache, selection = forward.cache, forward.selection
    if isinstance(selection, BlockLists):
        return _chunk_attention(queries, forward, layer, scale, window, *selection.of(layer, queries), block=selection.block)
    if isinstance(selection, PromptAttention):
        if (output := selection.prompt_attention(layer, queries)) is not None:
            return output
        return _chunk_attention(queries, forward, layer, scale, window, None, None, block=DENSE_BLOCK)
    long = queries.shape[1] > ROUND
    if forward.logsumexp is not None or (long and selection is None and _has_kernel(queries, forward, layer, scale, window)):
        return _chunk_attention(queries, forward, layer, scale, window, None, None, block=queries.shape[1])
    indices, counts = selection.of(layer, queries) if selection is not None else (None, None)
    if counts is None and long:
        output = _prefill_attention(queries.transpose(1, 2), forward, layer, scale, window)
        return output if selection is None else selection.attended(layer, queries, output)
    unlisted_values, unlisted_shares = selection.unlisted_of(layer) if selection is not None else (None, None)
    output = sparse_attention(
        queries,
        cache.keys(layer),
        cache.values(layer),
        indices,
        counts,
        cache.lengths,
        scale=scale,
        key_scale=cache.key_scales[layer],
        value_scale=cache.value_scales[layer],
        window=window if counts is None else None,
        unlisted_values=unlisted_values,
        unlisted_shares=unlisted_shares,
        logsumexp=selection.logsumexp_of(layer, queries) if selection is not None else None,
        backend=forward.backend,
    )
    return output if selection is None else selection.attended(layer, queries, output)


def _has_kernel(queries: Tensor, forward: Forward, layer: int, scale: float, window: int | None) -> bool:
    """Dense chunks, too, are faster by our kernel than by PyTorch's, but in fp32, where it computes in fp64."""
    if forward.backend == "reference" or queries.dtype == torch.float32 or not queries.is_cuda:
        return False
    keys = forward.cache.keys(layer, 1)
    return kernel_obstacle(queries, keys, scale, window=window, backend=forward.backend) is None


def _chunk_attention(
    queries: Tensor,
    forward: Forward,
    layer: int,
    scale: float,
    window: int | None,
    indices: Tensor | None,
    counts: Tensor | None,
    *,
    block: int,
) -> Tensor:
    """Attention of a chunk's queries [B, T, Hq, D], whose blocks may have lists of their own -> [B, T, Hq, D]."""
    cache, (b, t, heads, _) = forward.cache, queries.shape
    logsumexp = None
    if forward.logsumexp is not None:
        logsumexp = torch.empty(b, heads, t, dtype=torch.float32, device=queries.device)
        forward.logsumexp.append(logsumexp)
    stop = min(aligned(forward.stop), cache.capacity)  # lists may be as wide
    return chunk_attention(
        queries,
        cache.keys(layer, stop),
        cache.values(layer, stop),
        indices,
        counts,
        cache.lengths,
        block=block,
        scale=scale,
        key_scale=cache.key_scales[layer],
        value_scale=cache.value_scales[layer],
        window=window if indices is None else None,
        logsumexp=logsumexp,
        backend=forward.backend,
    )


def _prefill_attention(query: Tensor, forward: Forward, layer: int, scale: float, window: int | None) -> Tensor:
    """Causal attention of T queries [B, Hq, T, D] over the whole cache (or the last `window` tokens) -> [B, T, Hq, D]."""
    cache, stop = forward.cache, forward.stop
    t = query.shape[2]
    # what is cached is what is attended to, the new rows too: an 8-bit cache gives the same whatever the length of chunks
    keys = dequantize(cache.keys(layer, stop), cache.key_scales[layer], query.dtype).transpose(1, 2)  # [B, Hkv, S + T, D]
    values = dequantize(cache.values(layer, stop), cache.value_scales[layer], query.dtype).transpose(1, 2)
    if stop == t and window is None:  # an empty cache: plain causal attention, no mask to read
        output = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        return output.transpose(1, 2)
    if window not in forward.masks:
        forward.masks[window] = _causal_bias(cache.lengths, t, stop, window, query.dtype)
    bias = forward.masks[window]  # [B, 1, T, S + T]
    return scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale, enable_gqa=True).transpose(1, 2)


def _causal_bias(lengths: Tensor, t: int, stop: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, stop]: 0 where query t at position lengths[b] + t sees key j, -inf elsewhere."""
    keys = torch.arange(stop, device=lengths.device)
    positions = (lengths[:, None] + torch.arange(t, device=lengths.device))[:, :, None]  # [B, T, 1]
    hidden = keys > positions
    if window is not None:
        hidden |= keys <= positions - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return bias.masked_fill_(hidden, float("-inf"))[:, None]
