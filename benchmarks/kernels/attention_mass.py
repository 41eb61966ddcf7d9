"""Cases of attention_mass: one layer of the draft, against torch and against reading the keys once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.case import SPARE, attention, generator, relative_error, size
from benchmarks.peers import Peer
from benchmarks.timing import Call
from outrider.ops.attention_mass import attention_mass


@dataclass(frozen=True, slots=True)
class Inputs:
    queries: Tensor  # [B, T, Hq, D] bf16
    keys: Tensor  # [B, N, Hkv, D] view of [B, Hkv, N, D] or [B, Hkv, N, 2, D]
    lengths: Tensor  # [B] int32


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMass:
    id: str
    S: int
    B: int
    interleaved: bool = False  # keys beside values in memory
    T: int = 5
    Hq: int = 32
    Hkv: int = 8
    D: int = 64
    op: str = "attention_mass"
    tolerance: float = 1e-2

    @property
    def scale(self) -> float:
        return self.D**-0.5

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)
        shape = [self.B, self.Hkv, self.S + SPARE, 1 + self.interleaved, self.D]
        storage = torch.randn(shape, dtype=torch.bfloat16, generator=random, device=device)
        storage[:, :, self.S + self.T :] = torch.nan
        return Inputs(
            torch.randn(self.B, self.T, self.Hq, self.D, dtype=torch.bfloat16, generator=random, device=device),
            storage[:, :, :, 0].transpose(1, 2),
            torch.full((self.B,), self.S, dtype=torch.int32, device=device),
        )

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return attention_mass(
            inputs.queries, inputs.keys, inputs.lengths, scale=self.scale, dtype=torch.bfloat16, backend=backend
        )

    def fewest_bytes(self, inputs: Inputs) -> int:
        scores = self.B * self.Hq * inputs.keys.shape[1] * 2
        return self.key_bytes(inputs) + scores + size(inputs.queries, inputs.lengths)

    def key_bytes(self, inputs: Inputs) -> int:
        return self.B * self.Hkv * (self.S + self.T) * self.D * 2

    def operations(self, inputs: Inputs) -> None:
        return None

    def error(self, inputs: Inputs, output: Tensor) -> float:
        """Of the query heads of the first and the last KV head of the batch."""
        if output.shape != (self.B, self.Hq, inputs.keys.shape[1]) or bool((output[:, :, self.S :] != 0).any()):
            return torch.inf
        return self._past_error(inputs, output)

    def _past_error(self, inputs: Inputs, output: Tensor) -> float:
        """The same for a result with any columns behind the past."""
        G = self.Hq // self.Hkv
        parts, truths = [], []
        for b, h in ((0, 0), (self.B - 1, self.Hkv - 1)):
            queries = inputs.queries[b, :, h * G : (h + 1) * G]
            weights = attention(queries, inputs.keys[b, : self.S + self.T, h], None, self.scale, self.T)
            parts.append(output[b, h * G : (h + 1) * G, : self.S])
            truths.append(weights[..., : self.S].mean(0))
        return relative_error(torch.stack(parts), torch.stack(truths)) if output.isfinite().all() else torch.inf

    def peers(self) -> Sequence[Peer]:
        return [Peer(name="torch", prepare=self._torch, error=self._past_error)]

    def _torch(self, inputs: Inputs) -> Call:
        """softmax(q k^T) in bfloat16, the causal tail ignored."""
        keys = inputs.keys[:, : self.S + self.T].permute(0, 2, 3, 1)  # [B, Hkv, D, S + T]
        queries = inputs.queries.unflatten(2, (self.Hkv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G T, D]

        def call() -> Tensor:
            mass = (queries * self.scale @ keys).softmax(-1)
            return mass.unflatten(2, (-1, self.T)).mean(3).flatten(1, 2)

        return call
