"""The least that reading a prompt must compute and move, and the time that takes at the device's full rates.

    draft    its products with weights, and attention of every token to all before it, or the share that its blocks read
    score    queries times keys once more, of the scored layers
    select   the masses, once, and the lists that are written
    target   its products with weights, and attention to what blocks read and, causally, to themselves

Methods of others are not counted. Exponentials and norms are not counted, nor the output layer, which sees one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outrider.bench.floors import INDEX, Weights
from outrider.bench.prefill_options import PrefillRun
from outrider.decoding.draft_blocks import EVERYTHING
from outrider.decoding.prompt_reader import PromptReader
from outrider.decoding.scoring import mass_dtype
from outrider.decoding.sparse_prefill import SparsePrefill
from outrider.models import LanguageModel, LayerShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one stage."""

    flop: float = 0.0  # of products
    bytes: float = 0.0

    def against(self, ms: float, conditions: Mapping[str, Any]) -> dict[str, float | None]:
        """What there is to do, the ms that takes at least, and that as a share of `ms` in percent; None without rates."""
        matmul, stream = conditions["matmul_tflops"], conditions["stream_gb_s"]
        floor = None if matmul is None or stream is None else max(self.flop / matmul / 1e9, self.bytes / stream / 1e6)
        percent = None if floor is None or ms == 0 else 100 * floor / ms
        return {"tflop": self.flop / 1e12, "gb": self.bytes / 1e9, "ms": floor, "percent": percent}


def stage_work(
    models: tuple[LanguageModel, LanguageModel], context: int, reader: PromptReader | None, kept: float | None, run: PrefillRun
) -> dict[str, Work]:
    """Of each stage of reading a prompt of `context` tokens, of which blocks read the share `kept`; of none where the reader is
    not one of ours."""
    if reader is not None and not isinstance(reader, SparsePrefill):
        return {}
    sparse = reader
    target, draft = models
    block = 0 if sparse is None else sparse.block
    work = {"target": Work(flop=_weights(target, context) + _attention(target, context, kept, block))}
    if run.mode == "plain":
        return work
    share = None if sparse is None or sparse.reading == EVERYTHING else sparse.reading.share(context, block)
    work["draft"] = Work(flop=_weights(draft, context) + _attention(draft, context, share, block))
    if sparse is None:
        return work
    scored = [draft.spec.layers[layer] for layer in sparse.selector.draft_layers]
    pairs = context * context / 2
    masses = pairs / sparse.block * sum(layer.query_heads for layer in scored) * mass_dtype(draft.spec).itemsize
    lists = len(target.spec.full_layers) * target.spec.full_shape.kv_heads * (kept or 1.0) * pairs / sparse.block * INDEX
    work["score"] = Work(
        flop=sum(2 * layer.query_heads * layer.head_dim for layer in scored) * pairs * (share or 1.0), bytes=masses
    )
    work["select"] = Work(bytes=masses + lists)
    return work


def _weights(model: LanguageModel, tokens: int) -> float:
    return 2.0 * Weights.of(model).body / model.spec.dtype.itemsize * tokens


def _attention(model: LanguageModel, context: int, kept: float | None, block: int) -> float:
    """Queries times keys, and weights times values, of all layers; those with full attention read the share `kept`."""

    def pairs(layer: LayerShape) -> float:
        if layer.window is not None:
            return context * min(context / 2, layer.window)
        return context * context / 2 if kept is None else kept * context * context / 2 + context * block / 2

    return sum(4.0 * layer.query_heads * layer.head_dim * pairs(layer) for layer in model.spec.layers)
