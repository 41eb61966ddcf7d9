"""The nouns passed between the stages of a round.

Shape legend, the same letters in the whole project:

    B  sequences in the batch          T  query tokens of one forward (a round has T = K + 1)
    S  cached tokens                   K  drafted tokens of a round
    M  listed tokens (padded width)    L  layers (Lt target, Ld draft)
    H  heads: Hq query heads, Hkv KV heads, Hs heads that own a token list (1, Hkv or Hq of the target)
    D  head dim                        V  vocabulary
    G  draft heads merged into one score       R  score rows = scored draft layers x draft query heads
    NB blocks of a prompt's chunk

A round starts with S tokens in both caches and one *pending* token that is emitted but not yet cached. Its T = K + 1 tokens
are the pending token and the K drafted ones, at positions S .. S + K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import Tensor

Stage = Callable[[str], AbstractContextManager[None]]  # takes the time of a stage, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTrace:
    """What the draft leaves behind after proposing."""

    tokens: Tensor  # [B, K] int64, the drafted tokens
    probs: Tensor | None  # [B, K, V] fp32, the distribution each was drawn from; None where all are greedy, or chosen by noise
    queries: tuple[Tensor, ...]  # per draft layer [B, T, Hq, D]: post-RoPE queries of the pending and all drafted tokens
    tentative: Tensor | None = None  # [B] int64: of the tokens, how many first ones the sparse target has chosen; None: none


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftScores:
    """Softmax mass the round's queries put on every cached token, by draft head."""

    mass: Tensor  # [B, Q, R, S] fp32 (on a GPU also bf16); Q = 1 averaged over the round's queries, Q = T kept apart
    layers: tuple[int, ...]  # the scored draft layers; row r belongs to layer layers[r // Hq], head r % Hq
    lengths: Tensor  # [B] int64, cached tokens of each sequence, at most S; mass beyond them is zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What the lists of each sequence keep, where it is not the same for all: of the tokens (top-k) or of the mass (top-p)."""

    kept: Tensor  # [B] fp64 in 0 .. 1; 1: everything
    most: float  # on the host: none is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlistedFit:
    """What stands for the tokens that the lists of one method leave out, as calibrated."""

    values: Tensor  # [Lt, Hkv, D] fp32: the mean of the text's cached values; zeros in layers without lists
    weights: Tensor  # [Lt, Hq] fp32 >= 0: the share of a query head's output that they take, per unlisted mass


@dataclass(frozen=True, slots=True, kw_only=True)
class ListCosts:
    """What calibration found lists of some lengths to cost, in terms that add up: see `guidance/budgets.py`."""

    shares: tuple[float, ...]  # of the cached tokens beside sinks and recent ones, ascending from 0 to 1
    values: Tensor  # [Lt, Hs, len(shares)] fp64; zeros in layers without lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """For every target layer and list-owning head: the draft heads whose scores it takes (their mean)."""

    sources: Tensor  # [Lt, Hs, G, 2] int64: (draft layer, draft query head)
    costs: ListCosts | None = None  # None: nobody has measured them
    unlisted: Mapping[str, UnlistedFit] = field(default_factory=dict)  # by method, where calibrated


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlisted:
    """What stands for the tokens that the lists of a round leave out; the layers are those of the `Selection`."""

    values: Tensor  # [layers, Hkv, D] fp32
    shares: Tensor  # [layers, B, Hq] fp32 in 0 .. 1: of the output; 0 where every token is listed


