"""Audits: what would the dense target have made of a round's tokens, and how much of its attention do the lists hold?

An audited round has another verification: two forwards of the same T tokens over the same cache, one dense and one from lists,
whose rows go through the target's weights together. In each layer

    dense rows     write their keys and values behind the cache and read everything,
                   then, in every fourth layer, what is listed, and nothing: three sums of exp(logit) tell the recalled mass
    sparse rows    write theirs over those, and read what is listed

so an audited round leaves what any other leaves. Rows of the batch that are not to be audited take part with empty lists in
place of everything: of a cache only what is audited is read. Bytes of an audit: all keys and values of the audited rows, and
in a quarter of the layers the listed ones once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.decoding.guard import WINDOW, Audit
from outrider.decoding.rounds import Inputs
from outrider.decoding.sampling import distributions, greedy
from outrider.decoding.sequence import Sequence
from outrider.models import KVCache, LanguageModel
from outrider.ops import sparse_attention
from outrider.types import Lists, Selection


class Everything(Lists):
    """What the dense target reads in an audit; and how much of its attention to that is to listed tokens."""

    def __init__(
        self, target: LanguageModel, cache: KVCache, lists: Selection, places: Tensor, lengths: Tensor, turns: Tensor
    ) -> None:
        """`places` [B, 1, S] int32 count up; `lengths` [B] are those of audited rows, 0 in others. Every `WINDOW`-th of the
        layers with lists is looked at, others at each of the `turns` [B]."""
        self._target, self._cache, self._lists, self._places = target, cache, lists, places
        self._counts = lengths.int()[:, None]
        self._turns = turns % min(WINDOW, len(lists.layers))
        self._logsumexp = torch.empty(0)  # of the layer that attends just now
        self._recalled = torch.zeros(len(lengths), dtype=torch.float64, device=cache.device)
        self._seen = torch.zeros_like(self._recalled)

    @property
    def made(self) -> None:
        """Nobody asks."""

    @property
    def recalled(self) -> Tensor:
        """[B] fp64: the share of the mass on cached tokens that is on listed ones, mean over lists and the layers looked at."""
        return self._recalled / self._seen.clamp(min=1)

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """All cached tokens of audited rows; a layer with a window reads that."""
        return (self._places, self._counts) if layer in self._target.spec.full_layers else (None, None)

    def logsumexp_of(self, layer: int, queries: Tensor) -> Tensor | None:
        """Of everything: in layers that have lists."""
        if layer not in self._lists.layers:
            return None
        self._logsumexp = _room(queries)
        return self._logsumexp

    def attended(self, layer: int, queries: Tensor, output: Tensor) -> Tensor:
        """`output` as it is; adds up what this layer recalls where it is its turn."""
        indices, counts = self._lists.of(layer)
        if indices is not None and counts is not None:
            looks = (self._turns == self._lists.layers.index(layer) % WINDOW) & (self._counts[:, 0] > 0)
            whole = counts == self._counts  # lists of all tokens: they recall everything, to the last bit
            counts = torch.where(looks[:, None], counts, 0)
            own = self._sums(layer, queries, indices, torch.zeros_like(counts))  # of the round's own tokens alone
            listed = (self._sums(layer, queries, indices, counts) - own).unflatten(1, (counts.shape[1], -1)).sum((-1, -2))
            cached = (1 - own).unflatten(1, (counts.shape[1], -1)).sum((-1, -2))
            shares = torch.where(whole, 1, (listed / cached.clamp(min=1e-9)).clamp(0, 1))  # sums in fp32 may be all but equal
            self._recalled += torch.where(looks, shares.mean(-1), 0)
            self._seen += looks
        return output

    def _sums(self, layer: int, queries: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """[B, Hq, T] fp64: the share of each query's attention that is to these cached tokens and the round's own."""
        cache, sums = self._cache, _room(queries)
        sparse_attention(
            queries,
            cache.keys(layer),
            cache.values(layer),
            indices,
            counts,
            cache.lengths,
            scale=cache.layers[layer].scale,
            key_scale=cache.key_scales[layer],
            value_scale=cache.value_scales[layer],
            logsumexp=sums,
            backend=self._target.backend,
        )
        return (sums.double() - self._logsumexp.double()).exp()


def _room(queries: Tensor) -> Tensor:
    """For a number of each query [B, T, Hq, D]: [B, Hq, T] fp32."""
    b, t, heads, _ = queries.shape
    return torch.empty(b, heads, t, dtype=torch.float32, device=queries.device)


class Audits:
    """Audits rounds of one target over up to `slots` sequences of up to `capacity` tokens."""

    def __init__(self, target: LanguageModel, slots: int, capacity: int, least: int) -> None:
        """A row of fewer than `least` cached tokens reads everything anyway, and is not audited."""
        self._target, self._least = target.uncompiled(), least  # of a width that is not worth a compilation
        places = torch.arange(capacity, dtype=torch.int32, device=target.spec.device)
        self._places = places.expand(slots, 1, -1).contiguous()

    def verify(self, cache: KVCache, drafted: Tensor, inputs: Inputs, lists: Selection) -> tuple[Tensor, Tensor]:
        """The sparse target's logits [B, T, V] over the pending and the drafted tokens [B, K], and figures [B, T + 3] fp64:
        disagreement by position, recalled mass, share of the tokens on lists, and 1 in audited rows.

        Waits for nothing.
        """
        assert inputs.audited is not None
        rows = (inputs.audited > 0) & (cache.lengths >= self._least)  # others have no turn
        lengths = torch.where(rows, cache.lengths, 0)
        everything = Everything(self._target, cache, lists, self._places[: len(rows)], lengths, inputs.audited.long() - 1)
        tokens = torch.cat([inputs.pending[:, None], drafted], dim=1)
        both = self._target.forward(tokens.repeat(2, 1), cache, selections=(everything, lists)).logits
        wanted, found = both.chunk(2)
        if inputs.sampling.greedy:
            differences = (greedy(wanted) != greedy(found)).double()
        else:
            apart = distributions(wanted, inputs.sampling) - distributions(found, inputs.sampling)
            differences = apart.clamp(min=0).sum(-1).double().nan_to_num(1.0).clamp(max=1)
        kept = lists.counts.double().mean((0, 2)) / lengths.clamp(min=1)
        figures = torch.cat([differences, torch.stack([everything.recalled, kept, rows.double()], dim=1)], dim=1)
        return found, self._target.ranks.mean(figures)  # each has seen its own heads' lists


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
    """From the figures of an audited round, on the host, of so many rows; None for those that were not audited."""
    if figures is None:
        return [None] * rows
    return [
        Audit(differences=differences, recalled=recalled, kept=kept) if audited else None
        for *differences, recalled, kept, audited in figures[:rows].tolist()
    ]
