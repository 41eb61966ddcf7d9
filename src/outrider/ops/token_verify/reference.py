"""Speculative sampling in plain PyTorch: the specification of the op, and its path on the CPU.

In order:

    accept i   all before i accepted, and uniform_i * draft_prob_i(token_i) < target_prob_i(token_i)   exact in fp64
    weights    max(target - draft, 0) at the first rejection; the target's own where all were accepted,
               or where no positive difference is left
    next       first token whose running sum of weights exceeds uniform_K * (their total)              in fp64
"""

from __future__ import annotations

import torch
from torch import Tensor

from outrider.ops.backends import debug
from outrider.ops.checks import check_range


def token_verify(draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    B, K, V = draft_probs.shape
    if not draft_tokens.is_cuda or debug():  # the check waits for the device
        check_range("draft_tokens", draft_tokens, 0, V - 1)
    uniforms = uniforms.double()

    token = draft_tokens.unsqueeze(-1)
    draft_prob = draft_probs.gather(-1, token).squeeze(-1)
    target_prob = target_probs[:, :K].gather(-1, token).squeeze(-1)
    accepted = (uniforms[:, :K] * draft_prob < target_prob).long().cumprod(-1).sum(-1)

    sequence = torch.arange(B, device=draft_tokens.device)
    target = target_probs[sequence, accepted].double()
    draft = torch.nn.functional.pad(draft_probs, (0, 0, 0, 1))[sequence, accepted]  # behind the last drafted token: 0
    residual = (target - draft).clamp(min=0)
    weights = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)

    running = weights.cumsum(-1)
    reached = (running > uniforms[:, K:] * running[:, -1:]) & (weights > 0)  # a parallel sum may round up on a weight of 0
    return accepted, reached.int().argmax(-1)  # argmax: the first of the reached
