"""The method `vertical-slash`: the vertical-slash heads of MInference (Jiang et al., arXiv 2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.guidance.prefill_rivals.base import Prompt
from outrider.ops import TokenLists, token_select

QUERIES = 64  # last ones of the prompt: their attention is the estimate
FIRST, NEAREST = 30, 100  # columns and slashes that rank before all others, as in the published code
SLASH_SHARE = 6096 / (1000 + 6096)  # of the budget: the published code's slashes and columns for heads it knows nothing of
ENTRIES = 2**26  # pairs of a head and a token that are looked at at a time, while lists are made


class VerticalSlash:
    """Every query head reads whole columns (tokens that all later ones look at) and slashes (tokens at the same distance behind
    every query), which the attention of the prompt's last 64 queries shows. A `BlockLists` of one forward.

    As published: a column's and a slash's score are the sums of that attention over it; the first 30 columns and the nearest
    100 slashes come first; a slash is read for blocks of queries at a time. Chosen here: a slash is as wide as a block, so that
    block i reads the tokens of block i - j; it has the scores of the single slashes that cross such a pair of blocks, each by
    the share of it inside. The budget is the share `keep` of all pairs of a block and a token before it. Slashes may take 6096
    of 7096 parts of it, the published sizes where no search was made, and columns what is left, tokens that slashes already
    read not counted twice: so keeping everything is dense. The paper searches one pattern (A-shape, vertical-slash or
    block-sparse) and its sizes for each head offline, at equal cost; vertical-slash is what most heads get there, and all here.
    """

    def __init__(self, prompt: Prompt, block: int, keep: float) -> None:
        self.prompt, self._block, self.keep = prompt, block, keep
        self._listed: list[Tensor] = []  # by layer [B]

    @property
    def block(self) -> int:
        """Tokens that share lists."""
        return self._block

    @property
    def listed(self) -> Tensor:
        """Tokens on the lists of each prompt, averaged over layers and heads, summed over blocks, [B] fp64."""
        return torch.stack(self._listed).mean(0)

    def before(self, start: int, stop: int) -> int:
        """Tokens before the blocks of a chunk, tokens start .. stop - 1, summed over blocks."""
        return sum(range(start, stop, self.block))

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Indices [B, NB, Hq, M] and counts [B, NB, Hq] for a layer's queries [B, T, Hq, D]; None twice: it reads all."""
        if layer not in self.prompt.layers:
            return None, None
        with self.prompt.stage("score"):
            columns, slashes = estimate(queries, self.prompt.keys(layer), scale=self.prompt.scales[layer])
        with self.prompt.stage("select"):
            lists = choose(columns, slashes, block=self.block, keep=self.keep).lists(self.prompt.backend)
        self._listed.append(lists.counts.double().mean(2).sum(1))
        return lists.indices, lists.counts


