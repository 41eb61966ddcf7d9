"""Audits: what would the dense target have made of a round's tokens, and how much of its attention do the lists hold?

    read       before verification, over the same cache: a dense forward of the T tokens. The rows it writes are those that the
               verification writes next, so an audited round leaves what any other leaves
    compare    after it: disagreement by position, and recalled mass

Other rows of the batch, which are not to be audited, take part with empty lists: of a cache only what is audited is read. Bytes
of an audit: the target's weights, all keys and values of the audited rows, and the keys of a quarter of the layers once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.decoding.guard import WINDOW, Audit
from outrider.decoding.rounds import Inputs
from outrider.decoding.sampling import distributions, greedy
from outrider.decoding.sequence import Sequence
from outrider.models import KVCache, LanguageModel
from outrider.ops import attention_mass, unlisted_mass
from outrider.types import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """What the dense target makes of a round's tokens."""

    rows: Tensor  # [B] bool: the audited ones; others hold anything
    lengths: Tensor  # [B] int64: cached tokens of these, 0 in other rows
    logits: Tensor  # [B, T, V]
    queries: tuple[Tensor, ...]  # by layer [B, T, Hq, D]


class Audits:
    """Audits rounds of one target over up to `slots` sequences of up to `capacity` tokens."""

    def __init__(self, target: LanguageModel, slots: int, capacity: int, least: int) -> None:
        """A row of fewer than `least` cached tokens reads everything anyway, and is not audited."""
        self._target, self._least = target, least
        device = target.spec.device
        self._everything = torch.arange(capacity, dtype=torch.int32, device=device).expand(slots, 1, -1).contiguous()

    def read(self, cache: KVCache, drafted: Tensor, inputs: Inputs) -> Dense:
        """The dense forward of the pending and the drafted tokens [B, K] behind what `cache` holds. Waits for nothing."""
        assert inputs.audited is not None
        rows = (inputs.audited > 0) & (cache.lengths >= self._least)  # others have no turn
        lengths = torch.where(rows, cache.lengths, 0)
        layers = self._target.spec.full_layers
        places = self._everything[: len(rows)]
        everything = Selection(
            layers=layers,
            indices=places.expand(len(layers), *places.shape),
            counts=lengths.int()[None, :, None].expand(len(layers), -1, 1),
            lengths=cache.lengths,
        )
        tokens = torch.cat([inputs.pending[:, None], drafted], dim=1)
        output = self._target.forward(tokens, cache, selection=everything, record_queries=True)
        return Dense(rows=rows, lengths=lengths, logits=output.logits, queries=output.queries)

    def compare(
        self, dense: Dense, logits: Tensor, inputs: Inputs, lists: Selection, cache: KVCache, turns: Iterable[int]
    ) -> Tensor:
        """Figures [B, T + 3] fp64 of the sparse target's `logits` [B, T, V]: disagreement by position, recalled mass, share of
        the tokens on lists, and 1 in audited rows. `cache` does not yet count the round's tokens, `turns` are the rows'.

        Waits for nothing.
        """
        if inputs.sampling.greedy:
            differences = (greedy(dense.logits) != greedy(logits)).double()
        else:
            wanted, found = (distributions(x, inputs.sampling) for x in (dense.logits, logits))
            differences = (wanted - found).clamp(min=0).sum(-1).double().nan_to_num(1.0).clamp(max=1)
        assert inputs.audited is not None
        kept = lists.counts.double().mean((0, 2)) / dense.lengths.clamp(min=1)
        recalled = torch.zeros_like(kept)
        for turn in sorted(turns):
            own = inputs.audited.eq(turn + 1)
            recalled = torch.where(own, self._recalled(dense, torch.where(own, dense.lengths, 0), lists, cache, turn), recalled)
        figures = torch.cat([differences, torch.stack([recalled, kept, dense.rows.double()], dim=1)], dim=1)
        return self._target.ranks.mean(figures)  # each has seen its own heads' lists

    def _recalled(self, dense: Dense, lengths: Tensor, lists: Selection, cache: KVCache, turn: int) -> Tensor:
        """[B] fp64: share of the mass on `lengths` cached tokens that is on listed ones, mean over lists, and over every
        `WINDOW`-th layer with lists: others with each of a sequence's audits, so that a few have seen all."""
        spec = self._target.spec
        backend = "auto" if self._target.backend == "cuda" else self._target.backend  # there is no unlisted_mass in CUDA C++
        found = []
        for at in range(turn % min(WINDOW, len(lists.layers)), len(lists.layers), WINDOW):
            layer, owners = lists.layers[at], lists.indices.shape[2]
            shape = spec.layers[layer]
            mass = attention_mass(
                dense.queries[layer],
                cache.keys(layer),
                lengths,
                scale=shape.scale,
                heads=torch.arange(shape.query_heads, device=cache.device).view(owners, -1),  # that share a list
                key_scale=cache.key_scales[layer],
                backend=backend,
            )
            own = torch.arange(owners, device=cache.device).view(1, -1, 1)
            given = mass, lengths, own, lists.indices[at : at + 1], lists.counts[at : at + 1]
            found.append(1 - unlisted_mass(*given, backend=backend)[0].double().mean(-1))
        return torch.stack(found).mean(0)


def count_agreed(target: LanguageModel, cache: KVCache, sequence: Sequence, chunk: int) -> None:
    """Count the generated tokens of a finished sequence that the dense target, given the same text, holds for the most
    probable. It reads `chunk` of them at a time, and writes over what `cache`, of this sequence, has of them."""
    cache.truncate(len(sequence.prompt) - 1)
    tokens = torch.tensor([[sequence.prompt[-1], *sequence.tokens[:-1]]])
    choices = []
    for part in tokens.split(chunk, dim=1):
        choices.append(target.forward(part, cache).logits.argmax(-1).cpu())
        cache.advance(part.shape[1])
    sequence.statistics.audited = len(sequence.tokens)
    sequence.statistics.agreed = int((torch.cat(choices, dim=1)[0] == torch.tensor(sequence.tokens)).sum())


def landed(rows: int, figures: Tensor | None) -> list[Audit | None]:
    """From the figures of `compare`, on the host, of so many rows; None for those that were not audited."""
    if figures is None:
        return [None] * rows
    return [
        Audit(differences=differences, recalled=recalled, kept=kept) if audited else None
        for *differences, recalled, kept, audited in figures[:rows].tolist()
    ]
