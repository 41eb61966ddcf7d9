"""Qwen3 in plain PyTorch, as small as the pair needs it: no cache, no biases, tied embeddings, head dim 64.

Shapes: B sequences, T tokens, D model width, H query heads, G KV heads, E head width, V vocabulary.
Parameter names are those of `transformers`, so exporting is a prefix away (see `export.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of one model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int = 64
    vocab: int = 8192
    positions: int = 32768
    rope_theta: float = 1e6
    eps: float = 1e-6

    def to_dict(self) -> dict[str, int | float]:
        """Plain values, to be stored beside the weights."""
        return asdict(self)


CONFIGS = {
    "wide": Config(layers=6, width=384, heads=6, kv_heads=2, hidden=832),  # trained first, then pruned to "target"
    "target": Config(layers=6, width=384, heads=6, kv_heads=2, hidden=576),
    "draft": Config(layers=4, width=256, heads=4, kv_heads=1, hidden=672),
    "tiny": Config(layers=2, width=64, heads=2, kv_heads=1, hidden=96),
}


class Norm(nn.Module):
    """RMSNorm over the last dimension, computed in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rope_table(config: Config, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0..length-1, each [T, E], the two halves of E alike."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), config.rope_theta**-exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [B, heads, T, E], pairing dimension i with i + E/2."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.groups, self.head_dim = config.heads // config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.q_norm = Norm(config.head_dim, config.eps)
        self.k_norm = Norm(config.head_dim, config.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map ``x`` [B, T, D] to [B, T, D]."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(split)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.width, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.width, config.eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Tokens to next-token logits. Projections into the residual stream start at zero."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = Norm(config.width, config.eps)
        for name, parameter in self.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] after each of ``tokens`` [B, T]."""
        cos, sin = rope_table(self.config, tokens.shape[1], tokens.device)
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(tokens.device.type):
            x = x.to(torch.get_autocast_dtype(tokens.device.type))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of ``tokens`` [B, T + 1], each predicted from those before it."""
    logits = model(tokens[:, :-1]).flatten(0, 1).float()
    return F.cross_entropy(logits, tokens[:, 1:].flatten())


def distillation_loss(model: nn.Module, teacher: nn.Module, tokens: Tensor, sharpen: float) -> Tensor:
    """Mean cross-entropy of the student against the teacher's distribution after each of ``tokens`` [B, T + 1].

    A share ``sharpen`` of each distribution is moved to the teacher's first choice, which is what greedy
    drafting has to hit. Less the teacher's entropy, this is the KL divergence.
    """
    with torch.no_grad():
        wanted = teacher(tokens[:, :-1]).flatten(0, 1).float()
        best = wanted.argmax(-1)
        wanted = wanted.softmax(-1)
    logp = model(tokens[:, :-1]).flatten(0, 1).float().log_softmax(-1)
    soft = -(wanted * logp).sum(-1).mean()
    hard = F.nll_loss(logp, best)
    return torch.lerp(soft, hard, sharpen)
