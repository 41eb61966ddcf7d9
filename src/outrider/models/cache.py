"""The key/value cache: explicit lengths, append, advance, truncate.

    row b of a layer:  [ 0 ........ lengths[b] )[ lengths[b] .. lengths[b] + T )[ ...... capacity )
                         cached, committed        appended by the running forward   unwritten

Lengths live on the cache's device, so that a captured round can grow them. On a GPU nothing here waits for them: who appends
has made sure of the room.

A forward *appends* its T rows behind the committed ones in every layer; nobody but the engine *advances* the lengths. So a
rejected round costs nothing to undo: what was not advanced over is overwritten by the next append.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.errors import OptionError
from outrider.models.quantization import CacheScales
from outrider.ops import kv_append


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one attention layer looks like from outside."""

    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float  # factor on query . key
    window: int | None  # sliding-window width in tokens, or None for full attention


def aligned(tokens: int) -> int:
    """The next multiple of 64: rows of so many scores begin at multiples of 16 bytes, and kernels meet few widths."""
    return -(-tokens // 64) * 64


class KVCache:
    """Keys and values of all layers for up to B sequences of up to `capacity` tokens.

    Storage is [B, Hkv, capacity, D] per layer, so that one head's rows lie together; `keys` and `values` return views in the
    public layout [B, S, Hkv, D], as stored. `lengths` [B] int64 lives on the device. A cache of float8_e4m3fn needs `scales`;
    `key_scales` and `value_scales` hold, for every layer, the factor [Hkv] float32 of what is stored, or None in other dtypes.
    """

    def __init__(
        self,
        layers: tuple[LayerShape, ...],
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        scales: CacheScales | None = None,
    ) -> None:
        self.layers = layers
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        none: tuple[Tensor | None, ...] = (None,) * len(layers)
        self.key_scales, self.value_scales = (none, none) if scales is None else (scales.keys, scales.values)
        # zeros, not empty: a masked row must hold finite numbers, since 0 * NaN is NaN in dense attention
        self._keys = [torch.zeros(batch, x.kv_heads, capacity, x.head_dim, dtype=dtype, device=device) for x in layers]
        self._values = [torch.zeros_like(keys) for keys in self._keys]

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def device(self) -> torch.device:
        return self._keys[0].device

    def rows(self, start: int, stop: int) -> KVCache:
        """Sequences start .. stop - 1 as a cache that shares storage and lengths with this one."""
        part = object.__new__(KVCache)
        part.layers, part.capacity = self.layers, self.capacity
        part.key_scales, part.value_scales = self.key_scales, self.value_scales
        part.lengths = self.lengths[start:stop]
        part._keys = [keys[start:stop] for keys in self._keys]
        part._values = [values[start:stop] for values in self._values]
        return part

    def append(self, layer: int, keys: Tensor, values: Tensor, backend: str = "auto") -> None:
        """Write keys and values [B, T, Hkv, D], in the model's dtype, behind the committed rows; lengths stay as they are.

        Raises OptionError when a row does not fit (on a CPU); nothing is written then.
        """
        self.check_room(keys.shape[1])
        kv_append(
            keys,
            values,
            self.keys(layer),
            self.values(layer),
            self.lengths,
            key_scale=self.key_scales[layer],
            value_scale=self.value_scales[layer],
            backend=backend,
        )

    def check_room(self, tokens: int) -> None:
        """Raise OptionError when `tokens` more rows of every sequence do not fit (on a CPU)."""
        if not self.lengths.is_cuda and (needed := int(self.lengths.max()) + tokens) > self.capacity:
            raise OptionError("cache capacity", self.capacity, f"at least {needed} tokens")

    def advance(self, count: Tensor | int) -> None:
        """Commit `count` appended tokens of every sequence ([B] int64, or one number for all)."""
        self.lengths += count.to(self.device) if isinstance(count, Tensor) else count

    def truncate(self, lengths: Tensor | int) -> None:
        """Forget what lies at and past `lengths` ([B] int64, or one number for all).

        Raises OptionError for lengths below 0 or above the current ones (on a CPU).
        """
        lengths = torch.as_tensor(lengths, device=self.device).expand_as(self.lengths)
        if not self.lengths.is_cuda and (bool((lengths > self.lengths).any()) or bool((lengths < 0).any())):
            raise OptionError("truncate lengths", lengths.tolist(), f"0 .. the current lengths {self.lengths.tolist()}")
        self.lengths.copy_(lengths)

    def fill_with_noise(self) -> None:
        """Normal noise in place of all keys, lengths as they are: attention over it is no special case, as over equal keys."""
        for keys in self._keys:
            keys.copy_(torch.randn(keys.shape[1:], device=keys.device))

    def move(self, source: int, target: int) -> None:
        """Copy sequence `source` over sequence `target` and leave `source` empty."""
        n = int(self.lengths[source])
        for stored in (*self._keys, *self._values):
            stored[target, :, :n] = stored[source, :, :n]
        self.lengths[target] = n
        self.lengths[source] = 0

    def keys(self, layer: int, stop: int | None = None) -> Tensor:
        """View [B, S, Hkv, D] of the first `stop` rows (all when None), committed or not."""
        return self._keys[layer][:, :, :stop].transpose(1, 2)

    def values(self, layer: int, stop: int | None = None) -> Tensor:
        """View [B, S, Hkv, D], like `keys`."""
        return self._values[layer][:, :, :stop].transpose(1, 2)