def estimate(queries: Tensor, keys: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """The attention of a prompt's last queries, by column and by slash.

    queries [B, T, Hq, D], keys [B, T, Hkv, D] -> [B, Hq, T] twice, fp32 (fp64 of such queries): sums over the queries, for
    every token, and for every distance from query to token.
    """
    t, group = queries.shape[1], queries.shape[2] // keys.shape[2]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    last = queries[:, -QUERIES:].to(dtype).transpose(1, 2).unflatten(1, (-1, group))  # [B, Hkv, G, Q, D]
    n = last.shape[3]
    hidden = torch.arange(t, device=keys.device) > torch.arange(t - n, t, device=keys.device)[:, None]  # [Q, T]
    columns, slashes = [], []
    for head in range(keys.shape[2]):  # one after the other: [B, G, Q, T] is as much as should be there at a time
        logits = last[:, head] @ (keys[:, :, head].to(dtype) * scale).mT[:, None]
        mass = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        columns.append(mass.sum(-2))
        # row i of the queries, from below, moves i places to the right: a slash is a column then
        moved = pad(mass.flip(-2), (0, n)).flatten(-2)[..., :-n].unflatten(-1, (n, t + n - 1))
        slashes.append(moved.sum(-2)[..., :t].flip(-1))
    return torch.cat(columns, 1), torch.cat(slashes, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What the query heads of one layer read, NB blocks of a prompt of T tokens."""

    columns: Tensor  # [B, Hq, T] bool: read by every block behind the token's own
    slashes: Tensor  # [B, Hq, NB] bool: at j, block i reads block i - j; never at 0, the block itself
    block: int

    def lists(self, backend: str = "auto") -> TokenLists:
        """Indices [B, NB, Hq, M] int32, ascending, -1 at and past the counts [B, NB, Hq] int32. Waits for the longest."""
        b, heads, blocks = self.slashes.shape
        device, block = self.columns.device, self.block
        columns = pad(self.columns, (0, blocks * block - self.columns.shape[-1])).unflatten(-1, (blocks, block))[:, None]
        numbers = columns.sum(-1, dtype=torch.int32)  # [B, 1, Hq, NB]
        starts = torch.arange(blocks, device=device) * block
        sources = torch.arange(heads, device=device).view(1, -1, 1)

        def read(first: int, last: int) -> tuple[Tensor, Tensor]:
            """Of what blocks first .. last - 1 read: blocks as a whole, and blocks of which they read the columns; [B, n, Hq,
            NB'] bool, of all blocks before the last one."""
            distance = torch.arange(first, last, device=device)[:, None] - torch.arange(max(last - 1, 1), device=device)
            before = (distance > 0)[:, None]
            whole = self.slashes[:, :, distance.clamp(min=0)].transpose(1, 2) & before
            return whole, before & ~whole

        counts = []
        for first in range(0, blocks, few := max(1, ENTRIES // (b * heads * blocks))):
            whole, some = read(first, min(first + few, blocks))
            counts.append(torch.where(whole, block, some * numbers[..., : some.shape[-1]]).sum(-1, dtype=torch.int32))
        count = torch.cat(counts, 1)  # [B, NB, Hq]
        width, parts = max(int(count.max()), 1), []
        for first in range(0, blocks, few := max(1, ENTRIES // (b * heads * blocks * block))):
            last = min(first + few, blocks)
            whole, some = read(first, last)
            listed = whole[..., None] | (some[..., None] & columns[:, :, :, : some.shape[-1]])  # [B, n, Hq, NB', block]
            # 1 where a token is read, and as many are wanted: the op puts them in a list
            found = token_select(
                listed.flatten(3).flatten(0, 1).bfloat16(),
                starts[first:last].expand(b, -1).flatten(),
                sources,
                top_k=count[:, first:last].flatten(0, 1)[None].contiguous(),
                width=width,
                backend=backend,
            )
            parts.append(found.indices[0].unflatten(0, (b, -1)))
        return TokenLists(torch.cat(parts, 1), count)


def choose(columns: Tensor, slashes: Tensor, *, block: int, keep: float) -> Pattern:
    """Slashes from the highest score down while they fit into their share of the budget, then columns while they fit.

    columns, slashes [B, Hq, T] >= 0, for tokens and for distances.
    """
    t = columns.shape[-1]
    blocks = -(-t // block)
    distance = torch.arange(blocks, device=columns.device)
    budget = keep * (block * blocks * (blocks - 1) // 2)  # pairs of a block and a token before it

    scores = of_blocks(slashes, block)
    near = (distance - 1) * block < NEAREST - 1  # crossed by one of the nearest slashes
    scores = scores.masked_fill(near, torch.inf).masked_fill(distance == 0, -torch.inf)
    cost = ((blocks - distance) * block).masked_fill(distance == 0, 0).expand_as(scores)
    wide = _best(scores, cost, SLASH_SHARE * budget) & (distance > 0)

    spent = (cost * wide).sum(-1, keepdim=True)
    covered = wide.cumsum(-1).flip(-1)  # of a block: how many of those behind it read it whole
    each = (blocks - 1 - distance - covered).repeat_interleave(block, -1)[..., :t]  # a column's cost
    first = torch.arange(t, device=columns.device) < FIRST
    tall = _best(columns.masked_fill(first, torch.inf), each, budget - spent)
    return Pattern(columns=tall, slashes=wide, block=block)


def of_blocks(slashes: Tensor, block: int) -> Tensor:
    """Scores [B, Hq, T] of slashes -> [B, Hq, NB], of pairs of blocks by their distance: a slash counts by the share of it that
    crosses such a pair, what lies between two distances for both."""
    blocks = -(-slashes.shape[-1] // block)
    rows = pad(slashes, (0, blocks * block - slashes.shape[-1])).unflatten(-1, (blocks, block))
    farther = torch.arange(block, device=slashes.device, dtype=slashes.dtype) / block
    return (rows * (1 - farther)).sum(-1) + pad((rows * farther).sum(-1)[..., :-1], (1, 0))


def _best(scores: Tensor, cost: Tensor, budget: Tensor | float) -> Tensor:
    """From the highest score down, what fits into the budget; [..., n] bool. Equal scores in their order."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    fits = cost.gather(-1, order).cumsum(-1).double() <= budget
    return torch.zeros_like(fits).scatter_(-1, order, fits)
