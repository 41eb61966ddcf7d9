"""The lists of a run beside what the dense target attends to: recall by query head, overlaps by list.

Both readings go over the same tokens, round by round: the sparse one has lists, the dense one queries and keys. The mass is
the *dense* target's, whatever the sparse one has made of its own queries: the question is what would have been read, and one
answer serves all methods and budgets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.decoding.teacher_forced import GivenRound
from outrider.guidance.similarity import top_sets
from outrider.models import KVCache, LanguageModel
from outrider.ops import attention_mass
from outrider.types import Selection

Mass = Callable[[int], Tensor]  # of a layer: [Hq, S] softmax mass on the cached tokens, mean over the round's queries


class ListFigures:
    """Figures of one run, collected by `add`. By layer, each a list with an entry a round:

    recall [Hq]        share of a query head's mass on cached tokens that its list holds
    with_previous [Hs] Jaccard index of a list and that of the round before; none for the first round
    with_target [Hs]   Jaccard index of a list and as many tokens with the most mass, summed over the list's query heads
    """

    def __init__(self) -> None:
        self.recall: dict[int, list[Tensor]] = {}
        self.with_previous: dict[int, list[Tensor]] = {}
        self.with_target: dict[int, list[Tensor]] = {}
        self._previous: dict[int, Tensor] = {}  # marks of the last round

    def add(self, lists: Selection, mass: Mass) -> None:
        """One round of one sequence."""
        size = int(lists.lengths)
        for layer in lists.layers:
            indices, counts = lists.of(layer)
            assert indices is not None and counts is not None
            marked, full = _marks(indices[0], size), mass(layer)
            owned = full.unflatten(0, (len(marked), -1))  # [Hs, Hq / Hs, S]: who shares a list
            held = (owned * marked[:, None]).sum(-1) / owned.sum(-1).clamp_min(torch.finfo(full.dtype).tiny)
            sizes = torch.full_like(counts[0], size)
            own = top_sets(owned.sum(1), sizes, counts[0].long())
            self.recall.setdefault(layer, []).append(held.flatten().cpu())
            self.with_target.setdefault(layer, []).append(_jaccard(marked, own).cpu())
            if layer in self._previous:
                before = pad(self._previous[layer], (0, size - self._previous[layer].shape[-1]))
                self.with_previous.setdefault(layer, []).append(_jaccard(marked, before).cpu())
            self._previous[layer] = marked


def means(figures: dict[int, list[Tensor]]) -> tuple[list[int], list[list[float]]]:
    """Layers, ascending, and for each the means over rounds by head."""
    layers = sorted(figures)
    return layers, [torch.stack(figures[layer]).double().mean(0).tolist() for layer in layers]


def dense_mass(target: LanguageModel, cache: KVCache, dense: GivenRound) -> Mass:
    """The exact mass of a dense round whose queries were recorded; `cache` holds the round's keys, too."""
    t = dense.logits.shape[1]
    lengths = torch.tensor([dense.cached], device=cache.device)

    def of(layer: int) -> Tensor:
        mass = attention_mass(
            dense.queries[layer],
            cache.keys(layer, dense.cached + t),
            lengths,
            scale=target.spec.layers[layer].scale,
            key_scale=cache.key_scales[layer],
            backend="reference",
        )
        return mass[0, :, : dense.cached]

    return of


def _marks(indices: Tensor, size: int) -> Tensor:
    """Lists [Hs, M], padded with -1 -> [Hs, size] bool."""
    places = torch.where(indices >= 0, indices, size).long()
    marked = torch.zeros(indices.shape[0], size + 1, dtype=torch.bool, device=indices.device)
    return marked.scatter_(1, places, True)[:, :size]


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Of sets [H, S] bool, row by row: [H]."""
    return (a & b).sum(-1) / (a | b).sum(-1).clamp_min(1)
