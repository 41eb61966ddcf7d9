"""What keeps Triton's attention kernels from a call: shapes and dtypes anywhere, 8-bit caches by the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from outrider.ops import backends

BF16, FP32, FP64, FP8 = torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("dtype", "cache", "shape", "capability", "message"),
    [
        (BF16, FP8, (1, 16, 2, 256), (8, 9), None),
        (FP32, FP32, (1, 16, 2, 256), (8, 0), None),
        (FP64, FP64, (1, 16, 2, 256), (9, 0), "queries are float64; the kernel computes in float32"),
        (BF16, BF16, (1, 17, 2, 256), (9, 0), "T=17 query tokens; the kernel takes at most 16"),
        (BF16, BF16, (1, 16, 2, 257), (9, 0), "head dim 257; the kernel takes at most 256"),
        (BF16, FP8, (1, 16, 2, 256), (8, 0), "float8_e4m3fn caches need compute capability 8.9"),
        (FP32, FP8, (1, 16, 2, 256), (9, 0), "float8_e4m3fn caches take queries of 16 bits"),
    ],
)
def test_what_keeps_a_kernel_from_a_call_on_a_gpu(monkeypatch, dtype, cache, shape, capability, message):
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    queries = SimpleNamespace(dtype=dtype, shape=shape, device=torch.device("cuda"), is_cuda=True)
    assert backends.attention_obstacle(queries, SimpleNamespace(dtype=cache), 16) == message


def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends, "_triton_missing", lambda: None)
    queries, cache = torch.zeros(1, 20, 2, 8), torch.zeros(1, 9, 2, 8, dtype=FP8)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.attention_obstacle(queries, cache) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backends.attention_obstacle(queries, cache) == "it needs a CUDA device, or TRITON_INTERPRET=1, got cpu"
