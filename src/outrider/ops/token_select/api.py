"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.ops.backends import choose, debug
from outrider.ops.checks import FLOATS, INTS, check_choice, check_int, check_range, check_tensor
from outrider.ops.token_select import reference

MERGES = ("mean", "max")


class TokenLists(NamedTuple):
    """Padded lists of token positions; each list ascending and without repeats."""

    indices: Tensor  # [Lt, B, Hs, M] int32; entries at and past the count are -1
    counts: Tensor  # [Lt, B, Hs] int32


def token_select(
    scores: Tensor,
    lengths: Tensor,
    sources: Tensor,
    *,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    merge: str = "mean",
    width: int | None = None,
    backend: str = "auto",
) -> TokenLists:
    """Choose the cached tokens that matter, for every target layer and list-owning head.

    The score rows named by `sources[l, h]` are merged into one row; its tokens are kept from the highest score down. The
    first `sinks` and last `recent` cached tokens are always kept and count in k and in the mass. Exactly one of `top_k` and
    `top_p` is given:

    * top-k keeps exactly `min(max(k, number of distinct sinks and recent tokens), lengths[b])` tokens;
    * top-p keeps the smallest list that holds the sinks, the recent tokens and a mass of at least `p` times the row's
      total over its cached tokens (summed in float64); `p >= 1` keeps every cached token.

    Among equal scores the lower position is kept first, and only as many as are needed. The result is a function of the
    arguments alone, the same in every run.

    Resolution: the reference compares merged scores exactly; kernels compare their upper 16 bits (the sign, exponent and 7 bits
    of the fraction: bfloat16 rounded towards 0), so scores within one part in 128 may count as equal. Counts stay exact, and a
    top-p list still holds its mass, as the smallest list at that resolution. For bfloat16 scores that are not merged nothing is
    lost.

    Args:
        scores: `[B, R, S]`, bfloat16, float16, float32 or float64; nonnegative and finite (unit free; usually softmax
            mass). Negative scores and NaN are treated as 0. Entries at and past `lengths[b]` are ignored.
        lengths: `[B]`, int32 or int64, number of cached tokens, `0 <= lengths[b] <= S`.
        sources: `[Lt, Hs, G]` int64: the score rows (`0 .. R-1`) merged for each list.
        top_k: tokens per list, an int, or int32 or int64 by sequence, `[B]`, or by list, `[Lt, B, Hs]` (below 0 is treated as
            0).
        top_p: mass fraction per list, a float, or float32 or float64 by sequence, `[B]`, or by list, `[Lt, B, Hs]`.
        sinks, recent: numbers of always kept first and last cached tokens.
        merge: "mean" or "max" over the G rows of a list, in float32 (float64 scores: float64), rows in the order of G.
        width: M of the result. The reference raises where a list is longer; kernels, which cannot, keep its best `width`
            tokens. None: as long as needed, which for any budget but an int `top_k` reads the counts on the host.
        backend: "auto" (see `ops/README.md`), "reference", "triton" or "cuda". No silent fall-back.

    Returns:
        TokenLists of `indices [Lt, B, Hs, M]` int32 (ascending, unique, below `lengths[b]`, then -1) and
        `counts [Lt, B, Hs]` int32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, choice or range; both or neither of `top_k` and `top_p`; a backend that cannot run
            the call; in the reference, and with `OUTRIDER_DEBUG=1` in every backend, lengths or sources out of range; in the
            reference, a list longer than `width`.

    Source: top-k per head of STS (arXiv 2605.15508); sorting-free top-p of SpecAttn (arXiv 2510.27641), made exact.
    """
    sizes: dict[str, int] = {}
    check_tensor("scores", scores, shape="B R S", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=scores.device)
    check("lengths", lengths, shape="B", dtypes=INTS)
    check("sources", sources, shape="Lt Hs G", dtypes=INTS[1:])
    if 0 in sources.shape:
        raise ValueError(f"sources: expected at least one layer, head and score row, got shape {list(sources.shape)}")
    if (top_k is None) == (top_p is None):
        raise ValueError(f"expected exactly one of top_k and top_p, got top_k={top_k!r}, top_p={top_p!r}")
    if isinstance(top_k, Tensor):
        check("top_k", top_k, shape="Lt B Hs" if top_k.dim() == 3 else "B", dtypes=INTS)
    elif top_k is not None:
        check_int("top_k", top_k)
    if isinstance(top_p, Tensor):
        check("top_p", top_p, shape="Lt B Hs" if top_p.dim() == 3 else "B", dtypes=FLOATS[2:])
    elif top_p is not None:
        if isinstance(top_p, bool) or not isinstance(top_p, (int, float)):
            raise TypeError(f"top_p: expected a float or a torch.Tensor, got {type(top_p).__name__}")
        if not top_p >= 0:
            raise ValueError(f"top_p: expected at least 0, got {top_p}")
    check_int("sinks", sinks)
    check_int("recent", recent)
    if width is not None:
        check_int("width", width)
    check_choice("merge", merge, MERGES)
    chosen = choose(
        backend,
        scores.device,
        {"cuda": lambda: _cuda().obstacle(scores, sources), "triton": lambda: _triton().obstacle(scores, sources)},
    )
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, sizes["S"])
        check_range("sources", sources, 0, sizes["R"] - 1)
    bound: int | None = width
    if width is None and chosen != "reference":
        bound = sizes["S"] if not isinstance(top_k, int) else min(max(top_k, sinks + recent), sizes["S"])
    run = {"cuda": _cuda, "triton": _triton, "reference": lambda: reference}[chosen]().token_select
    indices, counts = run(
        scores, lengths, sources, top_k=top_k, top_p=top_p, sinks=sinks, recent=recent, merge=merge, width=bound
    )
    if width is None and chosen != "reference" and not isinstance(top_k, int) and counts.numel():
        indices = indices[..., : int(counts.max())]
    return TokenLists(indices, counts)


def _cuda():
    from outrider.ops.token_select import cuda

    return cuda


def _triton():
    from outrider.ops.token_select import triton

    return triton


def union_lists(indices: Tensor, counts: Tensor, length: int) -> TokenLists:
    """Unite the lists of Q queries: a token is kept if any of the Q lists holds it.

    Args:
        indices: `[L, B, Q, Hs, M]` int32, lists in any order; entries at and past the count are ignored.
        counts: `[L, B, Q, Hs]` int32.
        length: bound on the listed positions (the longest sequence's S): each is in `0 .. length - 1`.

    Returns:
        TokenLists of `indices [L, B, Hs, M']` int32 (ascending, unique, then -1) and `counts [L, B, Hs]` int32; M' is the
        longest union's count.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape or device, or a listed position outside `0 .. length - 1`.

    Source: the union over drafted steps of SpecAttn (arXiv 2510.27641).
    """
    sizes: dict[str, int] = {}
    check_tensor("indices", indices, shape="L B Q Hs M", sizes=sizes, dtypes=[torch.int32])
    check_tensor("counts", counts, shape="L B Q Hs", sizes=sizes, dtypes=[torch.int32], device=indices.device)
    check_int("length", length)
    return TokenLists(*reference.union_lists(indices, counts, length))
