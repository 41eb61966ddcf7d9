"""What stands for the tokens that lists leave out: fitted on a calibration text, for every method and map.

A list of a head leaves out a share u of the draft's mass. Its output o becomes `(1 - w u) o + w u m`: m is the mean of the KV
head's values cached for the text, and w, by query head, is fitted by least squares of what dense attention makes of the same
queries, over rounds spread over the text and over lists of several budgets at once, so that one number serves them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
from torch import Tensor

from outrider.config import Budget
from outrider.decoding.prefill import ProgressCallback
from outrider.guidance.selectors import SELECTORS, build_selector
from outrider.models import KVCache, LanguageModel
from outrider.models.quantization import dequantize
from outrider.ops import attention_mass, sparse_attention
from outrider.types import Alignment, DraftScores, Selection, UnlistedFit

KEEPS = (0.02, 0.05, 0.1, 0.2)
ROUNDS_AT_ONCE = 8  # bounds the memory of the draft's masses

Seen = tuple[KVCache, list[Tensor]]  # a text in a model's cache, and by layer the queries of its rounds [N, T, Hq, D]


def fit_unlisted(
    target: LanguageModel,
    draft: LanguageModel,
    alignments: Mapping[str, Alignment],
    seen: Mapping[str, Seen],
    starts: Tensor,
    progress: ProgressCallback | None = None,
) -> dict[str, Alignment]:
    """The alignments, each with a fit for every method.

    `seen` holds the text as "target" and "draft" have read it, `starts` [N] the cached tokens before each round.
    """
    values = _mean_values(target, seen["target"][0])
    ones = UnlistedFit(values=values, weights=torch.ones(len(values), target.spec.full_shape.query_heads, device=values.device))
    selectors = {  # with a weight of 1, so that a round's shares are the unlisted masses
        (name, method, keep): build_selector(
            method,
            alignment=Alignment(sources=alignments[name].sources.to(values.device), unlisted={method: ones}),
            budget=Budget(keep=keep, min_context=0, unlisted="mean"),
            target_layers=target.spec.full_layers,
            kv_heads=target.spec.full_shape.kv_heads,
            draft_heads=draft.spec.full_shape.query_heads,
            backend=target.backend,
        )
        for name, method, keep in product(alignments, SELECTORS, KEEPS)
    }
    sums = {
        (name, method): torch.zeros(2, *ones.weights.shape, dtype=torch.float64, device=values.device)
        for name, method in product(alignments, SELECTORS)
    }
    for at in range(0, len(starts), ROUNDS_AT_ONCE):
        rounds = slice(at, at + ROUNDS_AT_ONCE)
        lengths = starts[rounds].to(values.device)
        scored = sorted({layer for selector in selectors.values() for layer in selector.draft_layers})
        mass = {layer: _mass(draft, *seen["draft"], layer, rounds, lengths) for layer in scored}
        dense = dict(_outputs(target, *seen["target"], rounds, lengths, None))
        for (name, method, _), selector in selectors.items():
            each = torch.cat([mass[layer] for layer in selector.draft_layers], dim=2)  # [b, T, R, S]
            each = each if selector.per_query else each.mean(1, keepdim=True)
            selection = selector.select(DraftScores(mass=each, layers=selector.draft_layers, lengths=lengths))
            for layer, out in _outputs(target, *seen["target"], rounds, lengths, selection):
                sums[name, method][:, layer] += _products(out, dense[layer], *selection.unlisted_of(layer))
        if progress is not None:
            progress("fit what stands for unlisted tokens", min(at + ROUNDS_AT_ONCE, len(starts)), len(starts))
    return {
        name: Alignment(
            sources=alignment.sources,
            unlisted={
                method: UnlistedFit(values=values.cpu(), weights=_weights(*sums[name, method]).cpu()) for method in SELECTORS
            },
        )
        for name, alignment in alignments.items()
    }


def _mean_values(target: LanguageModel, cache: KVCache) -> Tensor:
    """[Lt, Hkv, D] fp32: of all tokens cached; zeros in layers with a window."""
    shape, stop = target.spec.full_shape, int(cache.lengths)
    means = torch.zeros(len(target.spec.layers), shape.kv_heads, shape.head_dim, device=target.spec.device)
    for layer in target.spec.full_layers:
        means[layer] = dequantize(cache.values(layer, stop), cache.value_scales[layer], torch.float32)[0].mean(0)
    return means


def _mass(draft: LanguageModel, cache: KVCache, queries: list[Tensor], layer: int, rounds: slice, lengths: Tensor) -> Tensor:
    """[b, T, Hq, S] fp32: softmax mass of the rounds' queries on the tokens before them."""
    asked, s = queries[layer][rounds], int(lengths.max())
    keys = cache.keys(layer, s + asked.shape[1]).expand(len(asked), -1, -1, -1)
    scale = draft.spec.layers[layer].scale
    return attention_mass(
        asked, keys, lengths, scale=scale, reduce="none", key_scale=cache.key_scales[layer], backend=draft.backend
    )[..., :s]


def _outputs(
    target: LanguageModel, cache: KVCache, queries: list[Tensor], rounds: slice, lengths: Tensor, selection: Selection | None
) -> Iterator[tuple[int, Tensor]]:
    """By layer, what attention makes of the rounds' queries [b, T, Hq, D]; densely without lists."""
    for layer in target.spec.full_layers:
        asked = queries[layer][rounds]
        stop = int(lengths.max()) + asked.shape[1]
        indices, counts = (None, None) if selection is None else selection.of(layer)
        yield (
            layer,
            sparse_attention(
                asked,
                cache.keys(layer, stop).expand(len(asked), -1, -1, -1),
                cache.values(layer, stop).expand(len(asked), -1, -1, -1),
                indices,
                counts,
                lengths,
                scale=target.spec.layers[layer].scale,
                key_scale=cache.key_scales[layer],
                value_scale=cache.value_scales[layer],
                backend=target.backend,
            ),
        )


def _products(out: Tensor, dense: Tensor, values: Tensor | None, mass: Tensor | None) -> Tensor:
    """[2, Hq]: x x and x y, for y = dense - out ~ w x, x = mass (value - out).

    Outputs [b, T, Hq, D], values [Hkv, D], mass [b, Hq].
    """
    assert values is not None and mass is not None  # asked for
    out, dense = out.double(), dense.double()
    x = (values.double().repeat_interleave(out.shape[2] // len(values), 0) - out) * mass[:, None, :, None]
    return torch.stack([(x * x).sum((0, 1, 3)), (x * (dense - out)).sum((0, 1, 3))])


def _weights(xx: Tensor, xy: Tensor) -> Tensor:
    """[Lt, Hq] fp32, of sums over rounds; 0 where nothing was left out, and where the mean value does harm."""
    return torch.where(xx > 0, xy / xx, 0).clamp(min=0).float()