class Lists(Protocol):
    """Who tells a layer what to read: a `Selection`, made before the forward, or a method that chooses inside it.

    As long as a class says nothing else, lists stand for all tokens, and a layer goes on with its attention over them.
    """

    @property
    def made(self) -> Selection | None:
        """All lists, once the forward is done; None where no layer had some."""

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Indices [B, Hs, M] and counts [B, Hs] for a layer's queries [B, T, Hq, D]; counts alone: it reads the first so many
        tokens; None twice: it reads everything."""

    def attended(self, layer: int, queries: Tensor, output: Tensor) -> Tensor:
        """What the layer goes on with: `output` [B, T, Hq, D], its attention over the lists, or what a method puts there."""
        return output

    def unlisted_of(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Values [Hkv, D] that stand for a layer's unlisted tokens, and their shares [B, Hq]; None twice: nothing does."""
        return None, None

    def logsumexp_of(self, layer: int, queries: Tensor) -> Tensor | None:
        """What a layer's attention fills with the logarithms of its denominators, [B, Hq, T] fp32; None: nobody wants them."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The token lists of one round. Target layers that are not in `layers` read their whole cache (or window)."""

    layers: tuple[int, ...]  # target layers that have lists, ascending
    indices: Tensor  # [len(layers), B, Hs, M] int32, ascending; entries at and past the count are -1
    counts: Tensor  # [len(layers), B, Hs] int32
    lengths: Tensor  # [B] int64, cached tokens the lists refer to: every listed token is below it
    unlisted: Unlisted | None = None  # None: the listed tokens stand for all

    @property
    def made(self) -> Selection:
        """Itself."""
        return self

    def of(self, layer: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Indices [B, Hs, M] and counts [B, Hs] of a target layer; None twice where it has no lists. Queries do not matter."""
        if layer not in self.layers:
            return None, None
        row = self.layers.index(layer)
        return self.indices[row], self.counts[row]

    def attended(self, layer: int, queries: Tensor, output: Tensor) -> Tensor:
        """`output` as it is."""
        return output

    def unlisted_of(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Values [Hkv, D] and shares [B, Hq] of a target layer; None twice where it has no lists or these stand for all."""
        if self.unlisted is None or layer not in self.layers:
            return None, None
        row = self.layers.index(layer)
        return self.unlisted.values[row], self.unlisted.shares[row]

    def logsumexp_of(self, layer: int, queries: Tensor) -> None:
        """Nobody wants them."""

    def rows(self, start: int, stop: int) -> Selection:
        """The lists of sequences start .. stop - 1, sharing storage with these."""
        rest = self.unlisted
        return Selection(
            layers=self.layers,
            indices=self.indices[:, start:stop],
            counts=self.counts[:, start:stop],
            lengths=self.lengths[start:stop],
            unlisted=None if rest is None else replace(rest, shares=rest.shares[:, start:stop]),
        )


@runtime_checkable
class BlockLists(Protocol):
    """Who tells a layer what the blocks of a prompt's chunk read: a `BlockSelection`, or a method inside the forward."""

    @property
    def block(self) -> int:
        """Tokens that share lists; the last block of a chunk may have fewer."""

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Indices [B, NB, Hs, M] and counts [B, NB, Hs] for a layer's queries [B, T, Hq, D], whose keys are in the cache
        already; None twice: it reads everything."""


@runtime_checkable
class PromptAttention(Protocol):
    """Who computes a layer's attention over a whole prompt in the target's place: a method that leaves out queries, too."""

    def prompt_attention(self, layer: int, queries: Tensor) -> Tensor | None:
        """Attention [B, T, Hq, D] of a layer's queries [B, T, Hq, D], whose keys and values are in the cache already; None: the
        layer reads everything."""


class KeptShare(Protocol):
    """What was read of a chunk of a prompt, or of all of it, out of how much."""

    @property
    def listed(self) -> Tensor:
        """Tokens that were read, averaged over layers and heads, summed over blocks, [B] fp64."""

    def before(self, start: int, stop: int) -> int:
        """Out of so many, tokens start .. stop - 1 being the chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSelection:
    """The token lists of a chunk of a prompt, one set for each block of its tokens. Other layers read everything."""

    layers: tuple[int, ...]  # target layers that have lists, ascending
    indices: Tensor  # [len(layers), B, NB, Hs, M] int32, ascending, below the block's start; entries past the count are ignored
    counts: Tensor  # [len(layers), B, NB, Hs] int32
    block: int  # tokens that share lists; the last block of a chunk may have fewer

    @property
    def listed(self) -> Tensor:
        """Tokens on the lists of each sequence, averaged over layers and heads, summed over blocks, [B] fp64."""
        return self.counts.double().mean((0, 3)).sum(1)

    def before(self, start: int, stop: int) -> int:
        """Tokens before the blocks of a chunk, tokens start .. stop - 1, summed over blocks."""
        return sum(range(start, stop, self.block))

    def of(self, layer: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Indices [B, NB, Hs, M] and counts [B, NB, Hs] of a target layer; None twice where it has no lists. Queries do not
        matter."""
        if layer not in self.layers:
            return None, None
        row = self.layers.index(layer)
        return self.indices[row], self.counts[row]
