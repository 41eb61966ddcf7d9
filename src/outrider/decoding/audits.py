"""Audits: what would the dense target have made of a round's tokens, and how much of its attention do the lists hold?

An audited round has another verification: two forwards of the same T tokens over the same cache, one dense and one from lists,
whose rows go through the target's weights together. In each layer

    dense rows     write their keys and values behind the cache and read everything,
                   then, in every fourth layer, what is listed, and nothing: three sums of exp(logit) tell the recalled mass
    sparse rows    write theirs over those, and read what is listed

so an audited round leaves what any other leaves. Rows of the batch that are not to be audited read nothing in place of
everything. Bytes of an audit: all keys and values of audited rows, and the listed ones once more in a quarter of the layers.
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
        self,
        target: LanguageModel,
        cache: KVCache,
        lists: Selection,
        lengths: Tensor,
        turns: Tensor,
        tokens: int,
    ) -> None:
        """`lengths` [B] are those of audited rows, 0 in others. Every `WINDOW`-th of the layers with lists is looked at, others
        at each of the `turns` [B]. A round has so many `tokens`."""
        self._target, self._cache, self._lists = target, cache, lists
        self._counts = lengths.int()[:, None]
        layers, device = torch.arange(len(lists.layers), device=cache.device), cache.device
        self._looks = (layers[:, None] % WINDOW == turns % min(WINDOW, len(layers))) & (lengths > 0)  # [layers, B]
        self._looked = torch.where(self._looks[..., None], lists.counts, 0)
        self._nothing = torch.zeros_like(self._looked[0])
        heads = target.spec.layers[lists.layers[0]].query_heads
        # by layer with lists, of each query: over everything, what is listed, and the round's own tokens alone
        self._sums = torch.empty(len(layers), 3, len(lengths), heads, tokens, dtype=torch.float32, device=device)

    @property
    def made(self) -> None:
        """Nobody asks."""

    @property
    def recalled(self) -> Tensor:
        """[B] fp64: the share of the mass on cached tokens that is on listed ones, mean over lists and the layers looked at."""
        everything, listed, own = self._sums.double().unflatten(3, (self._looked.shape[2], -1)).unbind(1)
        listed, own = (listed - everything).exp(), (own - everything).exp()  # shares of a query's attention
        held, whole = (listed - own).sum((-1, -2)), (1 - own).sum((-1, -2))  # [layers, B, Hs]
        shares = (held / whole.clamp(min=1e-9)).clamp(0, 1)  # sums in fp32 may be all but equal
        shares = torch.where(self._lists.counts == self._counts, 1, shares)  # who lists everything recalls it, to the last bit
        return torch.where(self._looks, shares.mean(-1), 0).sum(0) / self._looks.sum(0).clamp(min=1)

    def of(self, layer: int, queries: Tensor) -> tuple[None, Tensor | None]:
        """All cached tokens of audited rows; a layer with a window reads that."""
        return None, self._counts if layer in self._target.spec.full_layers else None

    def logsumexp_of(self, layer: int, queries: Tensor) -> Tensor | None:
        """Those over everything, in layers that have lists."""
        return self._sums[self._lists.layers.index(layer), 0] if layer in self._lists.layers else None

    def attended(self, layer: int, queries: Tensor, output: Tensor) -> Tensor:
        """`output` as it is. A layer that has lists attends to what it looks at of them, too, and to nothing."""
        if layer in self._lists.layers:
            row, cache = self._lists.layers.index(layer), self._cache
            for counts, sums in ((self._looked[row], self._sums[row, 1]), (self._nothing, self._sums[row, 2])):
                sparse_attention(
                    queries,
                    cache.keys(layer),
                    cache.values(layer),
                    self._lists.indices[row],
                    counts,
                    cache.lengths,
                    scale=cache.layers[layer].scale,
                    key_scale=cache.key_scales[layer],
                    value_scale=cache.value_scales[layer],
                    logsumexp=sums,
                    backend=self._target.backend,
                )
        return output


class Audits:
    """Audits rounds of one target."""

    def __init__(self, target: LanguageModel, least: int) -> None:
        """A row of fewer than `least` cached tokens reads everything anyway, and is not audited."""
        self._target, self._least = target.uncompiled(), least  # of a width that is not worth a compilation

    def verify(self, cache: KVCache, drafted: Tensor, inputs: Inputs, lists: Selection) -> tuple[Tensor, Tensor]:
        """The sparse target's logits [B, T, V] over the pending and the drafted tokens [B, K], and figures [B, T + 3] fp64:
        disagreement by position, recalled mass, share of the tokens on lists, and 1 in audited rows.

        Waits for nothing.
        """
        assert inputs.audited is not None
        rows = (inputs.audited > 0) & (cache.lengths >= self._least)  # others have no turn
        lengths = torch.where(rows, cache.lengths, 0)
        tokens, turns = torch.cat([inputs.pending[:, None], drafted], dim=1), inputs.audited.long() - 1
        everything = Everything(self._target, cache, lists, lengths, turns, tokens.shape[1])
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
