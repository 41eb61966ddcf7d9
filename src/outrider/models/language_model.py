"""A decoder-only transformers model, seen as: tokens and a cache in, logits (and queries) out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.config import BACKENDS, check
from outrider.errors import OptionError
from outrider.models.attention import ROUND, Forward
from outrider.models.cache import KVCache, LayerShape
from outrider.models.compilation import compile_layers, has_compiled_layers
from outrider.models.fusion import fuse_projections
from outrider.ops.backends import device_obstacle
from outrider.types import Selection


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

    logits: Tensor  # [B, T, V] fp32; [B, 0, V] if not asked for
    queries: tuple[Tensor, ...]  # per layer [B, T, Hq, D]; empty unless recorded


def check_backend(backend: str, device: torch.device) -> None:
    """Raise OptionError for an unknown backend of the ops, and for one that no call on `device` can run."""
    check("backend", backend, backend in BACKENDS, ", ".join(BACKENDS))
    if (reason := device_obstacle(backend, device)) is not None:
        usable = ", ".join(name for name in BACKENDS if device_obstacle(name, device) is None)
        raise OptionError("backend", backend, f"{usable} on device {device} ({backend}: {reason})")


class LanguageModel:
    """Runs forwards over a `KVCache`; keeps no state between calls."""

    def __init__(
        self, module: Any, tokenizer: Any | None, spec: ModelSpec, backend: str = "auto", *, compiled: bool = False
    ) -> None:
        check_backend(backend, spec.device)
        self.module = module
        self.tokenizer = tokenizer
        self.spec = spec
        self.backend = backend
        self.compiled = compiled

    def with_backend(self, backend: str) -> LanguageModel:
        """The same weights under another backend of the ops. Raises OptionError for one that the device cannot run."""
        if backend == self.backend:
            return self
        return LanguageModel(self.module, self.tokenizer, self.spec, backend, compiled=self.compiled)

    def compile(self) -> LanguageModel:
        """The same weights, projections fused and layers compiled for rounds of few tokens. This one goes on uncompiled."""
        fuse_projections(self.module)
        compile_layers(self.module)
        return LanguageModel(self.module, self.tokenizer, self.spec, self.backend, compiled=True)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens."""
        return KVCache(self.spec.layers, batch, capacity, dtype=self.spec.dtype, device=self.spec.device)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        cache: KVCache,
        *,
        stop: int | None = None,
        selection: Selection | None = None,
        record_queries: bool = False,
        logits: bool = True,
    ) -> Output:
        """Run `tokens` [B, T] int64 at positions lengths .. lengths + T - 1.

        Appends their keys and values to `cache` without advancing it. With a selection, its layers attend to their lists and
        the new tokens; without one, every layer attends densely. Without `logits` the output layer is left out. `stop`, where
        the host knows it, is a bound on the tokens of all sequences, the new ones included; without it a prefill (more than
        `ROUND` tokens) waits for the device to tell.
        """
        tokens = tokens.to(self.spec.device)
        if stop is None:
            stop = int(cache.lengths.max()) + tokens.shape[1] if tokens.shape[1] > ROUND else cache.capacity
        positions = cache.lengths[:, None] + torch.arange(tokens.shape[1], device=self.spec.device)
        forward = Forward(
            cache=cache,
            stop=stop,
            selection=selection,
            queries=[] if record_queries else None,
            backend=self.backend,
        )
        model = self.module if logits else self.module.get_decoder()
        # a prefill is bound by arithmetic, and would be compiled for every length
        eagerly = has_compiled_layers(self.module) and not (self.compiled and tokens.shape[1] <= ROUND)
        with torch.compiler.set_stance("force_eager") if eagerly else nullcontext():
            output = model(
                input_ids=tokens,
                position_ids=positions.clamp(max=self.spec.context - 1),  # the last round may run past it, in vain
                use_cache=False,
                outrider=forward,
            )
        none = torch.empty(tokens.shape[0], 0, self.spec.vocabulary, device=self.spec.device)
        return Output(logits=output.logits.float() if logits else none, queries=tuple(forward.queries or ()))
