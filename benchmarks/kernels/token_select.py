"""Cases of token_select: rows that look like softmax masses, against torch.topk, torch.sort and FlashInfer's top-k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.kernels.case import generator, size
from benchmarks.peers import FLASHINFER, Peer
from benchmarks.timing import Call
from outrider.ops.token_select import TokenLists, token_select

SINKS, RECENT = 4, 64
MARGIN = 1.15  # width of a top-p result over the tokens expected
CHECKED = 6  # lists compared with the truth


@dataclass(frozen=True, slots=True)
class Inputs:
    scores: Tensor  # [1, R, S]
    lengths: Tensor  # [1] int32
    sources: Tensor  # [Lt, Hs, G] int64
    top_k: int | None
    top_p: float | None
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSelect:
    """R rows give R lists, in layers of `heads`; with G > 1 each list merges G of the rows, and each row serves G lists."""

    id: str
    R: int
    S: int
    budget: str = "top_k"
    keep: float = 0.1
    G: int = 1
    dtype: torch.dtype = torch.bfloat16
    heads: int = 8
    op: str = "token_select"
    tolerance: float = 0.0  # no list may differ

    @property
    def k(self) -> int:
        return int(self.keep * self.S)

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)
        scores = torch.randn(self.R, self.S, generator=random, device=device).mul_(2).exp_()
        scores = (scores / scores.sum(-1, keepdim=True)).to(self.dtype)
        order = torch.randperm(self.R, generator=random, device=device)
        sources = torch.stack([order.roll(i * self.R // self.G) for i in range(self.G)], dim=-1)
        lengths = torch.full((1,), self.S, dtype=torch.int32, device=device)
        if self.budget == "top_k":
            return Inputs(scores.unsqueeze(0), lengths, sources.view(-1, self.heads, self.G), self.k, None, self.k)
        width = min(int(MARGIN * self.k), self.S)
        return Inputs(scores.unsqueeze(0), lengths, sources.view(-1, self.heads, self.G), None, self._p(scores, width), width)

    def _p(self, scores: Tensor, width: int) -> float:
        """The share of the mass that the best k tokens of a row hold, in the median; less, if a list would not fit `width`."""
        order = scores.float().masked_fill(_forced(scores), torch.inf).sort(descending=True).indices
        sums = scores.double().gather(1, order).cumsum(1)
        held = sums / sums[:, -1:]
        return float(torch.minimum(held[:, self.k - 1].median(), held[:, width - 2].min()))

    def run(self, inputs: Inputs, backend: str) -> TokenLists:
        return token_select(
            inputs.scores, inputs.lengths, inputs.sources, top_k=inputs.top_k, top_p=inputs.top_p,
            sinks=SINKS, recent=RECENT, width=inputs.width, backend=backend,
        )  # fmt: skip

    def fewest_bytes(self, inputs: Inputs) -> int:
        """Scores once, and k entries a list (top-p: about as many) with the count."""
        lists = inputs.sources.shape[0] * inputs.sources.shape[1]
        return size(inputs.scores, inputs.sources, inputs.lengths) + lists * (self.k + 1) * 4

    def key_bytes(self, inputs: Inputs) -> None:
        return None

    def operations(self, inputs: Inputs) -> None:
        return None

    def error(self, inputs: Inputs, output: TokenLists) -> float:
        """The share of the checked lists that differ from the truth.

        Merged scores may be compared at full precision or by their upper 16 bits: a list must be right for one of the two.
        """
        layers, heads = inputs.sources.shape[:2]
        if output.indices.shape != (layers, 1, heads, inputs.width) or output.counts.shape != (layers, 1, heads):
            return 1.0
        wrong = 0
        chosen = torch.linspace(0, layers * heads - 1, CHECKED).long().tolist()
        for i in chosen:
            layer, head = divmod(i, heads)
            count = int(output.counts[layer, 0, head])
            listed = output.indices[layer, 0, head]
            row = self._merged(inputs, layer, head)
            coarse = (row.view(torch.int32) & -65536).view(torch.float32)
            padded = count <= inputs.width and bool((listed[count:] == -1).all())
            wrong += not (padded and any(self._right(inputs, scores, listed[:count].long()) for scores in (row, coarse)))
        return wrong / len(chosen)

    def _merged(self, inputs: Inputs, layer: int, head: int) -> Tensor:
        """The float32 row of one list: rows added in the order of G, then divided."""
        rows = inputs.scores[0, inputs.sources[layer, head]].float()
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        return total / self.G

    def _right(self, inputs: Inputs, row: Tensor, listed: Tensor) -> bool:
        """Whether `listed` is ascending, the row's best tokens, lower positions first among equals, and as many as asked."""
        forced = _forced(row)
        order = row.masked_fill(forced, torch.inf).sort(descending=True, stable=True).indices
        count = len(listed)
        if not torch.equal(listed, order[:count].sort().values):
            return False
        if inputs.top_p is None:
            return count == min(max(self.k, int(forced.sum())), self.S)
        masses = row.double()
        wanted = inputs.top_p * float(masses.sum())
        holds = float(masses[listed].sum()) >= wanted * (1 - 1e-12)
        smaller = listed[listed != order[count - 1]]  # without the last one taken
        needed = count <= int(forced.sum()) or float(masses[smaller].sum()) < wanted * (1 + 1e-9)
        return holds and needed

    def peers(self) -> Sequence[Peer]:
        """They return positions in no order, or all of them sorted, without sinks and recent tokens: less than the op does."""
        if self.budget == "top_p":
            return [Peer(name="torch.sort + cumsum", prepare=lambda inputs: self._sort_cumsum(inputs))]
        merge = "merge + " if self.G > 1 else ""
        return [
            Peer(name=f"{merge}torch.topk", prepare=self._topk),
            Peer(name=f"{merge}flashinfer.top_k", needs=FLASHINFER, prepare=self._flashinfer),
        ]

    def _rows(self, inputs: Inputs) -> Call:
        """What a peer chooses from: the rows as they are, or merged by torch, which is part of its time."""
        scores, sources = inputs.scores[0], inputs.sources.view(-1, self.G)
        if self.G == 1:
            return lambda: scores
        return lambda: scores[sources].float().mean(1)

    def _topk(self, inputs: Inputs) -> Call:
        rows = self._rows(inputs)
        return lambda: rows().topk(self.k, sorted=False)

    def _flashinfer(self, inputs: Inputs) -> Call:
        return peers.flashinfer_top_k(self._rows(inputs), self.k)

    def _sort_cumsum(self, inputs: Inputs) -> Call:
        rows, p = self._rows(inputs), inputs.top_p

        def call() -> tuple[Tensor, Tensor]:
            values, indices = rows().sort(descending=True)
            sums = values.cumsum(-1, dtype=torch.float32)
            return indices, (sums < p * sums[:, -1:]).sum(-1) + 1

        return call


def _forced(scores: Tensor) -> Tensor:
    """`[S]`: the positions that are always kept."""
    S = scores.shape[-1]
    position = torch.arange(S, device=scores.device)
    return (position < SINKS) | (position >= S - RECENT)
