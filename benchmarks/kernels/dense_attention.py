"""Cases of sparse_attention without lists: one layer, every cached token, against FlashAttention-3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.kernels.case import size
from benchmarks.kernels.sparse_attention import Inputs, SparseAttention
from benchmarks.peers import FA3, Peer
from outrider.ops.sparse_attention import sparse_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseAttention(SparseAttention):
    """The storage of the sparse cases; their lists are empty."""

    keep: float = 0.0
    op: str = "dense_attention"

    def run(self, inputs: Inputs, backend: str) -> Tensor:
        return sparse_attention(
            inputs.queries, inputs.keys, inputs.values, None, None, inputs.lengths,
            scale=self.scale, key_scale=inputs.key_scale, value_scale=inputs.value_scale, backend=backend,
        )  # fmt: skip

    def fewest_bytes(self, inputs: Inputs) -> int:
        rows = self.B * self.Hkv * (self.S + self.T)
        return rows * 2 * self.D * inputs.keys.element_size() + size(inputs.lengths, inputs.queries, inputs.queries)

    def error(self, inputs: Inputs, output: Tensor) -> float:
        return self._dense_error(inputs, output)

    def peers(self) -> Sequence[Peer]:
        return [] if self.fp8 else [Peer(name="FA3 dense", needs=FA3, prepare=self._fa3_dense, error=self._dense_error)]
