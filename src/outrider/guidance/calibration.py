"""Fits alignments: which draft heads show what a target head reads, learned from rounds of a short calibration text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.errors import OptionError
from outrider.guidance.alignment import AlignmentMap
from outrider.guidance.head_map import HEAD_MAPS, average, best_overlap, greedy_mean, repeated
from outrider.guidance.layer_map import candidates
from outrider.guidance.similarity import forced_mask, jaccard, kl_layers, kl_rows, recall, top_sets
from outrider.types import Alignment

FIT, JUDGE = slice(0, None, 2), slice(1, None, 2)  # rounds to fit on, and to judge by


@dataclass(frozen=True, slots=True)
class _Found:
    """Result of a greedy search for one target layer within one set of draft layers."""

    rows: list[list[int]]  # per KV head
    recall: float  # held out, mean over query heads
    kl: float  # held out, mean over KV heads


@dataclass(frozen=True, slots=True)
class _Layer:
    """All that is kept of a target layer; its masses are not."""

    kl: Tensor  # [Ld], fit rounds
    kl_judge: Tensor
    overlap: Tensor  # [Hq, Ld, Hd] Jaccard, fit rounds
    overlap_judge: Tensor
    recall_judge: Tensor  # [Hq, Ld, Hd] recall of each draft head's list alone
    recall_average: Tensor  # [Ld] recall of each draft layer's head-averaged list, held out, mean over query heads
    found: dict[tuple[str, tuple[int, ...]], _Found]  # by head map and candidate draft layers: each alone, and all


class Calibration:
    """Compares every target layer with every draft head, then builds the alignment of any pair of layer and head map.

    draft_mass [N, Ld, Hd, S] fp32: softmax mass on every cached token, averaged over the queries of each of N rounds; zero at
    and past the round's length. lengths [N] int64. Lists keep ceil(keep * length) tokens, `sinks` and `recent` among
    them. Even rounds are fitted on, odd ones judge. `draft_layers` are the model's numbers of the Ld layers, 0 .. Ld - 1 when
    not given. Everything runs on the device of `draft_mass`; target masses are let go after each layer.

    Raises OptionError for fewer than two rounds.
    """

    def __init__(
        self,
        draft_mass: Tensor,
        lengths: Tensor,
        *,
        num_target_layers: int,
        kv_heads: int,
        keep: float,
        sinks: int = 0,
        recent: int = 0,
        jaccard_k: int = 64,
        draft_layers: tuple[int, ...] | None = None,
    ) -> None:
        if draft_mass.dim() != 4 or len(draft_mass) < 2 or len(draft_mass) != len(lengths):
            allowed = "[rounds, layers, heads, tokens], two rounds or more, a length each"
            raise OptionError("draft masses", tuple(draft_mass.shape), allowed)
        self.draft = draft_mass
        self.lengths = lengths.to(draft_mass.device)
        self.kept = (self.lengths.double() * keep - 1e-9).ceil().long()
        self.sinks, self.recent, self.jaccard_k = sinks, recent, jaccard_k
        self.num_target_layers, self.kv_heads = num_target_layers, kv_heads
        self.num_draft_layers, self.draft_heads = draft_mass.shape[1:3]
        self.draft_layers = torch.tensor(draft_layers if draft_layers is not None else range(self.num_draft_layers))
        rows = draft_mass.flatten(1, 2)
        self._forced = forced_mask(self.lengths, rows.shape[-1], sinks, recent).unsqueeze(1)  # [N, 1, S]
        self._overlap_sets = top_sets(rows, self.lengths, jaccard_k)  # [N, R, S]
        self._sets = self._choose()(rows)
        self._average_sets = self._choose()(draft_mass.mean(2))  # [N, Ld, S]
        self._layers: dict[int, _Layer] = {}

    def add_target_layer(self, layer: int, mass: Tensor) -> None:
        """Measure target layer number `layer`. mass [N, Hq, S] fp32, same rounds and layout as the draft's."""
        rounds, _, _, size = self.draft.shape
        heads = mass.shape[1] if mass.dim() == 3 else 0
        if mass.shape != (rounds, heads, size) or heads == 0 or heads % self.kv_heads:
            allowed = f"[{rounds}, a multiple of {self.kv_heads}, {size}]"
            raise OptionError(f"target mass of layer {layer}", tuple(mass.shape), allowed)
        if not 0 <= layer < self.num_target_layers:
            raise OptionError("target layer", layer, f"0 .. {self.num_target_layers - 1}")
        grid = (heads, self.num_draft_layers, self.draft_heads)
        mass = mass.to(self.draft.device)
        overlap_sets = top_sets(mass, self.lengths, self.jaccard_k)
        open_mass = mass.masked_fill(self._forced, 0)
        judged = open_mass[JUDGE]
        self._layers[layer] = _Layer(
            kl=kl_layers(mass[FIT], self.draft[FIT]).cpu(),
            kl_judge=kl_layers(mass[JUDGE], self.draft[JUDGE]).cpu(),
            overlap=jaccard(overlap_sets[FIT], self._overlap_sets[FIT]).view(grid).cpu(),
            overlap_judge=jaccard(overlap_sets[JUDGE], self._overlap_sets[JUDGE]).view(grid).cpu(),
            recall_judge=recall(judged, self._sets[JUDGE]).view(grid).cpu(),
            recall_average=recall(judged, self._average_sets[JUDGE]).mean(0).cpu(),
            found=self._search(mass, open_mass),
        )

    def fit(self, layer_map: str, head_map: str) -> AlignmentMap:
        """The alignment of a layer map (proportional, monotone, joint) and a head map (average, jaccard, recall, divergence).

        Target layers that were never added have sources (-1, -1). Quality, on the rounds not fitted on, mean over target
        layers: "recall", share of a query head's mass outside the forced tokens that its list holds, mean over heads; "kl"
        in nats, of layers where a target layer follows one draft layer, of KV heads for the head map divergence; "jaccard",
        for that head map. Raises OptionError for unknown names or when no layer was added.
        """
        if head_map not in HEAD_MAPS:
            raise OptionError("head map", head_map, ", ".join(HEAD_MAPS))
        if not self._layers:
            raise OptionError("target layers", "none", "at least one added before the fit")
        numbers = sorted(self._layers)
        layers = [self._layers[number] for number in numbers]
        allowed = candidates(layer_map, torch.stack([layer.kl for layer in layers]))
        rows, recalls, overlaps, kls = [], [], [], []
        for layer, mask in zip(layers, allowed, strict=True):
            if head_map == "average":
                rows.append(average(layer.kl, mask, self.draft_heads))
                recalls.append(float(layer.recall_average[rows[-1][0][0] // self.draft_heads]))
            elif head_map == "jaccard":
                rows.append(best_overlap(layer.overlap, mask))
                chosen = torch.tensor(rows[-1])
                recalls.append(float(layer.recall_judge.flatten(1).gather(1, chosen).mean()))
                overlaps.append(float(layer.overlap_judge.flatten(1).gather(1, chosen).mean()))
            else:
                found = layer.found[head_map, tuple(mask.nonzero().flatten().tolist())]
                rows.append(found.rows)
                recalls.append(found.recall)
                kls.append(found.kl)
        quality = {"recall": _mean(recalls)}
        if overlaps:
            quality["jaccard"] = _mean(overlaps)
        if head_map == "divergence":
            quality["kl"] = _mean(kls)
        elif head_map == "average" or layer_map != "joint":
            followed = [layer_rows[0][0] // self.draft_heads for layer_rows in rows]
            quality["kl"] = _mean([float(layer.kl_judge[d]) for layer, d in zip(layers, followed, strict=True)])
        return AlignmentMap(layer_map, head_map, Alignment(sources=self._sources(numbers, rows)), quality)

    def _sources(self, numbers: list[int], rows: list[list[list[int]]]) -> Tensor:
        merged = repeated(rows)  # [added layers, Hs, G]
        sources = torch.full((self.num_target_layers, *merged.shape[1:], 2), -1, dtype=torch.int64)
        sources[numbers] = torch.stack((self.draft_layers[merged // self.draft_heads], merged % self.draft_heads), dim=-1)
        return sources

    def _choose(self, rounds: slice = slice(None)) -> Callable[[Tensor], Tensor]:
        """masses [N, ..., S] of those rounds -> the lists kept, as sets."""

        def choose(mass: Tensor) -> Tensor:
            return top_sets(mass, self.lengths[rounds], self.kept[rounds], sinks=self.sinks, recent=self.recent)

        return choose

    def _search(self, mass: Tensor, open_mass: Tensor) -> dict[tuple[str, tuple[int, ...]], _Found]:
        """Greedy searches within each draft layer and within all; the layer map is not known yet.

        Recall looks at what the lists hold outside the forced tokens, divergence at the whole distribution.
        """
        shared, shared_open = (m.unflatten(1, (self.kv_heads, -1)).sum(2) for m in (mass, open_mass))  # [N, Hkv, S]
        rows = self.draft.flatten(1, 2)
        singles = {
            "recall": recall(shared_open[FIT], self._sets[FIT]),  # [Hkv, R]
            "divergence": torch.stack([-kl_rows(shared[FIT, head], rows[FIT]) for head in range(self.kv_heads)]),
        }
        choose = self._choose(FIT)
        every = tuple(range(self.num_draft_layers))
        result = {}
        for layers in {*((layer,) for layer in every), every}:
            first, last = layers[0] * self.draft_heads, (layers[-1] + 1) * self.draft_heads
            for name, alone in singles.items():
                chosen = []
                for head in range(self.kv_heads):
                    open_, whole = shared_open[FIT, head : head + 1], shared[FIT, head]
                    score = {
                        "recall": lambda merged, t=open_: recall(t, choose(merged))[0],
                        "divergence": lambda merged, t=whole: -kl_rows(t, merged),
                    }[name]
                    found = greedy_mean(rows[FIT, first:last], alone[head, first:last], score)
                    chosen.append([first + row for row in found])
                result[name, layers] = self._judge(chosen, shared, open_mass)
        return result

    def _judge(self, chosen: list[list[int]], shared: Tensor, open_mass: Tensor) -> _Found:
        """Held-out figures of the rows chosen for each KV head."""
        rows = self.draft[JUDGE].flatten(1, 2)
        groups = open_mass[JUDGE].unflatten(1, (self.kv_heads, -1))
        recalls, kls = [], []
        for head, own in enumerate(chosen):
            merged = rows[:, own].mean(1, keepdim=True)
            recalls.append(float(recall(groups[:, head], self._choose(JUDGE)(merged)).mean()))
            kls.append(float(kl_rows(shared[JUDGE, head], merged)))
        return _Found(chosen, _mean(recalls), _mean(kls))


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 6)
