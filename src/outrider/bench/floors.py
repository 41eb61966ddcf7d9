"""The least that a stage must read, and the time that takes when memory streams at its full rate.

    propose   K steps: the draft's weights and its keys and values, all or the kept share; where they are scored one more for
              keys, values and queries, without the output layer, which ends where the last layer has them
    score     the keys of the scored draft layers, once; those in few bits as if none were exact (the newest 64 to 127 are)
    select    the scores, once, and the lists that are written
    verify    the target's weights, its output layer, and keys and values: the listed ones, or all
    accept    the logits, once
    audit     in place of verify, as often as a sequence is audited: all keys and values beside the listed ones, and these once
              more in a quarter of the layers
    confirm   by the round: the target's weights, its output layer and all keys and values, and steps of the draft for what it
              proposes behind tentative tokens, as often as a sequence is confirmed

Embedding tables are not counted (a token reads one row), nor are activations and the round's own keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

from outrider.decoding.guard import WINDOW
from outrider.models import LanguageModel, LayerShape, ModelSpec
from outrider.models.compilation import decoder_layers
from outrider.models.quantized_keys import coded_bytes

INDEX = 4  # bytes of a listed position (int32)
UP_TO_CACHE = ("input_layernorm", "q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm")  # of a layer: before attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes of a model's parameters."""

    body: int  # all but the two ends: embedding table and output layer
    output: int
    end: int  # of the body what comes behind the last layer's keys, values and queries

    @classmethod
    def of(cls, model: LanguageModel) -> Weights:
        ends = [model.module.get_input_embeddings().weight, model.module.get_output_embeddings().weight]
        *_, last = decoder_layers(model.module)
        behind = (p for name, p in last.named_parameters() if not any(part in UP_TO_CACHE for part in name.split(".")))
        return cls(
            body=sum(p.nbytes for p in model.module.parameters() if all(p is not end for end in ends)),
            output=ends[1].nbytes,
            end=sum(p.nbytes for p in behind),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round, as far as its reads go."""

    batch: int  # B
    cached: float  # S, mean over the measured rounds
    draft_tokens: int  # K; 0 where the target decodes alone
    kept: float | None = None  # share of the cached tokens in the target's lists; None: it has none and reads all
    draft_listed: float | None = None  # tokens in the draft's lists; None: it has none and reads all
    scored_layers: tuple[int, ...] = ()  # of the draft
    score_bits: int | None = None  # of their keys; None: the cache's own
    mass_bytes: int = 2  # of one score
    confirmations: float = 0.0  # of a sequence, a round
    tail: int = 0  # tokens that are drafted for each of them
    audits: float = 0.0  # of a sequence, a round


def stage_bytes(target: ModelSpec, draft: ModelSpec, weights: tuple[Weights, Weights], round_: Round) -> dict[str, int]:
    """Bytes of each stage of a round; `weights` are those of target and draft. Lists belong to KV heads. Without drafted tokens
    verify and accept alone read anything."""
    b, s, k = round_.batch, round_.cached, round_.draft_tokens
    scored = bool(round_.scored_layers)
    of_target, of_draft = weights
    listed = None if round_.kept is None else s * round_.kept
    scores = b * s * round_.mass_bytes * sum(draft.layers[layer].query_heads for layer in round_.scored_layers)
    lists = _list_bytes(target, listed) + _list_bytes(draft, round_.draft_listed)
    cached = [b * x for x in _kv_bytes(draft, s, round_.draft_listed)]  # by layer
    step = of_draft.body + of_draft.output + sum(cached)
    weights_read, everything = of_target.body + of_target.output, b * sum(_kv_bytes(target, s, None))
    verified = weights_read + b * sum(_kv_bytes(target, s, listed))
    seen_again = 0 if listed is None else b * 2 * _all_key_bytes(target) * listed / WINDOW
    counted = {
        "propose": k * step + scored * (step - of_draft.output - of_draft.end - cached[-1]),
        "score": b * s * _key_bytes(draft, round_),
        "select": scores + b * lists,
        "verify": (1 - round_.audits) * verified,
        "accept": b * (k + 1) * target.vocabulary * target.dtype.itemsize,
        "confirm": round_.confirmations * (weights_read + everything + round_.tail * step),
        "audit": round_.audits * (verified + everything + seen_again),
    }
    return {stage: round(count) for stage, count in counted.items()}


def against_floor(count: int, ms: float, stream_gb_s: float | None) -> dict[str, float | None]:
    """Bytes, the ms they take at least, and that as a share of `ms` in percent; None without a streaming rate."""
    floor = None if stream_gb_s is None else count / stream_gb_s / 1e6
    return {"bytes": count, "ms": floor, "percent": None if floor is None or ms == 0 else 100 * floor / ms}


def _kv_bytes(model: ModelSpec, cached: float, listed: float | None) -> list[float]:
    """By layer, of the keys and values that a step reads: full layers read what is listed, or all; the others their window."""
    full = cached if listed is None else min(cached, listed)

    def rows(layer: LayerShape) -> float:
        return full if layer.window is None else min(cached, layer.window - 1)

    return [rows(layer) * 2 * layer.kv_heads * layer.head_dim * model.cache_dtype.itemsize for layer in model.layers]


def _key_bytes(draft: ModelSpec, round_: Round) -> int:
    """Of a token's keys in the layers that are scored."""
    scored = [draft.layers[layer] for layer in round_.scored_layers]
    if round_.score_bits is not None:
        return coded_bytes(scored, round_.score_bits)
    return sum(layer.kv_heads * layer.head_dim for layer in scored) * draft.cache_dtype.itemsize


def _all_key_bytes(model: ModelSpec) -> int:
    """Of a token's keys in the layers with full attention."""
    return sum(model.layers[layer].kv_heads * model.layers[layer].head_dim for layer in model.full_layers) * (
        model.cache_dtype.itemsize
    )


def _list_bytes(model: ModelSpec, listed: float | None) -> float:
    return (listed or 0) * INDEX * sum(model.layers[layer].kv_heads for layer in model.full_layers)
