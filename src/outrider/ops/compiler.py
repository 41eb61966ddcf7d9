"""CUDA C++ kernels, built at first use for the shape at hand and kept in torch's extension cache."""

from __future__ import annotations

import ctypes
import shutil
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
# a template's static variables belong to one library, or the first one loaded would lend them to those built for other shapes
OWN_VARIABLES = "-Xcompiler=-fno-gnu-unique"
INCLUDE = f"-I{Path(__file__).parent}"


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def obstacle(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels cannot run on this device, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device}"
    if compute_capability(device) != (9, 0):
        return f"it is written for compute capability 9.0 (Hopper), got {compute_capability(device)}"
    return _toolchain_obstacle()


@cache
def _toolchain_obstacle() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "it is built at first use, which needs nvcc (set CUDA_HOME)"
    missing = [tool for tool in ("ninja", "c++") if shutil.which(tool) is None]
    return f"it is built at first use, which needs {' and '.join(missing)} on PATH" if missing else None


class Mailboxes:
    """Memory through which the blocks of a launch talk: all bytes 0xff, "empty", before a launch and again after it.

    Launches on one stream follow each other and share theirs. Every graph gets its own, since graphs may be replayed side by
    side on any streams: one that was set aside and filled beforehand, or else one that the graph fills when it is replayed.
    They are kept as long as the process runs, since nothing tells when a graph is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.owned: dict[tuple[int, int], Tensor] = {}  # by (capture, stream); capture is 0 outside of graphs
        self.set_aside: Tensor | None = None

    def take(self, floats: int, stream: int, capture: int) -> Tensor:
        """At least `floats` float32 of mailboxes for a launch on `stream`, captured into the graph `capture` (0: none)."""
        if len(self.owned.get((capture, stream), ())) < floats:
            if capture and self.set_aside is not None and len(self.set_aside) >= floats:
                self.owned[capture, stream], self.set_aside = self.set_aside, None
            else:
                self.owned[capture, stream] = self._empty(floats)
        if not capture and (self.set_aside is None or len(self.set_aside) < floats):
            self.set_aside = self._empty(floats)
        return self.owned[capture, stream]

    def _empty(self, floats: int) -> Tensor:
        return torch.full((floats,), -1, dtype=torch.int32, device=self.device)


@cache
def mailboxes(device: torch.device) -> Mailboxes:
    return Mailboxes(device)


@cache
def build(source: Path, *defines: str) -> ctypes.CDLL:
    """The shared library of one .cu file with these -D definitions; takes seconds once, then comes from the cache.

    Raises RuntimeError with the compiler's message when the build fails.
    """
    from torch.utils.cpp_extension import load

    variant = "_".join(define.replace("=", "").strip("_") for define in defines)
    path = load(
        name=f"outrider_{source.parents[1].name}_{variant}".rstrip("_"),
        sources=[str(source)],
        extra_cuda_cflags=["-O3", "-std=c++17", ARCHITECTURE, OWN_VARIABLES, INCLUDE, *(f"-D{define}" for define in defines)],
        is_python_module=False,
    )
    library = ctypes.CDLL(path)
    library.describe.restype = ctypes.c_char_p
    library.capture.restype = ctypes.c_ulonglong
    return library


def check(library: ctypes.CDLL, error: int, what: str) -> None:
    """Raise RuntimeError when a launch returned a CUDA error."""
    if error:
        raise RuntimeError(f"{what}: CUDA error {error}: {library.describe(error).decode()}")
