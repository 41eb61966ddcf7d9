"""A copy of the keys in few bits, and the attention mass on it."""

from outrider.ops.quantized_keys.api import kernel_obstacle, quantize_keys, quantized_mass
from outrider.ops.quantized_keys.layout import BITS, record_words

__all__ = ["BITS", "kernel_obstacle", "quantize_keys", "quantized_mass", "record_words"]
