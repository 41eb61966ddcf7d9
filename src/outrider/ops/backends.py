"""Which implementation of an op runs: the choice is made once per call, from the arguments alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch

from outrider.ops.checks import check_choice

BACKENDS = ("auto", "reference", "triton", "cuda")


def choose(backend: str, device: torch.device, kernels: Mapping[str, Callable[[], str | None]]) -> str:
    """The backend to run: "reference" or a key of `kernels`.

    `kernels` maps a backend's name, best first, to a function that says why it cannot run the arguments at hand, or None if it
    can. "auto" takes the reference on the CPU, and on a GPU the first kernel that can run, the reference if none can. A backend
    asked for by name is never exchanged for another. Raises ValueError for an unknown backend or one that cannot run.
    """
    check_choice("backend", backend, ("auto", "reference", *kernels))
    if backend == "auto":
        usable = (name for name, obstacle in kernels.items() if device.type == "cuda" and obstacle() is None)
        return next(usable, "reference")
    if backend != "reference" and (reason := kernels[backend]()) is not None:
        raise ValueError(f"backend: {backend!r} cannot run this call: {reason}")
    return backend


def debug() -> bool:
    """True when values of lengths, lists and page tables are to be checked on the host (`OUTRIDER_DEBUG=1`).

    References always check them; kernels only here, since the check waits for the device and cannot be captured in a graph.
    """
    return os.environ.get("OUTRIDER_DEBUG", "0") not in ("", "0")
