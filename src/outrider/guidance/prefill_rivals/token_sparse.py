"""The method `token-sparse`: Token Sparse Attention (Jo et al., arXiv 2602.03216)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from outrider.guidance.prefill_rivals.base import Prompt, kept_tokens
from outrider.ops import block_mass, chunk_attention, token_select

WINDOW = 128  # last tokens of the prompt: their queries score, and every head keeps them
POOL = 7  # tokens that scores are averaged over
REFERENCE_BLOCK = 1024  # queries that the reference attends with at a time


class TokenSparse:
    """In some layers every query head attends among tokens of its own choice, queries, keys and values alike; what the others
    would have got is zero there, and the residual carries them on to layers that may choose them again. A `PromptAttention`.

    As published: sparse layers are those that change the hidden states least (`sparse_layers`); a head scores by the attention
    of the last 128 queries, averaged over 7 neighbouring tokens, and keeps the best and these 128; gather, dense causal
    attention on the short sequence, scatter into zeros. Chosen here: a head keeps the share `keep` of the prompt, the 128 among
    them, so that methods compare at equal budgets. The paper keeps as many as the sum of normalised scores asks for: sorted
    ascending, tokens are dropped while they add up to less than tau (0.005 for Llama-3.1), and at least 1,024 are kept.
    """

    def __init__(self, prompt: Prompt, layers: tuple[int, ...], keep: float) -> None:
        """`layers` are sparse, in (0, 1] `keep`."""
        self.prompt, self.layers, self.keep = prompt, layers, keep

    def prompt_attention(self, layer: int, queries: Tensor) -> Tensor | None:
        """Attention [B, T, Hq, D] of a layer's queries [B, T, Hq, D]; None where it reads everything."""
        if layer not in self.layers:
            return None
        given, scale, t = self.prompt, self.prompt.scales[layer], queries.shape[1]
        keys = given.keys(layer)
        with given.stage("score"):
            scores = last_queries_scores(queries, keys, scale=scale, backend=given.backend)
        with given.stage("select"):
            kept = best_tokens(scores, self.count(t), min(WINDOW, t), given.backend)
        return attention_among(queries, keys, given.values(layer), kept, scale=scale, backend=given.backend)

    def count(self, tokens: int) -> int:
        """Tokens of a prompt that a head keeps."""
        return max(kept_tokens(self.keep, tokens), min(WINDOW, tokens))

    def mean_count(self, tokens: int) -> float:
        """The same, averaged over all layers with full attention, of which those that are not sparse keep everything."""
        sparse, all_layers = len(self.layers), len(self.prompt.layers)
        return ((all_layers - sparse) * tokens + sparse * self.count(tokens)) / all_layers


def sparse_layers(drift: Tensor, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Of `layers`, those whose drift, by layer of the model [L], is at most their median."""
    among = drift[list(layers)]
    return tuple(layer for layer, one in zip(layers, (among <= among.quantile(0.5)).tolist(), strict=True) if one)


def last_queries_scores(queries: Tensor, keys: Tensor, *, scale: float, backend: str = "auto") -> Tensor:
    """Mean mass that the prompt's last queries put on what lies before them, averaged over neighbours.

    queries [B, T, Hq, D], keys [B, T, Hkv, D] -> [B, Hq, T] fp32 (fp64 of such queries), 0 for the last `WINDOW` tokens.
    """
    b, t = queries.shape[:2]
    before = t - min(WINDOW, t)
    lengths = torch.full((b,), before, device=queries.device)
    mass = block_mass(queries[:, before:], keys, lengths, block=WINDOW, scale=scale, backend=backend)[:, 0, :, :before]
    if not before:
        return mass.new_zeros(*mass.shape[:2], t)
    return pad(avg_pool1d(mass, POOL, stride=1, padding=POOL // 2), (0, t - before))


def best_tokens(scores: Tensor, count: int, recent: int, backend: str = "auto") -> Tensor:
    """Of scores [B, H, T] the best `count` tokens of each head, the last `recent` among them: [B, H, count] int64 ascending."""
    b, heads, t = scores.shape
    rows = torch.arange(heads, device=scores.device).view(1, -1, 1)
    lengths = torch.full((b,), t, device=scores.device)
    return token_select(scores, lengths, rows, top_k=count, recent=recent, backend=backend).indices[0].long()


def attention_among(
    queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor, *, scale: float, backend: str = "auto"
) -> Tensor:
    """Causal attention of each query head among its own tokens; zero at the others.

    queries [B, T, Hq, D], keys and values [B, T, Hkv, D], kept [B, Hq, n] int64 ascending -> [B, T, Hq, D].
    """
    b, _, heads, _ = queries.shape
    row = torch.arange(b, device=kept.device).view(-1, 1, 1)
    head = torch.arange(heads, device=kept.device).view(-1, 1)
    kv_head = head // (heads // keys.shape[2])
    # each head is a sequence of its own: [B Hq, n, 1, D]
    q, k, v = (x[row, kept, at].flatten(0, 1).unsqueeze(2) for x, at in ((queries, head), (keys, kv_head), (values, kv_head)))
    empty = torch.zeros(b * heads, dtype=torch.int64, device=kept.device)
    found = chunk_attention(q, k, v, None, None, empty, block=REFERENCE_BLOCK, scale=scale, backend=backend)
    whole = queries.new_zeros(queries.shape)
    whole[row, kept, head] = found.squeeze(2).unflatten(0, (b, heads))
    return whole
