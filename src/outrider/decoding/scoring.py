"""Score: how much attention the round's queries pay to every cached token, in one pass over the draft's keys."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.models.cache import aligned
from outrider.models.quantized_keys import QuantizedKeys
from outrider.ops import attention_mass
from outrider.ops.quantized_keys import quantized_mass
from outrider.types import DraftScores


def mass_dtype(draft: ModelSpec) -> torch.dtype:
    """Of the masses a draft is scored with: bfloat16 of such a draft on a GPU, where selecting compares 16 bits anyway."""
    if draft.device.type == "cuda" and draft.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.promote_types(draft.dtype, torch.float32)


def score(
    draft: LanguageModel,
    cache: KVCache,
    queries: tuple[Tensor, ...],
    lengths: Tensor,
    layers: tuple[int, ...],
    *,
    per_query: bool,
    quantized: QuantizedKeys | None = None,
) -> DraftScores:
    """Score the cached tokens by the draft's own attention, after drafting and apart from it.

    `queries` holds [B, T, Hq, D] for every draft layer; `lengths` [B] is the number of cached tokens before the
    round, whose T keys lie behind them in `cache`. Only `layers` are read. With `per_query` the T queries are kept apart, else
    averaged. The mass is as wide as the cache; on a CPU, which need not wait to know the lengths, `aligned` to these.
    `quantized` holds records of the same layers and rows, which follow the cache here and are read in place of its keys.
    """
    b, t = queries[0].shape[:2]
    dtype = mass_dtype(draft.spec)
    stop = cache.capacity if lengths.is_cuda else min(aligned(int(lengths.max()) + t), cache.capacity)
    reduce = "none" if per_query else "mean"
    rows = [queries[layer].shape[2] for layer in layers]
    mass = torch.empty(b, *[t] * per_query, sum(rows), stop, dtype=dtype, device=lengths.device)
    if quantized is not None:
        quantized.follow(cache, lengths)
        quantized_mass(
            [queries[layer] for layer in layers],
            [cache.keys(layer, stop) for layer in layers],
            quantized.records,
            lengths,
            bits=quantized.bits,
            scales=[draft.spec.layers[layer].scale for layer in layers],
            reduce=reduce,
            key_scales=[cache.key_scales[layer] for layer in layers],
            dtype=dtype,
            out=mass,
            backend=draft.backend,
        )
    else:
        for layer, out in zip(layers, mass.split(rows, dim=-2), strict=True):
            attention_mass(
                queries[layer],
                cache.keys(layer, stop),
                lengths,
                scale=draft.spec.layers[layer].scale,
                reduce=reduce,
                key_scale=cache.key_scales[layer],
                dtype=dtype,
                out=out,
                backend=draft.backend,
            )
    return DraftScores(mass=mass if per_query else mass[:, None], layers=layers, lengths=lengths)
