"""Keys in few bits, as methods keep them beside the cache in order to guess logits."""

from __future__ import annotations

from torch import Tensor

RANGE_BYTES = 4  # least value and step of a coded row, 16 bits each


def coded(rows: Tensor, bits: int) -> Tensor:
    """Rows [..., D] as they read from codes of `bits` bits: each rounded to 2**bits even steps from its least to its largest
    value."""
    least = rows.amin(-1, keepdim=True)
    step = (rows.amax(-1, keepdim=True) - least).clamp(min=1e-9) / (2**bits - 1)
    return ((rows - least) / step).round() * step + least


def coded_bytes(width: int, bits: int) -> float:
    """Of a row of `width` numbers."""
    return width * bits / 8 + RANGE_BYTES
