"""Span mass in plain PyTorch: the specification of the op, and its path on the CPU.

One sequence and block at a time, in fp32 (fp64 for fp64 inputs):

    low, high   smallest and largest value of every channel of the keys of a page            [pages, Hq, D]
    bound       scale * sum over channels of max(query * low, query * high)                  [Hq, block, pages]
    mass        softmax(bound over the pages that end before the block), averaged over the queries, summed over a span
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def span_mass(
    queries: Tensor,
    keys: Tensor,
    lengths: Tensor,
    *,
    block: int,
    span: int,
    scale: float,
    key_scale: Tensor | None,
    page: int,
) -> Tensor:
    B, T, Hq, _ = queries.shape
    N, Hkv = keys.shape[1:3]
    wide = torch.promote_types(queries.dtype, torch.float32)
    result = queries.new_zeros((B, -(-T // block), Hq, -(-N // span)), dtype=wide)
    for b, length in enumerate(lengths.tolist()):
        for i, first in enumerate(range(0, T, block)):
            pages = (length + first) // page  # that end before the block
            if pages == 0:
                continue
            before = keys[b, : pages * page].to(wide)
            if key_scale is not None:
                before = before * key_scale.to(wide)[:, None]
            before = before.unflatten(0, (-1, page)).repeat_interleave(Hq // Hkv, 2)  # [pages, page, Hq, D]
            low, high = before.amin(1), before.amax(1)
            q = queries[b, first : first + block].to(wide)
            bound = torch.einsum("thd,phd->htp", q.clamp(min=0), high) + torch.einsum("thd,phd->htp", q.clamp(max=0), low)
            mass = (bound * scale).softmax(-1).mean(1)  # [Hq, pages]
            spans = pad(mass, (0, -pages % (span // page))).unflatten(-1, (-1, span // page)).sum(-1)
            result[b, i, :, : spans.shape[-1]] = spans
    return result
