"""What a method inside the target's forward is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.config import Budget
from outrider.guidance.controller import Controller
from outrider.guidance.selectors.base import top_k, top_p
from outrider.ops import TokenLists, attention_mass, token_select
from outrider.types import Lists, Selection

Rows = Callable[[int], Tensor]  # of a layer, keys or values: [B, S, Hkv, D]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Target:
    """The target as far as a method knows it."""

    layers: tuple[int, ...]  # with full attention, ascending
    query_heads: int
    kv_heads: int
    head_dim: int
    scales: tuple[float, ...]  # of the logits, by layer of the model
    value_bytes: int  # of one number in the cache
    channels: Tensor | None = None  # [L, Hkv, D] int64: of keys, those that weigh most first; None: not ranked
    controller: Controller | None = None  # guesses what it will look at; None: not trained
    embed: Callable[[Tensor], Tensor] | None = None  # tokens [...] -> input embeddings [..., E]

    @property
    def row_bytes(self) -> int:
        """Of a token's keys in one layer; its values take as many."""
        return self.kv_heads * self.head_dim * self.value_bytes


@dataclass(kw_only=True)
class Rival:
    """Chooses the tokens of one layer after the other, from the layer's own queries and keys.

    One object serves one document, or a batch: `begin` where the prefix is cached, `read` for its tokens, `observe` for what
    the method wants to see of it, then rounds: `read` once, `choose` and `attended` in every layer. `touched` adds up the bytes
    that choosing itself reads for each sequence, of keys or of what the method keeps about them; rows that are attended to are
    not in it. `spared` adds up the bytes of such rows, keys and values apart, that the method does not read after all. A
    round's queries share their lists, as they are read together: what a method computes for one query is averaged over them.
    """

    target: Target
    budget: Budget
    touched: Tensor | float = 0.0  # [B] once something is read
    spared: Tensor | float = 0.0  # [B] once something is

    window: ClassVar[int | None] = 0  # last tokens of the prefix whose queries are observed; None: all
    budgeted: ClassVar[str] = "keep"  # what the budget must say: "keep" or "top_p"

    def __post_init__(self) -> None:
        """Raise OptionError where the target or the budget lacks what the method needs."""

    def begin(self, keys: Rows, lengths: Tensor) -> None:
        """A document's prefix of `lengths` [B] tokens is cached; keys(layer) [B, S, Hkv, D]."""

    def observe(self, queries: tuple[Tensor, ...], keys: Rows, start: int) -> None:
        """Queries of the prefix, T tokens from position `start` on, in order: by layer [B, T, Hq, D]; keys(layer)
        [B, start + T, Hkv, D]."""

    def read(self, tokens: Tensor, lengths: Tensor) -> None:
        """Tokens [B, n] int64 that follow the first `lengths` [B] of the text: those of the prefix, later each round's. Earlier
        ones from there on were rejected."""

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists | None:
        """The lists of a layer's round, 1, Hkv or Hq to a sequence; None: it reads everything.

        queries [B, T, Hq, D]; keys [B, S, Hkv, D], those of the round behind `lengths` [B].
        """
        raise NotImplementedError

    def attended(self, layer: int, queries: Tensor, keys: Rows, values: Rows, lengths: Tensor, output: Tensor) -> Tensor:
        """What the layer goes on with: `output` [B, T, Hq, D], its attention over the lists, or something else in its place.

        keys(layer) and values(layer) [B, S, Hkv, D], else as in `choose`.
        """
        return output

    def mass(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> Tensor:
        """Softmax mass of each query head on every cached token, mean over the queries [B, Hq, S]."""
        return attention_mass(queries, keys, lengths, scale=self.target.scales[layer])

    def top(self, scores: Tensor, lengths: Tensor, *, kept: Tensor | None = None, recent: int = 0) -> TokenLists:
        """A list for each row of `scores` [B, H, S] >= 0: its best `kept` [B] tokens, what the budget says where None."""
        rows = torch.arange(scores.shape[1], device=scores.device).view(1, -1, 1)
        share = top_p(self.budget, lengths) if kept is None else None
        kept = top_k(self.budget, lengths) if kept is None else kept
        lists = token_select(scores, lengths, rows, top_k=kept, top_p=share, recent=recent)
        return TokenLists(lists.indices[0], lists.counts[0])

    def marks(self, lists: TokenLists, size: int) -> Tensor:
        """Which of `size` tokens are listed, [B, H, size] bool."""
        places = torch.where(lists.indices >= 0, lists.indices, size).long()  # padding goes to a place of its own
        marked = torch.zeros(*lists.counts.shape, size + 1, dtype=torch.bool, device=places.device)
        return marked.scatter_(2, places, True)[..., :size]

    def by_kv_head(self, scores: Tensor) -> Tensor:
        """Sums over the query heads that share a KV head: [B, Hq, S] -> [B, Hkv, S]."""
        return scores.unflatten(1, (self.target.kv_heads, -1)).sum(2)


class InForward(Lists):
    """The lists of one round of `tokens` [B, T], made while the target's forward runs; in place of a `Selection` there."""

    def __init__(self, rival: Rival, tokens: Tensor, keys: Rows, values: Rows, lengths: Tensor) -> None:
        self._rival, self._keys, self._values, self._lengths = rival, keys, values, lengths
        rival.read(tokens, lengths)
        self._made: dict[int, TokenLists] = {}

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Indices [B, Hs, M] and counts [B, Hs] of a layer with queries [B, T, Hq, D]; None twice where it reads everything."""
        if layer not in self._rival.target.layers:
            return None, None
        lists = self._rival.choose(layer, queries, self._keys(layer), self._lengths)
        if lists is None:
            return None, None
        self._made[layer] = lists
        return lists.indices, lists.counts

    def attended(self, layer: int, queries: Tensor, output: Tensor) -> Tensor:
        """What the layer goes on with, [B, T, Hq, D] like `output`, its attention."""
        if layer not in self._rival.target.layers:
            return output
        return self._rival.attended(layer, queries, self._keys, self._values, self._lengths, output)

    @property
    def made(self) -> Selection | None:
        """The lists of all layers that had some, once the forward is done; None where none had."""
        return as_selection(self._made, self._lengths)


def as_selection(made: dict[int, TokenLists], lengths: Tensor) -> Selection | None:
    """Lists by layer, of any width and of 1 or H heads, as one; None where there are none."""
    if not made:
        return None
    heads, width = max(x.counts.shape[-1] for x in made.values()), max(x.indices.shape[-1] for x in made.values())
    indices = [pad(x.indices, (0, width - x.indices.shape[-1]), value=-1) for x in made.values()]
    return Selection(
        layers=tuple(made),
        indices=torch.stack([x.expand(-1, heads, -1) for x in indices]),
        counts=torch.stack([x.counts.expand(-1, heads) for x in made.values()]),
        lengths=lengths,
    )
