"""Score: how much attention a round's queries, or those of a prompt's blocks, pay to every cached token."""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.models.cache import aligned
from outrider.models.quantized_keys import QuantizedKeys
from outrider.ops import attention_mass, block_mass
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
    Of a draft whose heads are shared among ranks each scores its own, and has all scores then.
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
    mass = _of_all_heads(mass, draft, len(layers))
    return DraftScores(mass=mass if per_query else mass[:, None], layers=layers, lengths=lengths)


def _of_all_heads(mass: Tensor, draft: LanguageModel, layers: int) -> Tensor:
    """Masses [..., R, S] of all ranks' draft heads; rows go by layer, then by head."""
    if draft.ranks.size == 1:
        return mass
    return draft.ranks.gather(mass.unflatten(-2, (layers, -1)), dim=-2).flatten(-3, -2)


def score_blocks(
    draft: LanguageModel,
    cache: KVCache,
    queries: tuple[Tensor, ...],
    logsumexp: tuple[Tensor, ...],
    layers: tuple[int, ...],
    *,
    block: int,
    start: int,
    stop: int,
    listed: dict[int, Tensor] | None = None,
) -> DraftScores:
    """Score what lies before each block of a prompt's chunk by the draft's own attention, averaged over the block's queries.

    For every draft layer `queries` holds [B, T, Hq, D] and `logsumexp` the log of their softmax denominators [B, Hq, T], as
    attention has left it. The keys of these tokens lie behind the `start` cached ones that every sequence has, and no sequence
    has more than `stop` tokens, these included. The result has a row for each block of each sequence, in this order: its
    lengths are the tokens before the block. Only `layers` are read.

    `listed` has, by layer, which earlier blocks of tokens each of these blocks has read [B, NB, Hkv, blocks of the cache] bool:
    the others have mass 0. A layer that is not in it has read all.
    """
    b, t = queries[0].shape[:2]
    starts = torch.arange(start, start + t, block, device=cache.device).expand(b, -1)
    rows = [queries[layer].shape[2] for layer in layers]
    shape = b, starts.shape[1], sum(rows), min(aligned(stop), cache.capacity)
    mass = torch.empty(shape, dtype=mass_dtype(draft.spec), device=cache.device)
    for layer, out in zip(layers, mass.split(rows, dim=2), strict=True):
        block_mass(
            queries[layer],
            cache.keys(layer, shape[-1]),
            starts[:, 0].contiguous(),
            block=block,
            scale=draft.spec.layers[layer].scale,
            logsumexp=logsumexp[layer],
            listed=None if listed is None or layer not in listed else listed[layer][..., : -(-shape[-1] // block)],
            span=block,
            key_scale=cache.key_scales[layer],
            dtype=mass.dtype,
            out=out,
            backend="auto" if draft.backend == "cuda" else draft.backend,  # it has no kernel in CUDA C++
        )
    mass = _of_all_heads(mass, draft, len(layers))
    return DraftScores(mass=mass.flatten(0, 1)[:, None], layers=layers, lengths=starts.flatten())
