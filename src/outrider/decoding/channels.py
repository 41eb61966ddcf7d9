"""Rank the channels of a target's keys on a short text, as Double Sparsity does offline."""

from __future__ import annotations

import hashlib

import torch

from outrider.config import check
from outrider.decoding.pair import identity
from outrider.decoding.prefill import ProgressCallback
from outrider.errors import PromptError
from outrider.guidance.channels import ChannelFile, ranked
from outrider.models import LanguageModel
from outrider.models.quantization import dequantize

BLOCK = 512  # tokens that are read together, as published


def rank_channels(
    target: LanguageModel, text: str, *, text_name: str, tokens: int = 4096, progress: ProgressCallback | None = None
) -> ChannelFile:
    """Rank by the mean of |q * k| over the first `tokens` tokens of a text, in blocks of 512.

    Source: the published calibration of Double Sparsity (arXiv 2408.07092), where every token meets itself, behind the
    rotation by position. There each query head has a ranking of its own; here a KV head has one, from the sum over its query
    heads, so that they share its label cache. Raises OptionError and PromptError before any work.
    """
    check("tokens", tokens, tokens >= 1, "a whole number >= 1")
    if target.tokenizer is None:
        raise PromptError(f"text: {target.spec.name!r} has no tokenizer; allowed: a checkpoint with a tokenizer")
    ids = target.tokenizer(text, verbose=False)["input_ids"][:tokens]
    if len(ids) < tokens:
        raise PromptError(f"text {text_name}: got {len(ids)} tokens; allowed: at least --tokens {tokens}")
    spec, shape = target.spec, target.spec.full_shape
    weights = torch.zeros(len(spec.layers), shape.kv_heads, shape.head_dim, dtype=torch.float64)
    cache = target.new_cache(1, min(BLOCK, tokens))
    for start, part in zip(range(0, tokens, BLOCK), torch.tensor([ids]).split(BLOCK, dim=1), strict=True):
        cache.truncate(0)
        queries = target.forward(part, cache, record_queries=True, logits=False).queries
        for layer in spec.full_layers:
            keys = dequantize(cache.keys(layer, part.shape[1]), cache.key_scales[layer], spec.dtype)  # [1, T, Hkv, D]
            grouped = queries[layer].unflatten(2, (shape.kv_heads, -1))  # [1, T, Hkv, G, D]
            products = grouped.float() * keys.float()[:, :, :, None]
            weights[layer] += products.abs().sum((0, 1, 3), dtype=torch.float64).cpu()
        if progress is not None:
            progress("rank channels", start + part.shape[1], tokens)
    ranking = torch.full(weights.shape, -1, dtype=torch.int64)
    ranking[list(spec.full_layers)] = ranked(weights[list(spec.full_layers)])
    return ChannelFile(
        target=identity(target),
        text=text_name,
        text_digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        tokens=tokens,
        ranking=ranking,
    )
