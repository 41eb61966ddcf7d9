"""Cases of chunk_attention: a chunk of the prompt in one layer, with random lists or dense, beside FlashAttention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.kernels.case import SPARE, attention, generator, relative_error, size
from benchmarks.peers import FA3, Peer
from benchmarks.timing import Call
from outrider.ops.chunk_attention import chunk_attention

CHECKED = 64  # queries of a block that are compared with the truth


@dataclass(frozen=True, slots=True)
class Inputs:
    queries: Tensor  # [B, T, Hq, D] bf16
    keys: Tensor  # [B, N, Hkv, D] view
    values: Tensor
    indices: Tensor | None  # [B, NB, Hkv, M] int32
    counts: Tensor | None  # [B, NB, Hkv] int32
    lengths: Tensor  # [B] int32


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkAttention:
    """Storage is twice `[B, Hkv, N, D]`. S tokens lie before the chunk of T; every block lists a share `keep` of S tokens."""

    id: str
    S: int
    B: int = 1
    keep: float = 0.1  # 0: dense
    T: int = 4096
    block: int = 512
    Hq: int = 32
    Hkv: int = 8
    D: int = 128
    op: str = "chunk_attention"
    tolerance: float = 1e-2

    @property
    def scale(self) -> float:
        return self.D**-0.5

    @property
    def blocks(self) -> list[range]:
        """Queries of each; one block where there are no lists."""
        block = self.block if self.keep else self.T
        return [range(first, min(first + block, self.T)) for first in range(0, self.T, block)]

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)
        end, M = self.S + self.T, int(self.keep * self.S)
        storage = torch.randn(2, self.B, self.Hkv, end + SPARE, self.D, dtype=torch.bfloat16, generator=random, device=device)
        storage[:, :, :, end:] = torch.nan
        indices = counts = None
        if self.keep:
            indices = torch.empty(self.B, len(self.blocks), self.Hkv, M, dtype=torch.int32, device=device)
            for i, queries in enumerate(self.blocks):
                draws = torch.rand(self.B, self.Hkv, self.S + queries.start, generator=random, device=device)
                indices[:, i] = draws.topk(M, sorted=False).indices.int().sort().values
            counts = torch.full(indices.shape[:3], M, dtype=torch.int32, device=device)
        return Inputs(
            torch.randn(self.B, self.T, self.Hq, self.D, dtype=torch.bfloat16, generator=random, device=device),
            storage[0].transpose(1, 2),
            storage[1].transpose(1, 2),
            indices,
            counts,
            torch.full((self.B,), self.S, dtype=torch.int32, device=device),
        )

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return chunk_attention(
            inputs.queries, inputs.keys, inputs.values, inputs.indices, inputs.counts, inputs.lengths,
            block=self.block, scale=self.scale, backend=backend,
        )  # fmt: skip

    def fewest_bytes(self, inputs: Inputs) -> int:
        """The rows of every list once, and those of the chunk; or all rows once."""
        rows, lists = self.B * self.Hkv * (self.S + self.T), 0
        if inputs.indices is not None and inputs.counts is not None:
            rows = int(inputs.counts.sum()) + self.B * self.Hkv * self.T
            lists = int(inputs.counts.sum()) * 4 + size(inputs.counts)
        cache = rows * 2 * self.D * inputs.keys.element_size()
        return cache + lists + size(inputs.lengths, inputs.queries, inputs.queries)

    def key_bytes(self, inputs: Inputs) -> None:
        return None

    def operations(self, inputs: Inputs) -> int:
        past = int(self.keep * self.S) if self.keep else self.S
        pairs = sum(len(queries) * past + len(queries) * (len(queries) + 1) // 2 for queries in self.blocks)
        return 4 * self.B * self.Hq * self.D * pairs

    def error(self, inputs: Inputs, output: Tensor) -> float:
        """Of the last queries of the first and the last block, one KV head each."""
        if output.shape != inputs.queries.shape or not output.isfinite().all():
            return torch.inf
        parts, truths = [], []
        for b, i, h in ((0, 0, 0), (self.B - 1, -1, self.Hkv - 1)):
            start, end = self.S + self.blocks[i].start, self.S + self.blocks[i].stop
            past = torch.arange(start, device=output.device) if inputs.indices is None else inputs.indices[b, i, h].long()
            read = torch.cat([past, torch.arange(start, end, device=output.device)])
            asked = self.blocks[i][-CHECKED:]
            queries, got = (x.unflatten(2, (self.Hkv, -1))[b, asked.start : asked.stop, h] for x in (inputs.queries, output))
            keys, values = inputs.keys[b, read, h], inputs.values[b, read, h]
            parts.append(got.flatten())
            truths.append(attention(queries, keys, values, self.scale, len(asked)).flatten())
        return relative_error(torch.cat(parts), torch.cat(truths))

    def peers(self) -> Sequence[Peer]:
        error = None if self.keep else self.error
        return [
            Peer(name="FA3 dense", needs=FA3, prepare=self._fa3_dense, error=error),
            Peer(name="SDPA dense", prepare=self._sdpa_dense, error=error),
        ]

    def _sdpa_dense(self, inputs: Inputs) -> Call:
        end = self.S + self.T
        return peers.torch_flash(inputs.queries, inputs.keys[:, :end], inputs.values[:, :end], scale=self.scale)

    def _fa3_dense(self, inputs: Inputs) -> Call:
        end = self.S + self.T
        keys, values = inputs.keys[:, :end], inputs.values[:, :end]
        return peers.fa3(inputs.queries, keys, values, inputs.lengths + self.T, scale=self.scale, causal=True)
