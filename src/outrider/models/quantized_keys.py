"""A copy of the draft's keys in few bits, which scoring reads in place of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from outrider.config import CODE_BITS, SCORE_KEYS, check
from outrider.errors import OptionError
from outrider.models.cache import KVCache, LayerShape
from outrider.models.language_model import LanguageModel
from outrider.ops.quantized_keys import kernel_obstacle, quantize_keys, record_words
from outrider.ops.quantized_keys.layout import BLOCK

WORD = 4  # bytes
AUTO_BITS = 4


class QuantizedKeys:
    """Records of the scored layers' keys; rows are those of the draft's cache.

        records  [L, B, Hkv, capacity // 64, W] int32    64 tokens of a head each; the newest 64 to 127 tokens have none

    A row is filled when its sparse rounds begin, and follows them by a block at a time: rejected tokens are never so old that
    they are coded. Records stay in place from round to round, for CUDA graphs.
    """

    def __init__(self, draft: LanguageModel, layers: tuple[int, ...], bits: int, slots: int, capacity: int) -> None:
        shape = draft.spec.layers[layers[0]]
        self.layers, self.bits, self.backend = layers, bits, draft.backend
        sizes = len(layers), slots, shape.kv_heads, capacity // BLOCK, record_words(shape.head_dim, bits)
        self.records = torch.zeros(sizes, dtype=torch.int32, device=draft.spec.device)

    def rows(self, start: int, stop: int) -> QuantizedKeys:
        """Records of rows start .. stop - 1, sharing storage with these."""
        part = object.__new__(QuantizedKeys)
        part.layers, part.bits, part.backend = self.layers, self.bits, self.backend
        part.records = self.records[:, start:stop]
        return part

    def fill(self, cache: KVCache) -> None:
        """Code all that is cached, for rows whose keys nobody followed."""
        self._code(cache, cache.lengths, last=False)

    def follow(self, cache: KVCache, lengths: Tensor) -> None:
        """Code what `lengths` [B] cached tokens have in addition to those of the round before: a block, or none."""
        self._code(cache, lengths, last=True)

    def move(self, source: int, target: int) -> None:
        """Copy the records of row `source` over those of row `target`."""
        self.records[:, target] = self.records[:, source]

    def _code(self, cache: KVCache, lengths: Tensor, *, last: bool) -> None:
        quantize_keys(
            [cache.keys(layer) for layer in self.layers],
            lengths,
            self.records,
            bits=self.bits,
            key_scales=[cache.key_scales[layer] for layer in self.layers],
            last=last,
            backend=self.backend,
        )


def coded_bytes(layers: Iterable[LayerShape], bits: int) -> int:
    """Bytes of one token's keys as codes, with its share of their ranges."""
    return sum(layer.kv_heads * record_words(layer.head_dim, bits) for layer in layers) * WORD // BLOCK


def code_bits(score_keys: str, draft: LanguageModel, t: int) -> int | None:
    """Bits of the codes that scoring reads under an option in rounds of `t` tokens; None where it reads the keys themselves.

    auto is 4 bits where a kernel takes them on the draft's GPU: there they cost less time. Raises OptionError for an unknown
    choice; whether scored layers take the bits that were asked for is `check_codes`'s to say.
    """
    check("score-keys", score_keys, score_keys in SCORE_KEYS, ", ".join(SCORE_KEYS))
    if score_keys != "auto":
        return CODE_BITS[score_keys]
    if draft.spec.device.type != "cuda" or draft.backend == "reference" or not draft.spec.full_layers:
        return None
    try:
        check_codes(draft, draft.spec.full_layers, AUTO_BITS, t)
    except OptionError:
        return None
    return AUTO_BITS


def name_of_bits(bits: int | None) -> str:
    """What `bits` of a code are called among options and conditions."""
    return next(name for name, own in CODE_BITS.items() if own == bits)


def check_codes(draft: LanguageModel, layers: tuple[int, ...], bits: int, t: int) -> None:
    """Raise OptionError unless scoring can read keys of these layers as codes of so many bits, in rounds of `t` tokens.

    On a GPU that takes kernels: the reference waits for the device, and is left to those who ask for it.
    """
    asked = name_of_bits(bits)
    shapes = {replace(draft.spec.layers[layer], scale=1.0, window=None) for layer in layers}
    if len(shapes) != 1:
        raise OptionError("score-keys", asked, "exact for a draft whose scored layers have not one shape")
    shape = shapes.pop()
    head_dim = shape.head_dim
    if head_dim * bits % 128:
        fitting = [name for name, own in CODE_BITS.items() if own is None or head_dim * own % 128 == 0]
        raise OptionError("score-keys", asked, f"{', '.join(fitting)} for a draft with head dim {head_dim}")
    if draft.backend == "triton":
        raise OptionError("score-keys", asked, "exact with backend triton, which has no kernel that reads codes")
    if draft.spec.device.type == "cuda" and draft.backend != "reference":
        queries = torch.empty(1, t, shape.query_heads, head_dim, dtype=draft.spec.dtype, device=draft.spec.device)
        keys = torch.empty(1, BLOCK, shape.kv_heads, head_dim, dtype=draft.spec.cache_dtype, device=draft.spec.device)
        if reason := kernel_obstacle([queries] * len(layers), [keys] * len(layers), bits=bits):
            raise OptionError("score-keys", asked, f"exact with this draft and device ({reason})")
    if t > BLOCK:  # a round may complete two blocks then
        raise OptionError("K (draft-tokens)", t - 1, f"at most {BLOCK - 1} with score-keys {asked}")
