"""The method `adore`: ADORE, adaptive token release (Zhang et al., arXiv 2407.02328)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.errors import OptionError
from outrider.guidance.rivals.base import Rival, Rows
from outrider.ops import TokenLists

REBUILT = 16  # released tokens that may come back for each token of a round
NUMBER_BYTES = 2  # of a number in a controller's state
LEAST = 1e-30


class Adore(Rival):
    """A cache of constant size for all layers and heads: a trained controller says which tokens stay; a released token that
    scores high again is rebuilt.

    As published: a GRU over the text gives every token an importance for the current one; the cache holds the most important
    tokens, the same in all layers, and releases the others; of the released ones the most important few are fed again together
    with the current token, which rebuilds their keys and values; the controller learns what the target's own attention would
    put first.

    Not found in what is published (there is no code), and chosen here: how importance follows from the GRU
    (`guidance/controller.py`); how it is trained (`recipes/adore`; the target, which the paper tunes lightly as well, stays as
    it is); how many tokens are rebuilt: 16 for each of a round's; the size: a share of the context, equal for all methods.
    Importance is a probability, averaged over a round's queries. The prompt is read with full attention and released from
    behind it. Rows of released tokens stay in memory here and are read again, as they were, in place of what a sparse cache
    would rebuild. They are charged as if rebuilt: written once, in all layers, before they are read with the others. `touched`
    is these written rows, and the states of all tokens, in 16 bits, which each round's scores read.
    """

    def __post_init__(self) -> None:
        if self.target.controller is None or self.target.embed is None:
            raise OptionError("controller", None, "a file made by `recipes/adore` for this target")

    def begin(self, keys: Rows, lengths: Tensor) -> None:
        assert self.target.controller is not None
        empty = torch.zeros(len(lengths), 0, self.target.controller.width, device=lengths.device)
        self._states = empty.half()  # [B, S, w], of the tokens that were read
        self._cached = empty[..., 0].bool()[:, None]  # [B, 1, S], as of the last round; what has come since is cached, too

    def read(self, tokens: Tensor, lengths: Tensor) -> None:
        controller, embed = self.target.controller, self.target.embed
        assert controller is not None and embed is not None
        row = torch.arange(len(lengths), device=lengths.device)
        behind = lengths[:, None] + torch.arange(1, tokens.shape[1] + 1, device=lengths.device)
        known = pad(self._states, (0, 0, 1, tokens.shape[1]))  # one place in front: before the first token the state is 0
        self._asking = controller.states(embed(tokens), known[row, lengths]).half()
        self._states = known.index_put((row[:, None], behind), self._asking)[:, 1:]

    def choose(self, layer: int, queries: Tensor, keys: Tensor, lengths: Tensor) -> TokenLists:
        if layer == self.target.layers[0]:
            self._lists = self._chosen(keys.shape[1], lengths)
        return self._lists

    def _chosen(self, size: int, lengths: Tensor) -> TokenLists:
        """The round's list [B, 1, M], of tokens that are cached and of those that may be rebuilt."""
        controller, states = self.target.controller, self._states[:, :size]
        assert controller is not None
        scores = controller.logits(self._asking, states, lengths).sigmoid().mean(1, keepdim=True) + LEAST  # [B, 1, S]
        cached = pad(self._cached, (0, size - self._cached.shape[-1]), value=True)
        few = torch.full_like(lengths, REBUILT * self._asking.shape[1])
        returning = self.marks(self.top(scores * ~cached, lengths, kept=few), size)
        lists = self.top(scores * (cached | returning), lengths)
        listed = self.marks(lists, size)
        rebuilt = (listed & ~cached).sum((1, 2)).double() * (2 * self.target.row_bytes * len(self.target.layers))
        self.touched = self.touched + rebuilt + lengths * (controller.width * NUMBER_BYTES)
        self._states = states
        self._cached = listed | (torch.arange(size, device=lengths.device) >= lengths.view(-1, 1, 1))
        return lists
