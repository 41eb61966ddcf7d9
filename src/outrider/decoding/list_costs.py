"""What lists of several lengths cost the target, measured on a text that both models have read: see `guidance/budgets.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from outrider.config import Budget
from outrider.decoding.prefill import ProgressCallback
from outrider.guidance.budgets import SHARES, WEIGHED, listed, output_errors, rank
from outrider.guidance.selectors.base import layer_sources, per_kv_head, score_rows
from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.models.quantization import dequantize
from outrider.types import Alignment, ListCosts, Selection


def measure(
    target: LanguageModel,
    draft: ModelSpec,
    alignment: Alignment,
    cache: KVCache,
    tokens: Tensor,
    starts: Sequence[int],
    queries: list[Tensor],
    draft_mass: Tensor,
    progress: ProgressCallback | None = None,
) -> ListCosts:
    """The costs of method `outrider`'s lists under this alignment, mean over rounds that begin at `starts`, ascending.

    tokens [1, S + T] are cached densely in `cache`, which is cut at the first round afterwards; queries by target layer
    [N, T, Hq, D]; draft_mass [N, Ld, Hd, S], of the draft layers with full attention. A list is judged with all others dense:
    by the error of its layer's output at every share, and, at one share, by the KL divergence of the target's predictions in
    the round. The costs are these errors, scaled to that divergence.
    """
    spec, budget = target.spec, Budget()
    layers, heads, t = spec.full_layers, draft.full_shape.query_heads, queries[0].shape[1]
    sources = per_kv_head(layer_sources(alignment, layers, heads), spec.full_shape.kv_heads)
    rows = score_rows(sources, heads, draft.full_layers)[1].to(draft_mass.device)  # [L, Hs, G]
    count, owners = rows.shape[:2]
    errors = torch.zeros(count, owners, len(SHARES), dtype=torch.float64)
    worth = torch.zeros(count, owners, dtype=torch.float64)
    for done, number in enumerate(reversed(range(len(starts))), start=1):  # of what a round overwrites, no earlier one reads
        start = starts[number]
        cache.truncate(start)
        lengths = listed(start, budget.sinks + budget.recent)
        mass = draft_mass[number].flatten(0, 1)[rows].mean(2)  # [L, Hs, S]
        order = rank(mass, start, budget.sinks, budget.recent)
        for place, layer in enumerate(layers):
            keys, values = (
                dequantize(stored(layer, start + t), scales[layer], spec.dtype)[0]
                for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales))
            )
            scale = spec.layers[layer].scale
            off = output_errors(queries[layer][number], keys, values, order[place], scale, lengths).double().cpu()
            errors[place] += off if owners > 1 else off.sum(0, keepdim=True)
        part = tokens[:, start : start + t]
        dense = target.forward(part, cache).logits[0].float().log_softmax(-1)
        for place, layer in enumerate(layers):
            for head in range(owners):
                alone = one_list(layer, head, order[place], lengths[SHARES.index(WEIGHED)])
                sparse = target.forward(part, cache, selection=alone).logits[0].float().log_softmax(-1)
                worth[place, head] += float(kl_div(sparse, dense, log_target=True, reduction="batchmean"))
        if progress is not None:
            progress("measure lists", done, len(starts))
    scaled = errors * (worth / errors[..., SHARES.index(WEIGHED)].clamp(min=1e-30))[..., None] / len(starts)
    costs = torch.zeros(len(spec.layers), *scaled.shape[1:], dtype=torch.float64)
    costs[list(layers)] = scaled
    return ListCosts(shares=SHARES, values=costs)


def one_list(layer: int, head: int, order: Tensor, count: int) -> Selection:
    """A layer whose lists hold all of `order` [Hs, S], but that of `head` only its first `count` tokens."""
    owners, size = order.shape
    indices = torch.arange(size, dtype=torch.int32, device=order.device).repeat(1, 1, owners, 1)
    indices[0, 0, head] = -1
    indices[0, 0, head, :count] = order[head, :count].sort().values.int()
    counts = torch.full((1, 1, owners), size, dtype=torch.int32, device=order.device)
    counts[0, 0, head] = count
    return Selection(
        layers=(layer,), indices=indices, counts=counts, lengths=torch.tensor([size], dtype=torch.int64, device=order.device)
    )
