"""Public entry of the op: validation and choice of backend."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from outrider.ops.backends import choose, debug
from outrider.ops.checks import FLOATS, INTS, check_range, check_tensor
from outrider.ops.unlisted_mass import reference


def unlisted_mass(
    scores: Tensor, lengths: Tensor, sources: Tensor, indices: Tensor, counts: Tensor, *, backend: str = "auto"
) -> Tensor:
    """The share of its merged score row that each list leaves out.

    Row and list are those of `token_select`: the score rows named by `sources[l, h]` are averaged, and the share is what the
    tokens of the list do not hold of the sum over all cached tokens. Exactly 0 where a list holds every token, and where
    nothing has a score.

    Args:
        scores: `[B, R, S]`, bfloat16, float16, float32 or float64; finite. Negative scores are treated as 0. Entries at and
            past `lengths[b]` are ignored.
        lengths: `[B]`, int32 or int64, number of cached tokens, `0 <= lengths[b] <= S`.
        sources: `[Lt, Hs, G]` int64: the score rows (`0 .. R-1`) averaged for each list.
        indices: `[Lt, B, Hs, M]` int32, unique positions below `lengths[b]`; entries at and past the count are ignored.
        counts: `[Lt, B, Hs]` int32, `0 <= counts <= M`.
        backend: "auto" (see `ops/README.md`), "reference" or "triton". No silent fall-back.

    Returns:
        `[Lt, B, Hs]` float32 in 0 .. 1, summed in float64 (kernels: float32).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or choice, or a backend that cannot run the call; the reference, and with
            `OUTRIDER_DEBUG=1` every backend, also checks the values of `lengths`, `sources`, `counts` and `indices`.
    """
    sizes: dict[str, int] = {}
    check_tensor("scores", scores, shape="B R S", sizes=sizes, dtypes=FLOATS)
    check = partial(check_tensor, sizes=sizes, device=scores.device)
    check("lengths", lengths, shape="B", dtypes=INTS)
    check("sources", sources, shape="Lt Hs G", dtypes=INTS[1:])
    check("indices", indices, shape="Lt B Hs M", dtypes=INTS[:1])
    check("counts", counts, shape="Lt B Hs", dtypes=INTS[:1])
    if 0 in sources.shape:
        raise ValueError(f"sources: expected at least one layer, head and score row, got shape {list(sources.shape)}")
    chosen = choose(backend, scores.device, {"triton": lambda: _triton().obstacle(scores)})
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, sizes["S"])
        check_range("sources", sources, 0, sizes["R"] - 1)
        check_range("counts", counts, 0, sizes["M"])
        listed = torch.arange(sizes["M"], device=scores.device) < counts.unsqueeze(-1)
        check_range("indices", indices[listed], 0, sizes["S"] - 1)
    run = {"triton": _triton, "reference": lambda: reference}[chosen]().unlisted_mass
    return run(scores, lengths, sources, indices, counts)


def _triton():
    from outrider.ops.unlisted_mass import triton

    return triton
