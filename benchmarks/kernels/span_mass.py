"""Cases of span_mass: what a chunk's blocks may look at, in one layer of the draft, against torch. Its bound is arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.case import SPARE, generator, relative_error, size
from benchmarks.peers import Peer
from benchmarks.timing import Call
from outrider.ops.span_mass import span_mass


@dataclass(frozen=True, slots=True)
class Inputs:
    queries: Tensor  # [B, T, Hq, D] bf16
    keys: Tensor  # [B, N, Hkv, D] view of [B, Hkv, N, D]
    lengths: Tensor  # [B] int32


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanMass:
    id: str
    S: int  # tokens before the chunk
    T: int = 4096
    block: int = 128  # of queries, and of tokens whose masses are added up
    page: int = 16
    Hq: int = 32
    Hkv: int = 8
    D: int = 64
    op: str = "span_mass"
    tolerance: float = 1e-2

    @property
    def scale(self) -> float:
        return self.D**-0.5

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)
        storage = torch.randn(
            [1, self.Hkv, self.S + self.T + SPARE, self.D], dtype=torch.bfloat16, generator=random, device=device
        )
        storage[:, :, self.S + self.T :] = torch.nan
        queries = torch.randn(1, self.T, self.Hq, self.D, dtype=torch.bfloat16, generator=random, device=device)
        return Inputs(queries, storage.transpose(1, 2), torch.full((1,), self.S, dtype=torch.int32, device=device))

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return span_mass(
            inputs.queries, inputs.keys, inputs.lengths,
            block=self.block, span=self.block, scale=self.scale, page=self.page, backend=backend,
        )  # fmt: skip

    def fewest_bytes(self, inputs: Inputs) -> int:
        """Keys, queries, and masses of the blocks' spans."""
        masses = self.T // self.block * self.Hq * (inputs.keys.shape[1] // self.block) * 4
        return masses + self.Hkv * (self.S + self.T) * self.D * 2 + size(inputs.queries, inputs.lengths)

    def key_bytes(self, inputs: Inputs) -> None:
        return None

    def operations(self, inputs: Inputs) -> int:
        """Of the two products that make a bound, of each query with the pages before its block, once."""
        pages = sum((self.S + start) // self.page for start in range(0, self.T, self.block))
        return 4 * self.Hq * self.D * self.block * pages

    def error(self, inputs: Inputs, output: Tensor) -> float:
        """Of the first and the last block, for the first and the last KV head."""
        G, last, parts, truths = self.Hq // self.Hkv, self.T - self.block, [], []
        if output.shape[:3] != (1, self.T // self.block, self.Hq) or not output.isfinite().all():
            return torch.inf
        for h, first in ((0, 0), (self.Hkv - 1, last)):
            spans = (self.S + first) // self.block
            rows = inputs.keys[0, : spans * self.block, h].double().unflatten(0, (-1, self.page))
            q = inputs.queries[0, first : first + self.block, h * G : (h + 1) * G].double()
            bounds = q.clamp(min=0) @ rows.amax(1).T + q.clamp(max=0) @ rows.amin(1).T  # [block, G, pages]
            mass = (bounds * self.scale).softmax(-1).mean(0)
            parts.append(output[0, first // self.block, h * G : (h + 1) * G, :spans].flatten())
            truths.append(mass.unflatten(-1, (spans, -1)).sum(-1).flatten())
        return relative_error(torch.cat(parts), torch.cat(truths))

    def peers(self) -> Sequence[Peer]:
        return [Peer(name="torch", prepare=self._torch, error=self.error)]

    def _torch(self, inputs: Inputs) -> Call:
        """Bounds in bfloat16, a KV head at a time, their softmax, and its sums."""
        queries = (inputs.queries[0] * self.scale).unflatten(1, (self.Hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, G, T, D]
        pages = (self.S + self.T) // self.page
        block = torch.arange(self.T, device=queries.device) // self.block * self.block + self.S
        hidden = torch.arange(pages, device=queries.device) >= (block // self.page)[:, None]

        def call() -> Tensor:
            heads = []
            for h in range(self.Hkv):
                rows = inputs.keys[0, : pages * self.page, h].unflatten(0, (-1, self.page))
                q = queries[h]
                bounds = q.clamp(min=0) @ rows.amax(1).T + q.clamp(max=0) @ rows.amin(1).T  # [G, T, pages]
                mass = bounds.masked_fill_(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
                mass = mass.unflatten(1, (-1, self.block)).mean(2)
                heads.append(mass.unflatten(-1, (-1, self.block // self.page)).sum(-1))
            return torch.stack(heads).flatten(0, 1).transpose(0, 1)[None]

        return call
