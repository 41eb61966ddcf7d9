"""What the draft itself reads of a long prompt: for each block the earlier blocks of tokens that seem to matter most."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.decoding.memory import INDEX_BYTES
from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.models.cache import aligned
from outrider.ops import span_mass, token_select
from outrider.ops.span_mass import PAGE

SINKS = RECENT = 1  # blocks that are always read: the first one, and the one before
WIDTHS = 16  # strides that kernels see are multiples of it, so that no length of a prompt compiles them anew


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftReading:
    """What the draft's blocks read of the tokens before them: a share, and so many at least."""

    keep: float = 1.0
    least: int = 0

    def kept(self, before: int, block: int) -> int:
        """Blocks that one with `before` blocks before it reads of these."""
        return min(before, max(math.ceil(self.keep * before - 1e-9), -(-self.least // block), SINKS + RECENT))

    def share(self, tokens: int, block: int) -> float:
        """Of all pairs of a block and one before it in a prompt, those that are read."""
        before = range(1, -(-tokens // block))
        return sum(self.kept(n, block) for n in before) / max(1, sum(before))

    def lists(self, draft: LanguageModel, cache: KVCache, start: int, stop: int, block: int) -> DraftBlocks | None:
        """The lists of a chunk of positions start .. stop - 1 whose first one begins a block; None where it reads all."""
        before = range(start // block, -(-stop // block))
        kept = [self.kept(n, block) for n in before]
        return None if kept == [*before] else DraftBlocks(draft, cache, start, stop, block, kept)

    def bytes(self, draft: ModelSpec, capacity: int, chunk: int, block: int) -> int:
        """What lists of one chunk take in one layer: tokens, bounds of pages, and masses of blocks on blocks."""
        if self.keep == 1.0:
            return 0
        shape, blocks = draft.full_shape, -(-chunk // block)
        lists = shape.kv_heads * blocks * capacity * INDEX_BYTES
        bounds = 2 * shape.kv_heads * shape.head_dim * capacity // PAGE * draft.dtype.itemsize
        return lists + bounds + shape.query_heads * blocks * capacity // block * 4


EVERYTHING = DraftReading()


class DraftBlocks:
    """Lists of one chunk, chosen layer by layer inside the draft's forward from bounds of its attention (`span_mass`).

    A list holds whole blocks, there is one for each KV head. Layers with a window have none.
    """

    def __init__(self, draft: LanguageModel, cache: KVCache, start: int, stop: int, block: int, kept: list[int]) -> None:
        """A chunk of positions start .. stop - 1, the first of a block; each of its blocks reads so many of `kept`."""
        self.draft, self.cache, self.block = draft, cache, block
        self.listed: dict[int, Tensor] = {}  # by layer [B, NB, Hkv, blocks of the cache] bool: what was read
        self._stop = min(aligned(stop), cache.capacity)
        self._lengths = torch.full((cache.batch,), start, device=cache.device)
        self._before = torch.arange(start, stop, block, device=cache.device) // block  # blocks before each block
        self._kept, self._most = torch.tensor(kept, device=cache.device), max(kept)
        self._backend = "auto" if draft.backend == "cuda" else draft.backend  # no kernel in CUDA C++

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Indices [B, NB, Hkv, M] and counts [B, NB, Hkv] of a layer; None twice where it has a window."""
        shape, b = self.draft.spec.layers[layer], len(queries)
        if shape.window is not None:
            return None, None
        keys = self.cache.keys(layer, self._stop)
        masses = span_mass(
            queries,
            keys,
            self._lengths,
            block=self.block,
            span=self.block,
            scale=shape.scale,
            key_scale=self.cache.key_scales[layer],
            page=math.gcd(PAGE, self.block),
            backend=self._backend,
        )
        rows = torch.arange(shape.query_heads, device=masses.device).view(1, shape.kv_heads, -1)
        lists = token_select(
            masses.flatten(0, 1),
            self._before.repeat(b),
            rows,
            top_k=self._kept.repeat(b),
            sinks=SINKS,
            recent=RECENT,
            width=self._most,
            backend=self._backend,
        )
        chosen, counts = (x[0].unflatten(0, (b, -1)) for x in lists)  # [B, NB, Hkv, blocks], [B, NB, Hkv]
        self.listed[layer] = self._marks(chosen)
        tokens = chosen[..., None] * self.block + torch.arange(self.block, dtype=torch.int32, device=chosen.device)
        return tokens.flatten(-2), counts * self.block

    def _marks(self, chosen: Tensor) -> Tensor:
        """[B, NB, Hkv, blocks of the cache] bool from lists of blocks, padded with -1, which goes to a place of its own."""
        blocks = -(-self._stop // self.block)
        places = torch.where(chosen >= 0, chosen, blocks).long()
        marks = torch.zeros(*chosen.shape[:-1], (blocks // WIDTHS + 1) * WIDTHS, dtype=torch.bool, device=chosen.device)
        return marks.scatter_(-1, places, True)[..., :blocks]
