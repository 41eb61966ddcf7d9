"""The contract of fused_linear: what is refused, by name, and what it computes, against PyTorch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from outrider.ops import fused_linear

D = torch.float64


def arguments(**changes):
    made = {"x": torch.randn(3, 8), "weight": torch.randn(6, 8)}
    return made | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, TypeError, "x: expected dtype .*, got int32"),
        ({"x": torch.zeros(8)}, ValueError, r"x: expected shape \[R, K\]"),
        ({"weight": torch.zeros(6, 7)}, ValueError, r"weight: expected shape \[N, K\] with K=8, got \[6, 7\]"),
        ({"weight": torch.zeros(6, 8, dtype=D)}, TypeError, "weight: expected dtype float32, got float64"),
        ({"weight": torch.zeros(5, 8), "swiglu": True}, ValueError, "weight: expected an even number of rows"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \[N\]"),
        ({"norm": torch.zeros(6)}, ValueError, r"norm: expected shape \[K\]"),
        ({"residual": torch.zeros(3, 3)}, ValueError, r"residual: expected shape \[R, M\] with R=3, M=6"),
        ({"residual": torch.zeros(3, 6), "swiglu": True}, ValueError, "residual: expected shape"),
        ({"backend": "fast"}, ValueError, "backend: expected one of 'auto', 'reference', 'cuda', 'triton', got 'fast'"),
        ({"backend": "cuda"}, ValueError, "it takes bfloat16, got torch.float32"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        fused_linear(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(9, 8)}, "it takes 1 to 8 rows, got 9"),
        ({"x": torch.zeros(0, 8)}, "it takes 1 to 8 rows, got 0"),
        ({"x": torch.zeros(1, 12), "weight": torch.zeros(6, 12)}, "a multiple of 8 columns"),
        ({"x": torch.zeros(1, 17)[:, 1:9]}, "rows that start at multiples of 16 bytes, which x"),
        ({"weight": torch.zeros(8, 6).T}, "which weight with strides"),
        (
            {"x": torch.zeros(8, 20_000), "weight": torch.zeros(6, 20_000), "norm": torch.zeros(20_000)},
            "with a norm it takes rows that fit into",
        ),
        ({}, "it needs a CUDA device, got cpu"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(changes, message):
    given = {name: x.bfloat16() for name, x in arguments(**changes).items()}
    if "x" in changes and not changes["x"].is_contiguous():
        given["x"] = torch.zeros(1, 17).bfloat16()[:, 1:9]
    if "weight" in changes and not changes["weight"].is_contiguous():
        given["weight"] = torch.zeros(8, 6).bfloat16().T
    with pytest.raises(ValueError, match=message):
        fused_linear(**given, backend="cuda")


def test_it_is_what_pytorch_computes():
    x, weight, bias, gain = (torch.randn(shape, dtype=D) for shape in ((3, 8), (6, 8), (6,), (8,)))
    torch.testing.assert_close(fused_linear(x, weight), linear(x, weight))
    residual = torch.randn(3, 6, dtype=D)
    wanted = residual + linear(rms_norm(x, (8,), gain, 1e-5), weight, bias)
    torch.testing.assert_close(fused_linear(x, weight, bias, norm=gain, eps=1e-5, residual=residual), wanted)
    gate, up = linear(x, weight, bias).chunk(2, dim=-1)
    wanted = residual[:, :3] + silu(gate) * up
    torch.testing.assert_close(fused_linear(x, weight, bias, swiglu=True, residual=residual[:, :3]), wanted)
