"""Which layers compute what their fused form does: measured on random tokens, layer by layer, when a model is compiled.

Parts alike may be put together otherwise: residuals with a factor, another layout of the rotation, some layers without any,
gains of 1 + w. So transformers' own layer and the fused one run side by side, and all that leaves a layer is compared: what it
adds to the hidden states, its queries, and the keys and values in the cache.

Two sequences behind different numbers of cached tokens, and at different places: one at the start of the context, the other at
its end, since some layers treat distant tokens differently. Hidden states are small, so that what a layer adds outweighs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from outrider.models.attention import Forward
from outrider.models.cache import KVCache
from outrider.models.compilation import decoder_layers
from outrider.models.fused_layer import FusedLayer, recognise, route
from outrider.models.quantization import FP8, dequantize
from outrider.models.ranks import ALONE, Ranks

CACHED = (5, 2)  # tokens of the two sequences
TOKENS = 3
CAPACITY = max(CACHED) + TOKENS
SIZE = 0.02  # of hidden states
EXACT, ROUNDED = 1e-4, 0.05  # error allowed, as a share: rounding to bfloat16, or to 8 bits in the cache, costs 2 % as it is


@torch.inference_mode()
def find_fused_layers(
    module: Any, caches: tuple[KVCache, KVCache], context: int, backend: str, ranks: Ranks = ALONE
) -> dict[int, FusedLayer]:
    """The fused form, by index, of all layers of a transformers model that have one and agree with it; routes lead to it.

    `caches` are two empty ones of two sequences and `CAPACITY` tokens, `context` is the number of positions the model has,
    `backend` that of the fused ops. A layer that no kernel of this backend takes does not agree; with several `ranks` all have
    to.
    """
    recognised = [fused for layer in decoder_layers(module) if (fused := recognise(layer, backend, ranks)) is not None]
    if not recognised:
        return {}
    trial = _Trial(module.get_decoder(), recognised[0].layer.input_layernorm.weight, caches, context)
    device = caches[0].device
    agreeing = {fused.index: fused for fused in recognised if ranks.least(float(trial.agree(fused)), device) > 0}
    for index, fused in agreeing.items():
        route(fused.layer, index)
    return agreeing


class _Trial:
    """The same random hidden states and cached tokens for transformers' own layers and the fused ones."""

    def __init__(self, decoder: Any, gain: Tensor, caches: tuple[KVCache, KVCache], context: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(gain)

        self.decoder, self.caches = decoder, caches
        rounded = gain.dtype.itemsize == 2 or caches[0].keys(0).dtype == FP8
        self.tolerance = ROUNDED if rounded else EXACT
        self.hidden = SIZE * random(len(CACHED), TOKENS, len(gain))
        first = torch.tensor([CACHED[0], context - TOKENS], device=gain.device)[:, None]
        self.positions = first + torch.arange(TOKENS, device=gain.device)
        for layer, shape in enumerate(caches[0].layers):
            keys, values = (random(len(CACHED), max(CACHED), shape.kv_heads, shape.head_dim) for _ in range(2))
            for cache in caches:
                cache.append(layer, keys, values)
        for cache in caches:
            cache.advance(torch.tensor(CACHED))

    def agree(self, fused: FusedLayer) -> bool:
        def own(hidden: Tensor, position: tuple[Tensor, Tensor], forward: Forward) -> Tensor:
            return fused.layer.forward(
                hidden,
                attention_mask=None,
                position_ids=self.positions,
                past_key_values=None,
                use_cache=False,
                position_embeddings=position,
                outrider=forward,
            )

        try:
            wanted = self._run(own, self.caches[0], fused.index)
            found = self._run(fused, self.caches[1], fused.index)
        except (AttributeError, KeyError, TypeError, ValueError):
            return False  # to be called otherwise, or with what no kernel takes
        return all(self._close(*pair) for pair in zip(found, wanted, strict=True))

    def _run(self, layer: Callable[..., Tensor], cache: KVCache, index: int) -> list[Tensor]:
        """What a layer adds to the hidden states, its queries [B, T, Hq, D], and new keys and values [B, T, Hkv, D]."""
        queries: list[Tensor] = []
        forward = Forward(cache=cache, stop=CAPACITY, queries=queries)
        # the module's own forward: position encoding that was compiled would be compiled again for this shape
        position = self.decoder.rotary_emb.forward(self.hidden, position_ids=self.positions)
        added = layer(self.hidden, position, forward) - self.hidden
        sequence = torch.arange(len(CACHED), device=cache.device)[:, None]
        new = cache.lengths[:, None] + torch.arange(TOKENS, device=cache.device)
        stored = ((cache.keys(index), cache.key_scales[index]), (cache.values(index), cache.value_scales[index]))
        return [added, *queries, *(dequantize(rows, scale, added.dtype)[sequence, new] for rows, scale in stored)]

    def _close(self, found: Tensor, wanted: Tensor) -> bool:
        error, size = (x.square().mean().sqrt() for x in (found.double() - wanted.double(), wanted.double()))
        return bool(error <= self.tolerance * size)
