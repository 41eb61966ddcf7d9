"""Token selection in CUDA C++ for Hopper: arguments for `kernel.cu`, which says how it works."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from outrider.ops import compiler

SOURCE = Path(__file__).with_name("kernel.cu")
ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float32: "float"}
SPAN = 1024  # tokens that a warp takes at a time
MAX_BLOCKS = 8  # of a cluster
VARIANTS = [  # compiled by the tests
    ("ELEMENT=__nv_bfloat16", "THREADS=256"),
    ("ELEMENT=__nv_bfloat16", "THREADS=512"),
    ("ELEMENT=__nv_bfloat16", "THREADS=256", "MERGE=1"),
    ("ELEMENT=__nv_bfloat16", "THREADS=512", "MERGE=1"),
    ("ELEMENT=float", "THREADS=512", "MERGE=1"),
]


class Arguments(ctypes.Structure):
    """Mirrors `struct Arguments` of kernel.cu."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("scores", "keys", "lengths", "sources", "budgets", "indices", "counts")]
        + [(name, ctypes.c_longlong) for name in ("stride_b", "stride_r", "pitch")]
        + [("budget", ctypes.c_double)]
        + [
            (name, ctypes.c_int)
            for name in (
                "wide_lengths", "wide_budgets", "budget_by_list", "top_p", "B", "S", "layers", "heads", "G", "sinks", "recent",
                "take_max", "width", "exact", "aligned",
            )
        ]
    )  # fmt: skip


def obstacle(scores: Tensor, sources: Tensor) -> str | None:
    """Why this kernel cannot run these arguments, or None."""
    if scores.dtype not in ELEMENTS:
        return f"it takes bfloat16, float16 or float32 scores, got {scores.dtype}"
    if scores.stride(2) != 1 and scores.shape[2] > 1:
        return f"it needs score rows without gaps, got strides {scores.stride()}"
    return compiler.obstacle(scores.device)


def token_select(
    scores: Tensor,
    lengths: Tensor,
    sources: Tensor,
    *,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    sinks: int,
    recent: int,
    merge: str,
    width: int,
) -> tuple[Tensor, Tensor]:
    B, _, S = scores.shape
    Lt, Hs, G = sources.shape
    device = scores.device
    sources, lengths = sources.contiguous(), lengths.contiguous()
    indices = torch.empty(Lt, B, Hs, width, dtype=torch.int32, device=device)
    counts = torch.empty(Lt, B, Hs, dtype=torch.int32, device=device)
    budget = top_p if top_k is None else top_k
    budgets = budget.contiguous() if isinstance(budget, Tensor) else None
    aligned = _aligned(scores)
    merged = G > 1 or not aligned or scores.dtype != torch.bfloat16  # else scores are their own keys
    pitch = -(-S // SPAN) * SPAN
    keys = torch.empty(Lt * B * Hs, pitch, dtype=torch.int16, device=device) if merged else None
    number = 0.0 if budget is None or isinstance(budget, Tensor) else float(budget)
    arguments = Arguments(
        scores=scores.data_ptr(),
        keys=None if keys is None else keys.data_ptr(),
        lengths=lengths.data_ptr(),
        sources=sources.data_ptr(),
        budgets=None if budgets is None else budgets.data_ptr(),
        indices=indices.data_ptr(),
        counts=counts.data_ptr(),
        stride_b=scores.stride(0),
        stride_r=scores.stride(1),
        pitch=pitch,
        budget=number,
        wide_lengths=lengths.dtype == torch.int64,
        wide_budgets=budgets is not None and budgets.dtype in (torch.int64, torch.float64),
        budget_by_list=budgets is not None and budgets.dim() == 3,
        top_p=top_k is None,
        B=B,
        S=S,
        layers=Lt,
        heads=Hs,
        G=G,
        sinks=min(sinks, S),
        recent=min(recent, S),
        take_max=merge == "max",
        width=width,
        exact=G == 1 and scores.dtype == torch.bfloat16,
        aligned=aligned,
    )
    lists = counts.numel()
    # Two small blocks to a multiprocessor overlap their phases; fp32 scores need the ring of a large one.
    threads = 256 if scores.dtype != torch.float32 and lists > compiler.multiprocessors(device) else 512
    build = (f"ELEMENT={ELEMENTS[scores.dtype]}", f"THREADS={threads}", *["MERGE=1"] * merged)
    library = compiler.build(SOURCE, *build)
    if lists == 0:
        return indices, counts
    with torch.cuda.device(device):
        blocks = _blocks(build, threads, device, lists, S)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.launch(ctypes.byref(arguments), lists, blocks, _steps(threads, blocks, S), stream)
    compiler.check(library, error, "token_select")
    return indices, counts


def _aligned(scores: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes."""
    size = scores.element_size()
    starts = [stride for stride, extent in zip(scores.stride()[:2], scores.shape, strict=False) if extent > 1]
    return not scores.data_ptr() % 16 and not any(stride * size % 16 for stride in starts)


def _steps(threads: int, blocks: int, S: int) -> int:
    """Of a warp, where a row of S tokens is cut among so many blocks."""
    part = -(-S // (blocks * SPAN)) * SPAN
    return max(1, -(-part // (threads // 32 * SPAN)))


@lru_cache(maxsize=1024)
def _blocks(build: tuple[str, ...], threads: int, device: torch.device, lists: int, S: int) -> int:
    """How many blocks share a list: those that are done first, by rounds of clusters times the tokens of a block.

    The search for the threshold takes as long as reading some tokens more.
    """
    library = compiler.build(SOURCE, *build)
    search = 32 * SPAN

    def time(blocks: int) -> int:
        clusters = library.clusters(blocks, _steps(threads, blocks, S))
        compiler.check(library, max(0, -clusters), "token_select")
        return -(-lists // max(clusters, 1)) * (-(-S // blocks) + search)

    return min((1, 2, 3, 4, MAX_BLOCKS), key=time)
