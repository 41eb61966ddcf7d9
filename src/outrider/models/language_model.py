"""A decoder-only transformers model, seen as: tokens and a cache in, logits (and queries) out."""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from outrider.config import BACKENDS, check
from outrider.errors import OptionError
from outrider.models.agreement import CACHED, CAPACITY, find_fused_layers
from outrider.models.attention import ROUND, Forward
from outrider.models.cache import KVCache, LayerShape
from outrider.models.compilation import compile_layers, has_compiled_layers
from outrider.models.fused_layer import FusedLayer
from outrider.models.fusion import fuse_projections
from outrider.models.quantization import FP8, CacheScales, check_kv_dtype, probe, scale_of
from outrider.models.ranks import ALONE, Ranks
from outrider.ops.backends import device_obstacle
from outrider.ops.fused_linear import MAX_ROWS
from outrider.types import BlockLists, Lists, PromptAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the rest of Outrider knows about a model."""

    name: str  # hub id or folder name
    digest: str  # of the architecture (see loading.config_digest)
    layers: tuple[LayerShape, ...]
    vocabulary: int  # width of the logits
    context: int  # positions the model was made for
    eos_tokens: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    kv_dtype: str = "auto"  # how caches store keys and values: in `dtype`, or fp8
    ranks: int = 1  # that share the heads: `layers` are what one of them has

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of stored keys and values."""
        return FP8 if self.kv_dtype == "fp8" else self.dtype

    @property
    def whole(self) -> ModelSpec:
        """The same model with the heads of all ranks."""
        n = self.ranks
        layers = (replace(x, query_heads=n * x.query_heads, kv_heads=n * x.kv_heads) for x in self.layers)
        return replace(self, layers=tuple(layers), ranks=1)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers with full attention; the others look at a sliding window and stay as they are."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.window is None)

    @property
    def full_shape(self) -> LayerShape:
        """The shape of the layers with full attention (of the first layer when there are none)."""
        return self.layers[self.full_layers[0] if self.full_layers else 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one forward returns."""

    logits: Tensor  # [B, T, V] in the dtype of the model, or of the last tokens; [B, 0, V] if not asked for
    queries: tuple[Tensor, ...]  # per layer [B, T, Hq, D]; empty unless recorded
    logsumexp: tuple[Tensor, ...] = ()  # per layer [B, Hq, T] fp32, of each query's logits; empty unless recorded


def check_backend(backend: str, device: torch.device) -> None:
    """Raise OptionError for an unknown backend of the ops, and for one that no call on `device` can run."""
    check("backend", backend, backend in BACKENDS, ", ".join(BACKENDS))
    if (reason := device_obstacle(backend, device)) is not None:
        usable = ", ".join(name for name in BACKENDS if device_obstacle(name, device) is None)
        raise OptionError("backend", backend, f"{usable} on device {device} ({backend}: {reason})")


class LanguageModel:
    """Runs forwards over a `KVCache`; keeps nothing between calls but the factors of 8-bit caches, once they are measured."""

    def __init__(
        self,
        module: Any,
        tokenizer: Any | None,
        spec: ModelSpec,
        backend: str = "auto",
        *,
        compiled: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        check_backend(backend, spec.device)
        check_kv_dtype(spec.kv_dtype, spec.device, spec.dtype)
        self.module = module
        self.tokenizer = tokenizer
        self.spec = spec
        self.backend = backend
        self.compiled = compiled
        self.ranks = ranks  # that have a part of the weights each
        # a mask of 4 dimensions is taken as it is, and our attention needs none: without it transformers would look for packed
        # sequences in the positions, a dozen launches a forward
        self._no_mask = torch.zeros(1, 1, 1, 1, dtype=spec.dtype, device=spec.device)
        # by index; they run instead of transformers' own, but in rounds of many tokens
        self.fused_layers: dict[int, FusedLayer] = {}
        self._always_fused = False  # in these, too
        self._measured: list[CacheScales] = []  # at most one; it belongs to the weights, so all copies share it

    def with_backend(self, backend: str) -> LanguageModel:
        """The same weights under another backend of the ops. Raises OptionError for one that the device cannot run."""
        if backend == self.backend:
            return self
        check_backend(backend, self.spec.device)
        made = copy(self)
        made.backend = backend
        made.fused_layers = {}  # they were made for the other backend
        return made

    def with_kv_dtype(self, kv_dtype: str) -> LanguageModel:
        """The same weights, with caches in another dtype ("auto" or "fp8"). Raises OptionError where the device cannot."""
        if kv_dtype == self.spec.kv_dtype:
            return self
        check_kv_dtype(kv_dtype, self.spec.device, self.spec.dtype)
        made = copy(self)
        made.spec = replace(self.spec, kv_dtype=kv_dtype)
        return made

    def compile(self) -> LanguageModel:
        """The same weights for rounds of few tokens: projections fused, layers compiled, and what can be as `fuse` makes it.

        This one goes on as it is.
        """
        self._scales()  # before fused products round otherwise: compiled or not, factors are the same
        fuse_projections(self.module)
        compile_layers(self.module)
        made = copy(self.fuse())
        made.compiled = True
        return made

    def fuse(self) -> LanguageModel:
        """The same weights, with another path for forwards of up to `MAX_ROWS` tokens in all, and for prefill. This one goes on
        as it is.

        Where `fused_linear` and `rotary_append` have kernels for the device and the model (backends "auto" and "cuda";
        "reference" runs everywhere), layers that agree with their fused form take it. Else it is this one.
        """
        backend = "cuda" if self.backend == "auto" else self.backend  # by name: it runs, or the layer is left alone
        if backend == "triton" or device_obstacle(backend, self.spec.device) is not None:
            return self
        made = copy(self)
        self._scales()
        fuse_projections(self.module)
        caches = self.new_cache(len(CACHED), CAPACITY), self.new_cache(len(CACHED), CAPACITY)
        made.fused_layers = find_fused_layers(self.module, caches, self.spec.context, backend, self.ranks)
        return made

    def uncompiled(self) -> LanguageModel:
        """The same weights, layers fused or as they are, never compiled: for shapes that are not worth it. This one goes on as
        it is.
        """
        made = copy(self)
        made.compiled, made._always_fused = False, True
        return made

    def unfused(self) -> LanguageModel:
        """The same weights, all layers as transformers runs them. This one goes on as it is."""
        made = copy(self)
        made.fused_layers = {}
        return made

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens."""
        spec = self.spec
        return KVCache(spec.layers, batch, capacity, dtype=spec.cache_dtype, device=spec.device, scales=self._scales())

    def _scales(self) -> CacheScales | None:
        """The factors of an 8-bit cache, measured when first asked for; None where caches have the models' dtype."""
        if self.spec.cache_dtype != FP8:
            return None
        if not self._measured:
            plain = self.with_kv_dtype("auto").with_backend("auto")
            tokens = probe(self.spec.vocabulary, self.spec.context)
            cache = plain.new_cache(1, tokens.shape[1])
            plain.forward(tokens, cache, logits=False)
            layers = range(len(self.spec.layers))
            keys, values = (tuple(scale_of(rows(layer)) for layer in layers) for rows in (cache.keys, cache.values))
            self._measured.append(CacheScales(keys=keys, values=values))
        return self._measured[0]

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        cache: KVCache,
        *,
        stop: int | None = None,
        positions: Tensor | None = None,
        selection: Lists | BlockLists | PromptAttention | None = None,
        selections: tuple[Lists | None, ...] = (),
        record_queries: bool = False,
        record_logsumexp: bool = False,
        logits: bool = True,
        last: int | None = None,
    ) -> Output:
        """Run `tokens` [B, T] int64 at positions lengths .. lengths + T - 1, or at `positions` [B, T] int64, of a text of which
        the cache holds a part.

        Appends their keys and values to `cache` without advancing it. With a selection, its layers attend to their lists and
        the new tokens (of `BlockLists`: to those of their block); without one, every layer attends densely. Without
        `logits` the output layer is left out; `last` is for how many of the last tokens they are wanted (None: for all).
        `stop`, where the host knows it, is a bound on the tokens of all sequences, the new ones included; without it a prefill
        (more than `ROUND` tokens) waits for the device to tell.

        With `selections` it is a forward for each of them, and weights are read once: `tokens` [n B, T] are the rows of one
        behind those of the other, and so are the logits. All go over the same cache, one after the other in every layer, so the
        keys and values of the last stay. Queries are not recorded.
        """
        tokens = tokens.to(self.spec.device)
        if stop is None:
            stop = int(cache.lengths.max()) + tokens.shape[1] if tokens.shape[1] > ROUND else cache.capacity
        fused = tokens.numel() <= MAX_ROWS or tokens.shape[1] > ROUND or self._always_fused  # between, compiled ones are faster
        if positions is None:
            positions = (cache.lengths.repeat(len(selections)) if selections else cache.lengths)[:, None]
            if tokens.shape[1] > 1:
                positions = positions + torch.arange(tokens.shape[1], device=self.spec.device)
        positions = positions.to(self.spec.device).clamp(max=self.spec.context - 1)  # the last round may run past it, in vain
        forward = Forward(
            cache=cache,
            stop=stop,
            selection=selection,
            queries=[] if record_queries else None,
            logsumexp=[] if record_logsumexp else None,
            backend=self.backend,
            ends=None if logits else len(self.spec.layers) - 1,
            fused=self.fused_layers if fused else {},
            parts=tuple(Forward(cache=cache, stop=stop, selection=own, backend=self.backend) for own in selections),
        )
        model = self.module if logits else self.module.get_decoder()
        # a prefill is bound by arithmetic, and would be compiled for every length
        eagerly = has_compiled_layers(self.module) and not (self.compiled and tokens.shape[1] <= ROUND)
        with torch.compiler.set_stance("force_eager") if eagerly else nullcontext():
            output = model(
                input_ids=tokens,
                attention_mask=self._no_mask,
                position_ids=positions,
                use_cache=False,
                outrider=forward,
                **({} if last is None or not logits else {"logits_to_keep": last}),
            )
        none = torch.empty(tokens.shape[0], 0, self.spec.vocabulary, dtype=self.spec.dtype, device=self.spec.device)
        return Output(
            logits=output.logits if logits else none,
            queries=tuple(forward.queries or ()),
            logsumexp=tuple(forward.logsumexp or ()),
        )
