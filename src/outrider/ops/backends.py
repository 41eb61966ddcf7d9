"""Which implementation of an op runs: the choice is made once per call, from the arguments alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from outrider.ops import compiler
from outrider.ops.checks import FP8, check_choice

BACKENDS = ("auto", "reference", "triton", "cuda")
MAX_HEAD_DIM = 256  # of the attention kernels in Triton


class BackendError(ValueError):
    """A backend asked for by name cannot run the call; `reason` says why."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"backend: {backend!r} cannot run this call: {reason}")
        self.reason = reason


def choose(backend: str, device: torch.device, kernels: Mapping[str, Callable[[], str | None]]) -> str:
    """The backend to run: "reference" or a key of `kernels`.

    `kernels` maps a backend's name, best first, to a function that says why it cannot run the arguments at hand, or None if it
    can. "auto" takes the reference on the CPU, and on a GPU the first kernel that can run, the reference if none can. A backend
    asked for by name is never exchanged for another. Raises ValueError for an unknown backend, BackendError for one that cannot
    run.
    """
    check_choice("backend", backend, ("auto", "reference", *kernels))

    def obstacle(name: str) -> str | None:
        return (_triton_missing() if name == "triton" else None) or kernels[name]()

    if backend == "auto":
        return next((name for name in kernels if device.type == "cuda" and obstacle(name) is None), "reference")
    if backend != "reference" and (reason := obstacle(backend)) is not None:
        raise BackendError(backend, reason)
    return backend


def device_obstacle(backend: str, device: torch.device) -> str | None:
    """Why no call on `device` can run `backend`, or None: what is known before there are arguments."""
    if backend == "cuda":
        return compiler.obstacle(device)
    if backend == "triton" and device.type != "cuda" and not _is_set("TRITON_INTERPRET"):
        return f"it needs a CUDA device, or TRITON_INTERPRET=1, got {device}"
    return _triton_missing() if backend == "triton" else None


def attention_obstacle(queries: Tensor, cache: Tensor, max_queries: int | None = None) -> str | None:
    """Why no Triton kernel can take products of queries `[B, T, Hq, D]` with rows of such a cache, or None."""
    T, D = queries.shape[1], queries.shape[3]
    if queries.dtype == torch.float64:
        return "queries are float64; the kernel computes in float32"
    if max_queries is not None and max_queries < T:
        return f"T={T} query tokens; the kernel takes at most {max_queries}"
    if D > MAX_HEAD_DIM:
        return f"head dim {D}; the kernel takes at most {MAX_HEAD_DIM}"
    if reason := device_obstacle("triton", queries.device):
        return reason
    if cache.dtype == FP8 and queries.is_cuda:
        if torch.cuda.get_device_capability(queries.device) < (8, 9):
            return "float8_e4m3fn caches need compute capability 8.9"
        if queries.dtype == torch.float32:
            return "float8_e4m3fn caches take queries of 16 bits"
    return None


@cache
def _triton_missing() -> str | None:
    """torch for the CPU, and for some systems with a GPU, comes without triton."""
    return None if find_spec("triton") else "the package triton is not installed"


def debug() -> bool:
    """True when values of lengths, lists and page tables are to be checked on the host (`OUTRIDER_DEBUG=1`).

    References always check them; kernels only here, since the check waits for the device and cannot be captured in a graph.
    """
    return _is_set("OUTRIDER_DEBUG")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")
