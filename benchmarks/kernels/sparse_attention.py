"""Cases of sparse_attention: one layer, random lists, against FlashAttention-3 and FlashInfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.kernels.case import SPARE, attention, generator, relative_error, size
from benchmarks.peers import FA3, FLASHINFER, Peer
from benchmarks.timing import Call
from outrider.ops.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True)
class Inputs:
    queries: Tensor  # [B, T, Hq, D] bf16
    keys: Tensor  # [B, N, Hkv, D] view
    values: Tensor
    indices: Tensor  # [B, Hkv, M] int32
    counts: Tensor  # [B, Hkv] int32
    lengths: Tensor  # [B] int32
    key_scale: Tensor | None  # [Hkv] float32
    value_scale: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseAttention:
    """Storage is `[B, Hkv, N, 2, D]`, keys and values of a token side by side, or twice `[B, Hkv, N, D]` (separate)."""

    id: str
    S: int
    B: int
    keep: float = 0.1
    separate: bool = False
    fp8: bool = False
    T: int = 5
    Hq: int = 32
    Hkv: int = 8
    D: int = 128
    op: str = "sparse_attention"
    tolerance: float = 1e-2

    @property
    def scale(self) -> float:
        return self.D**-0.5

    def inputs(self, device: torch.device, copy: int = 0) -> Inputs:
        random = generator(self.id, copy, device)
        N, M = self.S + SPARE, int(self.keep * self.S)
        shape = [2, self.B, self.Hkv, N, self.D] if self.separate else [self.B, self.Hkv, N, 2, self.D]
        storage = torch.randn(shape, dtype=torch.bfloat16, generator=random, device=device)
        storage.narrow(3 if self.separate else 2, self.S + self.T, SPARE - self.T).fill_(torch.nan)
        storage = storage.to(torch.float8_e4m3fn) if self.fp8 else storage
        keys, values = storage.unbind(0 if self.separate else 3)
        order = torch.rand(self.B, self.Hkv, self.S, generator=random, device=device).topk(M, sorted=False).indices
        scales = torch.rand(2, self.Hkv, generator=random, device=device) + 0.5
        return Inputs(
            torch.randn(self.B, self.T, self.Hq, self.D, dtype=torch.bfloat16, generator=random, device=device),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            order.int().sort().values,
            torch.full((self.B, self.Hkv), M, dtype=torch.int32, device=device),
            torch.full((self.B,), self.S, dtype=torch.int32, device=device),
            *(scales if self.fp8 else (None, None)),
        )

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return sparse_attention(
            inputs.queries, inputs.keys, inputs.values, inputs.indices, inputs.counts, inputs.lengths,
            scale=self.scale, key_scale=inputs.key_scale, value_scale=inputs.value_scale, backend=backend,
        )  # fmt: skip

    def fewest_bytes(self, inputs: Inputs) -> int:
        rows = int(inputs.counts.sum()) + self.B * self.Hkv * self.T  # listed, and the tail
        cache = rows * 2 * self.D * inputs.keys.element_size()
        return cache + int(inputs.counts.sum()) * 4 + size(inputs.counts, inputs.lengths, inputs.queries, inputs.queries)

    def key_bytes(self, inputs: Inputs) -> None:
        return None

    def operations(self, inputs: Inputs) -> None:
        return None

    def error(self, inputs: Inputs, output: Tensor) -> float:
        """Of the first and the last KV head of the batch."""
        return self._error(inputs, output.unflatten(2, (self.Hkv, -1)).transpose(1, 2), listed=True, tail=self.T)

    def _error(self, inputs: Inputs, output: Tensor, *, listed: bool, tail: int) -> float:
        """Of `output [B, Hkv, T, G, D]` as attention over the list, or all tokens, and a causal tail."""
        if not output.isfinite().all():
            return torch.inf
        parts, truths = [], []
        for b, h in ((0, 0), (self.B - 1, self.Hkv - 1)):
            past = inputs.indices[b, h, : int(inputs.counts[b, h])].long() if listed else slice(0, self.S)
            cache = [inputs.keys[b, :, h], inputs.values[b, :, h]]
            factors = [1.0 if x is None else float(x[h]) for x in (inputs.key_scale, inputs.value_scale)]
            keys, values = (
                torch.cat([x[past].double(), x[self.S : self.S + tail].double()]) * factor
                for x, factor in zip(cache, factors, strict=True)
            )
            queries = inputs.queries.unflatten(2, (self.Hkv, -1))[b, :, h]
            parts.append(output[b, h])
            truths.append(attention(queries, keys, values, self.scale, tail))
        return relative_error(torch.stack(parts), torch.stack(truths))

    def peers(self) -> Sequence[Peer]:
        """None of them reads this cache in float8 as it lies."""
        if self.fp8:
            return []
        return [
            Peer(name="FA3 dense", needs=FA3, prepare=self._fa3_dense, error=self._dense_error),
            Peer(name="FA3 page 1", needs=FA3, prepare=self._fa3_pages, error=self._pages_error),
            Peer(name="FlashInfer page 1", needs=FLASHINFER, prepare=self._flashinfer_pages, error=self._pages_error),
        ]

    def _fa3_dense(self, inputs: Inputs) -> Call:
        end = self.S + self.T
        keys, values = inputs.keys[:, :end], inputs.values[:, :end]
        return peers.fa3(inputs.queries, keys, values, inputs.lengths + self.T, scale=self.scale, causal=True)

    def _fa3_pages(self, inputs: Inputs) -> Call:
        queries, keys, values, pages = self._folded(inputs)
        lengths = inputs.counts.reshape(-1)
        return peers.fa3(queries, keys, values, lengths, scale=self.scale, causal=False, pages=pages)

    def _flashinfer_pages(self, inputs: Inputs) -> Call:
        return peers.flashinfer_pages(*self._folded(inputs), scale=self.scale)

    def _folded(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """KV heads as batch entries, tokens as pages: queries `[B Hkv, T, G, D]`, keys and values `[B Hkv N, 1, 1, D]`, pages.

        Token i of KV head h of sequence b is page `(b Hkv + h) N + i`. The tail is left out: less work for the peer.
        """
        queries = inputs.queries.unflatten(2, (self.Hkv, -1)).transpose(1, 2).flatten(0, 1).contiguous()
        N = inputs.keys.shape[1]
        keys, values = (x.transpose(1, 2).view(-1, 1, 1, self.D) for x in (inputs.keys, inputs.values))
        first = torch.arange(self.B * self.Hkv, dtype=torch.int32, device=queries.device) * N
        return queries, keys, values, inputs.indices.flatten(0, 1) + first.unsqueeze(1)

    def _dense_error(self, inputs: Inputs, output: Tensor) -> float:
        return self._error(inputs, output.unflatten(2, (self.Hkv, -1)).transpose(1, 2), listed=False, tail=self.T)

    def _pages_error(self, inputs: Inputs, output: Tensor) -> float:
        return self._error(inputs, output.view(self.B, self.Hkv, self.T, -1, self.D), listed=True, tail=0)
