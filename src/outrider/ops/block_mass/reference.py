"""Block mass in plain PyTorch: the specification of the op, and its path on the CPU.

One block of one head at a time, so that no more than its logits exist, in fp32 for queries of 16 bits and in fp64 for others:

    logits   scale * queries of the block @ keys^T     [block, tokens up to the block's last]
    visible  all tokens before the block (that are listed), and those of the block up to the query itself
    mass     softmax(logits over visible), or exp(logits - logsumexp), cut to the tokens before the block, averaged
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    block: int,
    scale: float,
    heads: Tensor | None,
    logsumexp: Tensor | None,
    listed: Tensor | None,
    span: int,
    key_scale: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    B, T, Hq, _ = queries.shape
    N, Hkv = keys.shape[1:3]
    chosen = list(range(Hq)) if heads is None else heads.tolist()
    wide = torch.float32 if queries.element_size() == 2 else torch.float64
    if out is None:
        out = queries.new_empty((B, -(-T // block), len(chosen), N), dtype=dtype)
    out.zero_()
    for b, length in enumerate(lengths.tolist()):
        for r, head in enumerate(chosen):
            kv_head = head // (Hq // Hkv)
            seen = keys[b, : length + T, kv_head].to(wide)  # rows behind the chunk are never touched
            if key_scale is not None:
                seen = seen * key_scale[kv_head].to(wide)
            for i, first in enumerate(range(0, T, block)):
                start, steps = length + first, slice(first, min(first + block, T))
                logits = (queries[b, steps, head].to(wide) * scale) @ seen[: length + steps.stop].T
                hidden = torch.ones_like(logits[:, start:], dtype=torch.bool).triu(1)
                logits[:, start:].masked_fill_(hidden, -torch.inf)
                mass = logits.softmax(-1) if logsumexp is None else logits.sub_(logsumexp[b, head, steps, None]).exp_()
                out[b, i, r, :start] = mass[:, :start].mean(0)
                if listed is not None:
                    marks = listed[b, i, kv_head % listed.shape[2]].repeat_interleave(span)[:start]
                    out[b, i, r, :start].masked_fill_(~marks, 0)
    return out
