"""Span mass in plain PyTorch: the specification of the op, and its path on the CPU.

One sequence at a time, block after block, in fp32 for queries of 16 bits and in fp64 for others:

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
    wide = torch.float32 if queries.element_size() == 2 else torch.float64
    dtype = torch.promote_types(queries.dtype, torch.float32)
    result = queries.new_zeros((B, -(-T // block), Hq, -(-N // span)), dtype=dtype)
    for b, length in enumerate(lengths.tolist()):
        most = (length + (T - 1) // block * block) // page  # pages that end before the last block; later ones are never touched
        seen = keys[b, : most * page]
        if key_scale is not None:
            seen = seen.to(wide) * key_scale.to(wide)[:, None]
        paged = seen.unflatten(0, (most, page))
        low, high = (x.to(wide).repeat_interleave(Hq // Hkv, 1) for x in (paged.amin(1), paged.amax(1)))  # [pages, Hq, D]
        for i, first in enumerate(range(0, T, block)):
            pages = (length + first) // page  # that end before the block
            if pages == 0:
                continue
            q = queries[b, first : first + block].to(wide) * scale
            bound = torch.einsum("thd,phd->htp", q.clamp(min=0), high[:pages])
            bound += torch.einsum("thd,phd->htp", q.clamp(max=0), low[:pages])
            mass = bound.softmax(-1).mean(1)  # [Hq, pages]
            spans = pad(mass, (0, -pages % (span // page))).unflatten(-1, (-1, span // page)).sum(-1)
            result[b, i, :, : spans.shape[-1]] = spans
    return result
