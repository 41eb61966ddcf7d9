"""Public entries of the op: validation and choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from outrider.ops.backends import choose, debug
from outrider.ops.checks import (
    FLOATS,
    FP8,
    INTS,
    check_choice,
    check_head_dim,
    check_heads,
    check_range,
    check_scale,
    check_tensor,
)
from outrider.ops.quantized_keys import reference
from outrider.ops.quantized_keys.layout import BITS, BLOCK, record_words

REDUCTIONS = ("mean", "none")
OUTPUTS = (torch.bfloat16, torch.float32, torch.float64)


def quantize_keys(
    keys: Sequence[Tensor],
    lengths: Tensor,
    records: Tensor,
    *,
    bits: int,
    key_scales: Sequence[Tensor | None] | None = None,
    last: bool = False,
    backend: str = "auto",
) -> None:
    """Write the blocks of cached keys that `quantized_mass` reads as codes.

    A block is 64 tokens of one KV head. Each of its channels keeps its smallest value and a step, and a code of `bits` bits for
    every token. Of a sequence with `lengths[b]` cached tokens the first `(lengths[b] - 64) // 64` blocks are coded (none where
    that is negative): the newest 64 to 127 tokens are not.

    Args:
        keys: for each of L layers `[B, N, Hkv, D]`, bfloat16, float16, float32, float64 or float8_e4m3fn; all alike in shape,
            dtype and strides, head dim contiguous.
        lengths: `[B]`, int32 or int64, cached tokens, `0 <= lengths[b] <= N`.
        records: `[L, B, Hkv, blocks, record_words(D, bits)]` int32, contiguous words, with room for all blocks that are coded;
            what belongs to other blocks stays as it is.
        bits: of a code, 2 or 4.
        key_scales: for each layer `[Hkv]` float32, the factor per head that float8 keys are multiplied with.
        last: only the last coded block of every sequence. Enough where lengths have grown by at most 64 since the last call.
        backend: "auto" (see `ops/README.md`), "reference" or "cuda". No silent fall-back.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, stride or choice, or a backend that cannot run the call; the reference, and with
            `OUTRIDER_DEBUG=1` every backend, also checks the values of `lengths`.

    Source: codes per channel over groups of tokens, with the newest tokens exact, are those of KIVI (arXiv 2402.02750).
    """
    sizes: dict[str, int] = {}
    key_scales = _check_cache(keys, lengths, records, bits, key_scales, sizes)
    chosen = choose(backend, lengths.device, {"cuda": lambda: _cuda().quantize_obstacle(keys, records)})
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, sizes["N"])
    run = {"cuda": _cuda, "reference": lambda: reference}[chosen]().quantize_keys
    run(keys, lengths, records, bits=bits, key_scales=key_scales, last=last)


def quantized_mass(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    records: Tensor,
    lengths: Tensor,
    *,
    bits: int,
    scales: Sequence[float],
    reduce: str = "mean",
    key_scales: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax mass of several layers' queries on every cached key, as `attention_mass` has it, from keys in few bits.

    The blocks that are coded (see `quantize_keys`) are read from `records`; of `keys` the newest 64 to 127 tokens and the tail
    of T are read, no others.

    Args:
        queries: for each of L layers `[B, T, Hq, D]`, bfloat16, float16, float32 or float64; alike in shape, dtype and strides.
        keys: for each layer `[B, N, Hkv, D]`, dtype of `queries` or float8_e4m3fn; otherwise as in `quantize_keys`.
        records: as `quantize_keys` has written them.
        lengths: `[B]`, int32 or int64, number of cached tokens, `0 <= lengths[b] <= N - T`.
        bits: of a code, 2 or 4.
        scales: for each layer, the factor on the logits, usually `D ** -0.5`.
        reduce: over the T queries: "mean" or "none".
        key_scales: for each layer `[Hkv]` float32, the factor per head that float8 keys are multiplied with.
        dtype: of the result: float32 (default; float64 for float64 queries) or bfloat16.
        out: where the result goes, of its shape and dtype; any strides, N contiguous. Every element is written.
        backend: "auto" (see `ops/README.md`), "reference" or "cuda". No silent fall-back.

    Returns:
        `[B, L * Hq, N]`, row `l * Hq + h` for head h of layer l ("none": `[B, T, L * Hq, N]`); exactly 0 at and past
        `lengths[b]`. It is `out`, if given.

    Raises:
        TypeError, ValueError: as `quantize_keys`.

    Source: scoring by the draft's attention as in STS (arXiv 2605.15508); codes as in KIVI (arXiv 2402.02750).
    """
    sizes: dict[str, int] = {}
    if not queries or len(queries) != len(keys) or len(scales) != len(keys):
        raise ValueError(
            f"queries, keys, scales: expected one of each for every layer, got {len(queries)}, {len(keys)} and {len(scales)}"
        )
    for i, x in enumerate(queries):
        check_tensor(f"queries[{i}]", x, shape="B T Hq D", sizes=sizes, dtypes=FLOATS if i == 0 else [queries[0].dtype])
        _check_alike(f"queries[{i}]", x, queries[0])
    key_scales = _check_cache(keys, lengths, records, bits, key_scales, sizes, [queries[0].dtype, FP8])
    check_heads(sizes)
    check_choice("reduce", reduce, REDUCTIONS)
    if dtype is None:
        dtype = torch.promote_types(queries[0].dtype, torch.float32)
    elif dtype not in OUTPUTS:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, OUTPUTS))}, got {dtype}")
    if out is not None:
        sizes["R"] = sizes["L"] * sizes["Hq"]
        shape = "B T R N" if reduce == "none" else "B R N"
        check_tensor("out", out, shape=shape, sizes=sizes, dtypes=[dtype], device=lengths.device)
        if out.shape[-1] > 1 and out.stride(-1) != 1:
            raise ValueError(f"out: expected rows without gaps (stride 1), got stride {out.stride(-1)}")
    arguments = {"bits": bits, "reduce": reduce, "dtype": dtype, "out": out}
    obstacle = {"cuda": lambda: _cuda().mass_obstacle(queries, keys, records, **arguments)}
    chosen = choose(backend, lengths.device, obstacle)
    if chosen == "reference" or debug():
        check_range("lengths", lengths, 0, sizes["N"] - sizes["T"])
    run = {"cuda": _cuda, "reference": lambda: reference}[chosen]().quantized_mass
    return run(queries, keys, records, lengths, scales=scales, key_scales=key_scales, **arguments)


