"""Cases of block_mass: a chunk of a prompt in one layer of the draft, against torch. Its bound is exponentials, not bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.case import SPARE, attention, generator, relative_error, size
from benchmarks.peers import Peer
from benchmarks.timing import Call
from outrider.ops.block_mass import block_mass


@dataclass(frozen=True, slots=True)
class Inputs:
    queries: Tensor  # [B, T, Hq, D] bf16
    keys: Tensor  # [B, N, Hkv, D] view of [B, Hkv, N, D]
    lengths: Tensor  # [B] int32
    logsumexp: Tensor | None  # [B, Hq, T] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMass:
    id: str
    S: int  # tokens before the chunk
    B: int = 1
    T: int = 2048
    block: int = 128
    known: bool = True  # the logsumexp is given
    Hq: int = 32
    Hkv: int = 8
    D: int = 64
    op: str = "block_mass"
    tolerance: float = 1e-2

    @property
    def scale(self) -> float:
        return self.D**-0.5

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)
        shape = [self.B, self.Hkv, self.S + self.T + SPARE, self.D]
        storage = torch.randn(shape, dtype=torch.bfloat16, generator=random, device=device)
        storage[:, :, self.S + self.T :] = torch.nan
        queries = torch.randn(self.B, self.T, self.Hq, self.D, dtype=torch.bfloat16, generator=random, device=device)
        lengths = torch.full((self.B,), self.S, dtype=torch.int32, device=device)
        logsumexp = self._logsumexp(queries, storage) if self.known else None
        return Inputs(queries, storage.transpose(1, 2), lengths, logsumexp)

    def _logsumexp(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Of queries `[B, T, Hq, D]` over keys `[B, Hkv, N, D]`, a head at a time."""
        heads = []
        for h in range(self.Hq):
            seen = keys[:, h * self.Hkv // self.Hq, : self.S + self.T].float()
            logits = queries[:, :, h].float() @ seen.mT * self.scale
            heads.append(self._causal(logits).logsumexp(-1))
        return torch.stack(heads, 1)

    def _causal(self, logits: Tensor) -> Tensor:
        """`[..., T, S + T]`, with the chunk's later tokens hidden from earlier ones."""
        hidden = torch.ones(self.T, self.T, dtype=torch.bool, device=logits.device).triu(1)
        logits[..., self.S :].masked_fill_(hidden, -torch.inf)
        return logits

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return block_mass(
            inputs.queries, inputs.keys, inputs.lengths,
            block=self.block, scale=self.scale, logsumexp=inputs.logsumexp, dtype=torch.bfloat16, backend=backend,
        )  # fmt: skip

    def fewest_bytes(self, inputs: Inputs) -> int:
        masses = self.B * -(-self.T // self.block) * self.Hq * inputs.keys.shape[1] * 2
        known = () if inputs.logsumexp is None else (inputs.logsumexp,)
        return masses + self.B * self.Hkv * (self.S + self.T) * self.D * 2 + size(inputs.queries, inputs.lengths, *known)

    def key_bytes(self, inputs: Inputs) -> None:
        return None

    def operations(self, inputs: Inputs) -> int:
        """Of the product of each query with the keys before its block, once."""
        blocks = ((i, min(self.block, self.T - i)) for i in range(0, self.T, self.block))
        return 2 * self.B * self.Hq * self.D * sum(queries * (self.S + start) for start, queries in blocks)

    def error(self, inputs: Inputs, output: Tensor) -> float:
        """Of the first and the last block, for the first and the last KV head."""
        blocks = -(-self.T // self.block)
        if output.shape != (self.B, blocks, self.Hq, inputs.keys.shape[1]):
            return torch.inf
        if any(bool((output[:, i, :, self.S + i * self.block :] != 0).any()) for i in range(blocks)):
            return torch.inf
        return self._past_error(inputs, output)

    def _past_error(self, inputs: Inputs, output: Tensor) -> float:
        """The same for a result with anything at and behind a block's start."""
        if not output.isfinite().all():
            return torch.inf
        G, last = self.Hq // self.Hkv, (self.T - 1) // self.block * self.block
        parts, truths = [], []
        for b, h, first in ((0, 0, 0), (self.B - 1, self.Hkv - 1, last)):
            start, end = self.S + first, min(first + self.block, self.T)
            queries = inputs.queries[b, first:end, h * G : (h + 1) * G]
            weights = attention(queries, inputs.keys[b, : self.S + end, h], None, self.scale, end - first)
            parts.append(output[b, first // self.block, h * G : (h + 1) * G, :start].flatten())
            truths.append(weights[..., :start].mean(0).flatten())
        return relative_error(torch.cat(parts), torch.cat(truths))

    def peers(self) -> Sequence[Peer]:
        return [Peer(name="torch", prepare=self._torch, error=self._past_error)]

    def _torch(self, inputs: Inputs) -> Call:
        """softmax(q k^T) in bfloat16, a KV head at a time, and its mean over every block."""
        keys = inputs.keys[:, : self.S + self.T].permute(0, 2, 3, 1)  # [B, Hkv, D, S + T]
        queries = (inputs.queries * self.scale).unflatten(2, (self.Hkv, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, T, D]

        def call() -> Tensor:
            heads = []
            for h in range(self.Hkv):
                weights = self._causal(queries[:, h] @ keys[:, h].unsqueeze(1)).softmax(-1)
                heads.append(torch.stack([part.mean(2) for part in weights.split(self.block, 2)], 1))
            return torch.cat(heads, 2)

        return call
