"""Propose: the draft runs ahead and keeps the queries of the round."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.decoding.sampling import Sampling, distributions, draw
from outrider.models import KVCache, LanguageModel
from outrider.types import DraftTrace


def propose(
    draft: LanguageModel, cache: KVCache, pending: Tensor, sampling: Sampling, uniforms: Tensor, vocabulary: int
) -> DraftTrace:
    """Draft K tokens behind the pending ones.

    `pending` [B] int64 and `uniforms` [B, K], random numbers, lie on the draft's device. A draft whose logits are wider or
    narrower (padded embeddings) than the target's `vocabulary` is cut or padded to it. The draft takes K + 1 steps: the last
    one proposes nothing, but leaves the key of the last drafted token in the cache and its query in the trace. Advances `cache`
    by K + 1.
    """
    k = uniforms.shape[1]
    token, tokens, probs, queries = pending, [], [], []
    for step in range(k + 1):
        known = token.clamp(max=draft.spec.vocabulary - 1)  # the target may emit padding that a narrower draft does not have
        output = draft.forward(known[:, None], cache, record_queries=True, logits=step < k)
        cache.advance(1)
        queries.append(output.queries)
        if step < k:
            logits = output.logits[..., :vocabulary]
            logits = pad(logits, (0, vocabulary - logits.shape[-1]), value=float("-inf"))
            probs.append(distributions(logits, sampling)[:, 0])
            token = probs[-1].argmax(-1) if sampling.greedy else draw(probs[-1], uniforms[:, step])
            tokens.append(token)
    return DraftTrace(
        tokens=torch.stack(tokens, dim=1),
        probs=torch.stack(probs, dim=1),
        queries=tuple(torch.cat(layer, dim=1) for layer in zip(*queries, strict=True)),
    )
