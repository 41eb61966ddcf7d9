"""Propose: the draft runs ahead and keeps the queries of the round."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.config import SamplingParams
from outrider.decoding.sampling import distributions, draw
from outrider.models import KVCache, LanguageModel
from outrider.types import DraftTrace


def propose(
    draft: LanguageModel, cache: KVCache, pending: Tensor, params: list[SamplingParams], uniforms: Tensor, vocabulary: int
) -> DraftTrace:
    """Draft K tokens behind the pending ones.

    `pending` [B] int64, `uniforms` [B, K] random numbers, `vocabulary` V of the target: a draft whose logits are wider or
    narrower (padded embeddings) is cut or padded to it. The draft takes K + 1 steps: the last one proposes nothing, but leaves
    the key of the last drafted token in the cache and its query in the trace. Advances `cache` by K + 1.
    """
    k = uniforms.shape[1]
    token, tokens, probs, queries = pending, [], [], []
    for step in range(k + 1):
        known = token.clamp(max=draft.spec.vocabulary - 1)  # the target may emit padding that a narrower draft does not have
        output = draft.forward(known[:, None], cache, record_queries=True)
        cache.advance(1)
        queries.append(output.queries)
        if step < k:
            logits = output.logits[..., :vocabulary]
            logits = pad(logits, (0, vocabulary - logits.shape[-1]), value=float("-inf"))
            probs.append(distributions(logits, params)[:, 0])
            token = draw(probs[-1], uniforms[:, step].to(logits.device))
            tokens.append(token)
    return DraftTrace(
        tokens=torch.stack(tokens, dim=1),
        probs=torch.stack(probs, dim=1),
        queries=tuple(torch.cat(layer, dim=1) for layer in zip(*queries, strict=True)),
    )
