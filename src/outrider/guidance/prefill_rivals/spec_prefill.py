"""The method `spec-prefill`: SpecPrefill (Liu et al., arXiv 2502.02789), as far as it chooses tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from outrider.guidance.prefill_rivals.base import kept_tokens

LOOKAHEAD = 8  # tokens that the draft writes behind the prompt: their queries score
POOL = 13  # tokens that attention is averaged over
CHUNK = 32  # tokens that are kept or left out together


def token_importance(masses: Iterable[Tensor]) -> Tensor:
    """How much the draft's lookahead looks at each token: averaged over neighbours, the most of any layer and head, the mean of
    the queries.

    masses: of each draft layer the softmax mass [B, Q, H, S] of every lookahead query and head -> [B, S].
    """
    most: Tensor | None = None
    for mass in masses:
        smooth = avg_pool1d(mass.flatten(0, 1), POOL, stride=1, padding=POOL // 2).amax(1).unflatten(0, mass.shape[:2])
        most = smooth if most is None else torch.maximum(most, smooth)  # [B, Q, S]
    assert most is not None
    return most.mean(1)


def kept_chunks(importance: Tensor, keep: float) -> Tensor:
    """The tokens of the best chunks, by the mean importance of their tokens: [B, S] -> [B, n] int64 ascending.

    The share `keep` of the chunks, rounded up, among them the last one, which holds the token that the next one is predicted
    from; it has what the others leave.
    """
    b, s = importance.shape
    chunks = -(-s // CHUNK)
    sums = pad(importance, (0, chunks * CHUNK - s)).unflatten(1, (chunks, CHUNK)).sum(-1)
    best = sums[:, :-1].topk(kept_tokens(keep, chunks) - 1).indices.sort().values  # all are full: the sum ranks as the mean
    inside = (best[..., None] * CHUNK + torch.arange(CHUNK, device=best.device)).flatten(1)
    last = torch.arange((chunks - 1) * CHUNK, s, device=best.device)
    return torch.cat([inside, last.expand(b, -1)], dim=1)
