"""Cases of quantized_mass: all layers of the draft from codes of few bits, against exact keys and reading the codes once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.case import SPARE, attention, generator, relative_error, size
from benchmarks.peers import Peer
from benchmarks.timing import Call
from outrider.ops.attention_mass import attention_mass
from outrider.ops.quantized_keys import quantize_keys, quantized_mass, record_words

BLOCK = 64  # tokens of a record


@dataclass(frozen=True, slots=True)
class Inputs:
    queries: list[Tensor]  # by layer [B, T, Hq, D] bf16
    keys: list[Tensor]  # by layer [B, N, Hkv, D] view of [B, Hkv, N, D] bf16
    records: Tensor  # [L, B, Hkv, blocks, words] int32
    lengths: Tensor  # [B] int32


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMass:
    """Keys lie on a grid of 2^bits numbers whose ends each block holds, so that coding them loses nothing."""

    id: str
    S: int
    B: int
    bits: int = 4
    L: int = 16
    T: int = 5
    Hq: int = 32
    Hkv: int = 8
    D: int = 64
    op: str = "quantized_mass"
    tolerance: float = 1e-2

    @property
    def scales(self) -> list[float]:
        return [self.D**-0.5] * self.L

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)

        given = {"generator": random, "device": device}
        shape = (self.L, self.B, self.T, self.Hq, self.D)
        queries = torch.randn(shape, dtype=torch.bfloat16, **given)
        levels = 2**self.bits
        shape = (self.L, self.B, self.Hkv, self.S + SPARE, self.D)
        codes = torch.randint(levels, shape, dtype=torch.uint8, **given)
        codes[:, :, :, ::BLOCK], codes[:, :, :, 1::BLOCK] = 0, levels - 1
        keys = codes.to(torch.bfloat16).sub_((levels - 1) / 2).mul_(4 / levels)
        keys[:, :, :, self.S + self.T :] = torch.nan
        lengths = torch.full((self.B,), self.S, dtype=torch.int32, device=device)
        shape = (self.L, self.B, self.Hkv, (self.S + SPARE) // BLOCK, record_words(self.D, self.bits))
        records = torch.zeros(shape, dtype=torch.int32, device=device)
        by_layer = [one.transpose(1, 2) for one in keys]
        quantize_keys(by_layer, lengths, records, bits=self.bits)
        return Inputs(list(queries), by_layer, records, lengths)

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return quantized_mass(
            inputs.queries, inputs.keys, inputs.records, inputs.lengths,
            bits=self.bits, scales=self.scales, dtype=torch.bfloat16, backend=backend,
        )  # fmt: skip

    def fewest_bytes(self, inputs: Inputs) -> int:
        scores = self.L * self.B * self.Hq * inputs.keys[0].shape[1] * 2
        return self.key_bytes(inputs) + scores + size(inputs.lengths, *inputs.queries)

    def key_bytes(self, inputs: Inputs) -> int:
        """The codes, and the newest tokens exactly."""
        coded = (self.S - BLOCK) // BLOCK
        exact = self.L * self.B * self.Hkv * (self.S - coded * BLOCK + self.T) * self.D * 2
        return size(inputs.records[:, :, :, :coded]) + exact

    def operations(self, inputs: Inputs) -> None:
        return None

    def error(self, inputs: Inputs, output: Tensor) -> float:
        """Of the query heads of one KV head of the first and the last layer, from the mass over exact keys."""
        G, rows, N = self.Hq // self.Hkv, [], inputs.keys[0].shape[1]
        if output.shape != (self.B, self.L * self.Hq, N) or bool((output[:, :, self.S :] != 0).any()):
            return torch.inf
        for layer, b, h in ((0, 0, 0), (self.L - 1, self.B - 1, self.Hkv - 1)):
            queries = inputs.queries[layer][b, :, h * G : (h + 1) * G]
            weights = attention(queries, inputs.keys[layer][b, : self.S + self.T, h], None, self.D**-0.5, self.T)
            first = layer * self.Hq + h * G
            rows.append((output[b, first : first + G, : self.S], weights[..., : self.S].mean(0)))
        return relative_error(*(torch.stack(part) for part in zip(*rows, strict=True)))

    def peers(self) -> Sequence[Peer]:
        return [Peer(name="exact keys", prepare=self._exact, error=None)]

    def _exact(self, inputs: Inputs) -> Call:
        """The same from keys in bf16, a launch a layer."""
        N = inputs.keys[0].shape[1]
        out = torch.empty(self.B, self.L * self.Hq, N, dtype=torch.bfloat16, device=inputs.lengths.device)

        def call() -> Tensor:
            for layer, (queries, keys) in enumerate(zip(inputs.queries, inputs.keys, strict=True)):
                rows = out[:, layer * self.Hq : (layer + 1) * self.Hq]
                attention_mass(queries, keys, inputs.lengths, scale=self.D**-0.5, dtype=torch.bfloat16, out=rows)
            return out

        return call
