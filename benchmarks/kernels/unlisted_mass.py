"""Cases of unlisted_mass: what lists of a round leave out of the rows that chose them, against torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.case import generator, relative_error, size
from benchmarks.peers import Peer
from benchmarks.timing import Call
from outrider.ops.unlisted_mass import unlisted_mass

CHECKED = 6  # lists compared with the truth


@dataclass(frozen=True, slots=True)
class Inputs:
    scores: Tensor  # [1, R, S] bf16
    lengths: Tensor  # [1] int32
    sources: Tensor  # [Lt, Hs, G] int64
    indices: Tensor  # [Lt, 1, Hs, M] int32
    counts: Tensor  # [Lt, 1, Hs] int32


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlistedMass:
    """R lists of random tokens, in layers of `heads`, each from G of R rows."""

    id: str
    R: int
    S: int
    keep: float = 0.1
    G: int = 1
    heads: int = 8
    op: str = "unlisted_mass"
    tolerance: float = 1e-3

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)
        scores = torch.randn(1, self.R, self.S, generator=random, device=device).mul_(2).exp_().to(torch.bfloat16)
        order = torch.randperm(self.R, generator=random, device=device)
        sources = torch.stack([order.roll(i * self.R // self.G) for i in range(self.G)], dim=-1)
        k = int(self.keep * self.S)
        lists = torch.rand(self.R, self.S, generator=random, device=device).topk(k).indices.sort().values.int()
        shape = (self.R // self.heads, 1, self.heads)
        return Inputs(
            scores,
            torch.full((1,), self.S, dtype=torch.int32, device=device),
            sources.view(-1, self.heads, self.G),
            lists.view(*shape, k),
            torch.full(shape, k, dtype=torch.int32, device=device),
        )

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return unlisted_mass(inputs.scores, inputs.lengths, inputs.sources, inputs.indices, inputs.counts, backend=backend)

    def fewest_bytes(self, inputs: Inputs) -> int:
        """Every row once, the lists, and a score for every listed token and row."""
        gathered = inputs.indices.numel() * self.G * inputs.scores.element_size()
        return gathered + size(inputs.scores, inputs.lengths, inputs.sources, inputs.indices, inputs.counts)

    def key_bytes(self, inputs: Inputs) -> None:
        return None

    def operations(self, inputs: Inputs) -> None:
        return None

    def error(self, inputs: Inputs, output: Tensor) -> float:
        """Of the first lists."""
        chosen, lists = inputs.sources.flatten(0, 1)[:CHECKED], inputs.indices.flatten(0, 2)[:CHECKED]
        truths = []
        for sources, indices in zip(chosen, lists, strict=True):
            rows = inputs.scores[0, sources].double()
            truths.append(1 - rows[:, indices.long()].sum() / rows.sum())
        return relative_error(output.flatten()[:CHECKED], torch.stack(truths))

    def peers(self) -> Sequence[Peer]:
        return [Peer(name="torch", prepare=self._torch, error=self.error)]

    def _torch(self, inputs: Inputs) -> Call:
        """Merge, sum, gather: in float32, as sums of 16 bits lose too much."""
        sources, places = inputs.sources.flatten(0, 1), inputs.indices.flatten(0, 2).long()

        def call() -> Tensor:
            rows = inputs.scores[0, sources].float().sum(1)
            return 1 - rows.gather(1, places).sum(1) / rows.sum(1)

        return call
