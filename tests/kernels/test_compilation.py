"""Every kernel compiles, without a GPU: Triton's for three generations of NVIDIA GPUs, those in CUDA C++ for Hopper.

Triton compiles in a process of its own, where it does not interpret. There the ops run on CPU tensors under a driver that
names a GPU and launches nothing, so what is compiled is what the ops would launch, with the same tiles, warps and stages.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import outrider

OPS = Path(outrider.__file__).parent / "ops"
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB a program may use
SERIALISED = "wgmma.mma_async instructions are serialized"  # what ptxas says when products must wait for each other
FP8, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32


def triton_ops() -> list[str]:
    return sorted(path.parent.name for path in OPS.glob("*/triton.py"))


def launched(op: str) -> set[str]:
    """Names of the kernels that an op launches: `kernel[grid](...)`."""
    return set(re.findall(r"(?m)^ +(\w+)\[[^\]]*\]\($", (OPS / op / "triton.py").read_text(encoding="utf-8")))


def attention_mass(
    run: Callable, queries: torch.dtype, D: int, *, keys: torch.dtype | None = None, paged: bool = False,
    reduce: str = "mean", T: int = 5, heads: bool = False,
) -> None:  # fmt: skip
    q, k = torch.empty(2, T, 8, D, dtype=queries), torch.empty(2, 4096, 2, D, dtype=keys or queries)
    pages = torch.empty(2, 256, dtype=torch.int32) if paged else None
    run(q, k.view(512, 16, 2, D) if paged else k, torch.empty(2, dtype=torch.int64), scale=0.1, reduce=reduce, page_table=pages,
        heads=torch.empty(3, 2, dtype=torch.int64) if heads else None, key_scale=torch.empty(2) if keys == FP8 else None,
        dtype=FP32, out=None)  # fmt: skip


def block_mass(
    run: Callable, queries: torch.dtype, D: int, *, keys: torch.dtype | None = None, heads: bool = False, known: bool = False,
    listed: bool = False, halvings: int = 0,
) -> None:  # fmt: skip
    q, k = torch.empty(2, 300, 8, D, dtype=queries), torch.empty(2, 4096, 2, D, dtype=keys or queries)
    chosen = torch.empty(3, dtype=torch.int64) if heads else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["outrider.ops.block_mass.triton"], "SOFT_HALVINGS", halvings)
        run(q, k, torch.empty(2, dtype=torch.int64), block=128, scale=0.1, heads=chosen, dtype=BF16, out=None,
            logsumexp=torch.empty(2, 8, 300) if known else None, key_scale=torch.empty(2) if keys == FP8 else None,
            listed=torch.empty(2, 3, 2, 32, dtype=torch.bool) if listed else None, span=128)  # fmt: skip


def span_mass(run: Callable, queries: torch.dtype, D: int, *, keys: torch.dtype | None = None, span: int = 128) -> None:
    q, k = torch.empty(2, 300, 8, D, dtype=queries), torch.empty(2, 4096, 2, D, dtype=keys or queries)
    run(q, k, torch.empty(2, dtype=torch.int64), block=128, span=span, scale=0.1, page=16,
        key_scale=torch.empty(2) if keys == FP8 else None)  # fmt: skip


def sparse_attention(
    run: Callable, queries: torch.dtype, D: int, *, keys: torch.dtype | None = None, paged: bool = False,
    T: int = 5, Hs: int = 2, dense: bool = False, window: int | None = None, unlisted: bool = False,
) -> None:  # fmt: skip
    q, k = torch.empty(2, T, 8, D, dtype=queries), torch.empty(2, 4096, 2, D, dtype=keys or queries)
    k = k.view(512, 16, 2, D) if paged else k
    indices, counts = torch.empty(2, Hs, 2048, dtype=torch.int32), torch.empty(2, Hs, dtype=torch.int32)
    scale = torch.empty(2) if keys == FP8 else None
    lists = (None, None) if dense else (indices, counts)
    run(q, k, k, *lists, torch.empty(2, dtype=torch.int64), scale=0.1, key_scale=scale, value_scale=scale, window=window,
        page_table=torch.empty(2, 256, dtype=torch.int32) if paged else None,
        **({"unlisted_values": torch.empty(2, D), "unlisted_shares": torch.empty(2, 8)} if unlisted else {}))  # fmt: skip


def chunk_attention(
    run: Callable, queries: torch.dtype, D: int, *, cache: torch.dtype | None = None, block: int = 128, Hs: int = 2,
    dense: bool = False, window: int | None = None, logsumexp: bool = False,
) -> None:  # fmt: skip
    q, k = torch.empty(2, 512, 8, D, dtype=queries), torch.empty(2, 2, 4096, D, dtype=cache or queries).transpose(1, 2)
    lists = torch.empty(2, 512 // block, Hs, 2048, dtype=torch.int32), torch.empty(2, 512 // block, Hs, dtype=torch.int32)
    scale = torch.empty(2) if cache == FP8 else None
    run(q, k, k, *((None, None) if dense else lists), torch.empty(2, dtype=torch.int64), block=block, scale=0.1, window=window,
        key_scale=scale, value_scale=scale, logsumexp=torch.empty(2, 8, 512) if logsumexp else None)  # fmt: skip


def fused_linear(run: Callable, x: torch.dtype, K: int) -> None:
    rows, weight = torch.empty(20, K, dtype=x), torch.empty(96, K, dtype=x)
    run(rows, weight, None, norm=torch.empty(K, dtype=x), eps=1e-6, swiglu=True, residual=None)


def token_select(run: Callable, scores: torch.dtype, S: int, *, G: int = 1, merge: str = "mean", **budget) -> None:
    sources = torch.zeros(2, 8, G, dtype=torch.int64)
    run(torch.empty(2, 8, S, dtype=scores), torch.empty(2, dtype=torch.int32), sources, sinks=4, recent=64, merge=merge,
        width=64, **{"top_k": None, "top_p": None} | budget)  # fmt: skip


def unlisted_mass(run: Callable, scores: torch.dtype, S: int, G: int) -> None:
    lists = torch.empty(2, 2, 8, 64, dtype=torch.int32), torch.empty(2, 2, 8, dtype=torch.int32)
    run(torch.empty(2, 8, S, dtype=scores), torch.empty(2, dtype=torch.int64), torch.zeros(2, 8, G, dtype=torch.int64), *lists)


def kv_append(run: Callable, new: torch.dtype, D: int, cache: torch.dtype | None = None) -> None:
    x, rows = torch.empty(2, 5, 2, D, dtype=new), torch.empty(2, 4096, 2, D, dtype=cache or new)
    scale = torch.empty(2) if cache == FP8 else None
    run(x, x, rows, rows, torch.empty(2, dtype=torch.int64), key_scale=scale, value_scale=scale)


# The first of an op for every GPU, the others for Hopper.
CASES: dict[str, list[Callable[[Callable], None]]] = {
    "attention_mass": [
        partial(attention_mass, queries=BF16, D=128),
        partial(attention_mass, queries=FP32, D=256, T=1, reduce="max"),
        partial(attention_mass, queries=FP16, D=64, paged=True, reduce="none"),
        partial(attention_mass, queries=BF16, D=128, keys=FP8, heads=True),
        partial(attention_mass, queries=BF16, D=256, T=16),
    ],
    "block_mass": [
        partial(block_mass, queries=BF16, D=64),
        partial(block_mass, queries=BF16, D=128, heads=True),
        partial(block_mass, queries=BF16, D=64, known=True, halvings=3),
        partial(block_mass, queries=FP16, D=80, known=True, halvings=1),
        partial(block_mass, queries=BF16, D=128, keys=FP8),
        partial(block_mass, queries=BF16, D=256),
        partial(block_mass, queries=FP32, D=256),
        partial(block_mass, queries=BF16, D=64, known=True, listed=True),
        partial(block_mass, queries=FP32, D=64, known=True, listed=True),
    ],
    "chunk_attention": [
        partial(chunk_attention, queries=BF16, D=128),
        partial(chunk_attention, queries=BF16, D=128, dense=True),
        partial(chunk_attention, queries=BF16, D=128, dense=True, window=4096, logsumexp=True),
        partial(chunk_attention, queries=BF16, D=128, logsumexp=True),
        partial(chunk_attention, queries=BF16, D=128, cache=FP8),
        partial(chunk_attention, queries=BF16, D=64, logsumexp=True),
        partial(chunk_attention, queries=FP16, D=64, Hs=8, block=16),
        partial(chunk_attention, queries=BF16, D=64, dense=True),
        partial(chunk_attention, queries=FP16, D=64, dense=True, window=4096),
        partial(chunk_attention, queries=BF16, D=256, Hs=1),
        partial(chunk_attention, queries=BF16, D=256, dense=True),
        partial(chunk_attention, queries=FP32, D=80),
        partial(chunk_attention, queries=FP32, D=256, dense=True),
    ],
    "fused_linear": [
        partial(fused_linear, x=BF16, K=4096),
        partial(fused_linear, x=FP32, K=1000),
    ],
    "kv_append": [
        partial(kv_append, new=BF16, D=128),
        partial(kv_append, new=FP32, D=80),
        partial(kv_append, new=BF16, D=64, cache=FP8),
    ],
    "span_mass": [
        partial(span_mass, queries=BF16, D=64),
        partial(span_mass, queries=BF16, D=128, keys=FP8),
        partial(span_mass, queries=FP16, D=80, span=4096),
        partial(span_mass, queries=FP32, D=256),
    ],
    "sparse_attention": [
        partial(sparse_attention, queries=BF16, D=128),
        partial(sparse_attention, queries=FP32, D=80, T=1),
        partial(sparse_attention, queries=FP16, D=64, paged=True, Hs=1),
        partial(sparse_attention, queries=BF16, D=128, keys=FP8, Hs=8),
        partial(sparse_attention, queries=BF16, D=256, T=16),
        partial(sparse_attention, queries=BF16, D=128, unlisted=True),
        partial(sparse_attention, queries=BF16, D=128, dense=True),
        partial(sparse_attention, queries=FP16, D=64, paged=True, T=16, dense=True, window=4096),
    ],
    "token_select": [
        partial(token_select, scores=BF16, S=131072, top_p=0.95),  # top-k is in it
        partial(token_select, scores=BF16, S=131073, top_k=4096),
        partial(token_select, scores=BF16, S=131072, G=4, top_k=4096),
        partial(token_select, scores=FP32, S=1000, G=2, merge="max", top_k=100),
        partial(token_select, scores=FP16, S=1000, G=9, top_k=torch.tensor([3, 5])),
    ],
    "unlisted_mass": [
        partial(unlisted_mass, scores=BF16, S=131072, G=4),
        partial(unlisted_mass, scores=FP32, S=1000, G=1),
    ],
}


def serialised(ptx: str) -> bool:
    """Whether ptxas says that the tensor cores' instructions on Hopper (wgmma) must wait for each other: half the speed."""
    from triton import knobs

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name", "sm_90a", source.name, "-o", os.devnull]
        return SERIALISED in subprocess.run(command, capture_output=True, text=True).stderr


