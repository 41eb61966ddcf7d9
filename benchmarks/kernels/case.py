"""What every case offers to the run, and the fp64 computations that results are checked against."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.peers import Peer

SPARE = 128  # rows of a cache behind the cached tokens; those behind the tail hold NaN: they must not be read


class Case(Protocol):
    """One row of the table: an op at one size."""

    @property
    def id(self) -> str: ...

    @property
    def op(self) -> str: ...

    @property
    def tolerance(self) -> float:
        """Largest allowed `error`."""
        ...

    def inputs(self, device: torch.device, copy: int = 0) -> Any:
        """Fresh random inputs; the same for the same `copy`."""
        ...

    def run(self, inputs: Any, backend: str) -> Any:
        """The op itself: what is timed."""
        ...

    def error(self, inputs: Any, output: Any) -> float:
        """How far `output` is from the truth, computed here without the op's code, on a part of the output."""
        ...

    def fewest_bytes(self, inputs: Any) -> int:
        """The fewest bytes that the op must move."""
        ...

    def key_bytes(self, inputs: Any) -> int | None:
        """Those of the keys alone, where they are a row of their own."""
        ...

    def operations(self, inputs: Any) -> int | None:
        """Floating-point operations, of an op that is bound by them."""
        ...

    def peers(self) -> Sequence[Peer]: ...


def generator(case_id: str, copy: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1000 * zlib.crc32(case_id.encode()) + copy)


def size(*tensors: Tensor) -> int:
    """Bytes of whole tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def relative_error(output: Tensor, truth: Tensor) -> float:
    """||output - truth|| / ||truth||; infinite where the output is not finite or has another shape."""
    if output.shape != truth.shape or not output.isfinite().all():
        return torch.inf
    return float((output.double() - truth).norm() / truth.norm())


def attention(queries: Tensor, keys: Tensor, values: Tensor | None, scale: float, tail: int) -> Tensor:
    """One KV head in fp64: queries `[T, G, D]` over keys `[n, D]`, the last `tail` of them causal.

    Returns the result `[T, G, D]`, or the weights `[T, G, n]` if there are no values.
    """
    T, n = queries.shape[0], keys.shape[0]
    logits = torch.einsum("tgd,nd->tgn", queries.double(), keys.double()) * scale
    step = torch.arange(n, device=keys.device) - (n - tail)
    hidden = step > torch.arange(T, device=keys.device).unsqueeze(1)  # [T, n]
    weights = logits.masked_fill(hidden.unsqueeze(1), -torch.inf).softmax(-1)
    return weights if values is None else torch.einsum("tgn,nd->tgd", weights, values.double())
