"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.ops.checks import check_choice, check_tensor
from outrider.ops.token_verify import reference

BACKENDS = ("auto", "reference")


class Verified(NamedTuple):
    """Outcome of one round."""

    accepted: Tensor  # [B] int64, drafted tokens accepted, 0 .. K
    next_token: Tensor  # [B] int64, the recovered (accepted < K) or bonus (accepted = K) token


def token_verify(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    *,
    backend: str = "auto",
) -> Verified:
    """Speculative sampling: the emitted tokens follow the target's distribution, whatever the draft's.

    Drafted token i is *accepted* if all before it were and `uniforms[:, i] * draft_prob < target_prob`, both of that token.
    At the first rejection a *recovered* token is drawn from `max(target - draft, 0)`, normalised; where all K were accepted,
    a *bonus* token is drawn from the target's distribution after them. Greedy decoding is the case of one-hot
    distributions: the outcome is then the same for all uniforms.

    Args:
        draft_tokens: `[B, K]` int64, each drawn from its row of `draft_probs`; K may be 0.
        draft_probs: `[B, K, V]` float32, the draft's distributions.
        target_probs: `[B, K + 1, V]` float32, the target's distributions at the same positions and one after. Rows of both
            are nonnegative and sum to 1 up to rounding.
        uniforms: `[B, K + 1]` float32 in [0, 1), independent; the last one draws the recovered or bonus token.
        backend: "auto" picks by device (today always the reference), or "reference". No silent fall-back.

    Returns:
        Verified of `accepted [B]` int64 in 0 .. K and `next_token [B]` int64. A token of target probability 0 is never
        emitted. A residual that rounding leaves without any mass is replaced by the target's distribution.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or `backend`; on a CPU, and with `OUTRIDER_DEBUG=1`, also tokens out of range.

    Source: Leviathan et al. (arXiv 2211.17192); Chen et al. (arXiv 2302.01318).
    """
    sizes: dict[str, int] = {}
    check_tensor("draft_tokens", draft_tokens, shape="B K", sizes=sizes, dtypes=[torch.int64])
    sizes["K+1"] = sizes["K"] + 1
    check = partial(check_tensor, sizes=sizes, device=draft_tokens.device, dtypes=[torch.float32])
    check("draft_probs", draft_probs, shape="B K V")
    check("target_probs", target_probs, shape="B K+1 V")
    check("uniforms", uniforms, shape="B K+1")
    check_choice("backend", backend, BACKENDS)
    return Verified(*reference.token_verify(draft_tokens, draft_probs, target_probs, uniforms))