def compile_all(capability: int) -> Iterator[dict]:
    """Runs every case for a GPU that is not there; yields what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    compiled: list[dict] = []
    compile_and_launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append(
            {
                "kernel": self.__name__,
                "target": re.findall(r"(?m)^\.target (\w+)", kernel.asm["ptx"]),
                "binary": kernel.asm["cubin"][:4] == b"\x7fELF",
                "shared": kernel.metadata.shared,
                "serialised": capability == 90 and serialised(kernel.asm["ptx"]),
            }
        )

    driver.set_active(Driver())
    JITFunction.run = compile_only
    for op, cases in CASES.items():
        if op in triton_ops():
            run = getattr(importlib.import_module(f"outrider.ops.{op}.triton"), op)
            for case in cases if capability == 90 else cases[:1]:
                case(run)
                yield from ({"op": op, "case": str(case.keywords), **row} for row in compiled)
                compiled.clear()


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_triton_kernels_compile(capability, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["binary"], row
        assert [target.rstrip("a") for target in row["target"]] == [f"sm_{capability}"], row
        assert row["shared"] <= SHARED_MEMORY[capability] * 1024, row
        assert not row["serialised"] or row["op"] != "chunk_attention", row
    for op in triton_ops():
        assert launched(op), "no launch was recognised"
        assert {row["kernel"] for row in rows if row["op"] == op} == launched(op)


def cuda_builds() -> list:
    builds = []
    for source in sorted(OPS.glob("*/cuda/*.cu")):
        module = importlib.import_module(f"outrider.ops.{source.parents[1].name}.cuda")
        name = f"{source.parents[1].name}/{source.stem}"
        builds += [pytest.param(source, defines, id=f"{name}-{'-'.join(defines)}") for defines in module.VARIANTS]
    return builds


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("source", "defines"), cuda_builds())
def test_cuda_kernels_compile(source, defines, tmp_path):
    binary = tmp_path / "kernel.cubin"
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", f"-I{OPS}", *(f"-D{define}" for define in defines)]
    done = subprocess.run(
        ["nvcc", *target, "-cubin", "-o", str(binary), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert SERIALISED not in done.stdout + done.stderr
    assert binary.read_bytes()[:4] == b"\x7fELF"


def test_every_kernel_has_cases():
    assert set(triton_ops()) <= set(CASES)


if __name__ == "__main__":
    for compiled_kernel in compile_all(int(sys.argv[1])):
        print(json.dumps(compiled_kernel))