def _check_cache(
    keys: Sequence[Tensor],
    lengths: Tensor,
    records: Tensor,
    bits: int,
    key_scales: Sequence[Tensor | None] | None,
    sizes: dict[str, int],
    dtypes: Sequence[torch.dtype] = (*FLOATS, FP8),
) -> Sequence[Tensor | None]:
    """Check what both entries have in common; the factors by layer, None where there are none."""
    if not keys:
        raise ValueError("keys: expected one tensor for every layer, at least one, got none")
    check = partial(check_tensor, sizes=sizes)
    scales = [None] * len(keys) if key_scales is None else key_scales
    if len(scales) != len(keys):
        raise ValueError(f"key_scales: expected one for each of {len(keys)} layers, got {len(scales)}")
    for i, (x, scale) in enumerate(zip(keys, scales, strict=True)):
        check(f"keys[{i}]", x, shape="B N Hkv D", dtypes=dtypes if i == 0 else [keys[0].dtype])
        _check_alike(f"keys[{i}]", x, keys[0])
        check_head_dim(f"keys[{i}]", x)
        check_scale(f"key_scales[{i}]", scale, x, sizes)
    check("lengths", lengths, shape="B", dtypes=INTS, device=keys[0].device)
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {', '.join(map(str, BITS))}, got {bits!r}")
    if sizes["D"] * bits % 128:
        raise ValueError(f"keys: expected a head dim that is a multiple of {128 // bits} for {bits} bits, got {sizes['D']}")
    sizes |= {"L": len(keys), "W": record_words(sizes["D"], bits)}
    check("records", records, shape="L B Hkv blocks W", dtypes=[torch.int32], device=keys[0].device)
    if records.stride(-1) != 1:
        raise ValueError(f"records: expected records without gaps (stride 1), got stride {records.stride(-1)}")
    if (needed := max(sizes["N"] // BLOCK - 1, 0)) > sizes["blocks"]:
        raise ValueError(f"records: expected room for {needed} blocks of {sizes['N']} tokens, got {sizes['blocks']}")
    return scales


def _check_alike(name: str, x: Tensor, first: Tensor) -> None:
    if x.stride() != first.stride() or x.device != first.device:
        raise ValueError(
            f"{name}: expected the strides and device of the first layer, {first.stride()} on {first.device}, "
            f"got {x.stride()} on {x.device}"
        )


def _cuda():
    from outrider.ops.quantized_keys import cuda

    return cuda
