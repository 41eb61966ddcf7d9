"""Products against fp64, with what surrounds them; of few rows, a row has the same bits in whatever company."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from outrider.ops import fused_linear

GPU = torch.cuda.is_available()
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    R: int
    K: int
    N: int
    norm: bool = False
    swiglu: bool = False
    bias: bool = False
    residual: bool = False

    def __str__(self) -> str:
        extras = "-".join(name for name in ("norm", "swiglu", "bias", "residual") if getattr(self, name)) or "plain"
        return f"{str(self.dtype)[6:]}-R{self.R}-K{self.K}-N{self.N}-{extras}"


CASES = [
    Case(BF16, 1, 8, 1),  # less than a step, one output
    Case(BF16, 1, 160, 16),
    Case(BF16, 3, 1144, 40, bias=True),  # the last group is cut, a tile too
    Case(BF16, 8, 2048, 96, norm=True),
    Case(BF16, 5, 520, 60, norm=True, swiglu=True, bias=True),
    Case(BF16, 5, 1600, 48, residual=True, bias=True),
    Case(BF16, 8, 6400, 24, residual=True),  # rows of x do not fit into shared memory
    Case(BF16, 2, 264, 130, norm=True),
    Case(BF16, 7, 1160, 72, swiglu=True, residual=True),
    Case(BF16, 8, 4096, 34, norm=True, bias=True, residual=True),
]
if GPU:
    models = [(2048, 3072, 8192), (4096, 6144, 14336), (1024, 4096, 3072), (896, 1152, 4864), (8192, 10240, 28672)]
    for hidden, heads, intermediate in models:
        for R in (1, 2, 4, 5, 8):
            CASES += [
                Case(BF16, R, hidden, heads, norm=True, bias=R % 2 == 1),
                Case(BF16, R, heads - 1024, hidden, residual=True),
                Case(BF16, R, hidden, 2 * intermediate, norm=True, swiglu=True),
                Case(BF16, R, intermediate, hidden, residual=True),
            ]


MANY_ROWS = [  # by the Triton kernels around PyTorch's product
    Case(dtype, *shape, **dict.fromkeys(extras, True))
    for dtype in (BF16, torch.float16, torch.float32)
    for shape in ((1, 8, 2), (37, 300, 62), (20, 2200, 4100))
    for extras in (("norm",), ("norm", "swiglu"), ("residual",), ("bias", "residual"), ("bias", "norm", "swiglu", "residual"))
]
if GPU:
    MANY_ROWS += [
        Case(BF16, 4096, 4096, 28672, norm=True, swiglu=True),
        Case(BF16, 4095, 14336, 4096, residual=True),
        Case(BF16, 4096, 4096, 6144, norm=True),
    ]


def make(case: Case, device: torch.device, seed: int = 0) -> dict[str, Tensor | float | bool]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    return {
        "x": 3 * random(case.R, case.K),
        "weight": random(case.N, case.K) * case.K**-0.5,
        "bias": random(case.N) if case.bias else None,
        "norm": 1 + 0.3 * random(case.K) if case.norm else None,
        "eps": 1e-5,
        "swiglu": case.swiglu,
        "residual": random(case.R, case.N // (2 if case.swiglu else 1)) if case.residual else None,
    }


def widened(arguments: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}


@pytest.fixture(scope="module")
def cuda(request) -> None:
    """Backend "cuda" runs: on the GPU, or in the emulated CUDA."""
    if not GPU:
        with request.getfixturevalue("emulated")():
            yield
    else:
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"cuda-{case}")
def test_products_are_as_near_as_pytorchs(case, cuda, margin, device, run_or_skip):
    arguments = make(case, device)
    got = run_or_skip(lambda: fused_linear(**arguments, backend="cuda"))
    assert got.shape == (case.R, case.N // 2 if case.swiglu else case.N)
    margin(got, fused_linear(**arguments, backend="reference"), fused_linear(**widened(arguments), backend="reference"))


@pytest.mark.parametrize("case", MANY_ROWS, ids=lambda case: f"triton-{case}")
def test_products_of_many_rows(case, margin, device, run_or_skip):
    arguments = make(case, device)
    got = run_or_skip(lambda: fused_linear(**arguments, backend="triton"))
    assert got.shape == (case.R, case.N // (2 if case.swiglu else 1)) and got.is_contiguous()
    margin(got, fused_linear(**arguments, backend="reference"), fused_linear(**widened(arguments), backend="reference"))


def test_many_rows_read_their_own_alone(device):
    """Rows that are parts of longer ones; NaN between them and in another row reaches nothing."""
    arguments = make(Case(BF16, 30, 130, 24, norm=True, swiglu=True), device)
    wanted = fused_linear(**arguments, backend="triton")
    wide = torch.full((30, 200), torch.nan, dtype=BF16, device=device)
    wide[:, :130] = arguments["x"]
    wide[7, 5] = torch.nan
    got = fused_linear(**arguments | {"x": wide[:, :130]}, backend="triton")
    assert got[7].isnan().all()
    others = [row for row in range(30) if row != 7]
    torch.testing.assert_close(got[others], wanted[others], rtol=0, atol=0)


@pytest.mark.parametrize("extras", ["plain", "norm", "swiglu"])
def test_a_row_has_the_same_bits_in_any_company(extras, cuda, device):
    """Law 7, to the bit: alone, among others that say nothing about it, at any place."""
    case = Case(BF16, 8, 1288, 64, norm=extras != "plain", swiglu=extras == "swiglu", residual=extras == "plain")
    arguments = make(case, device)
    all_rows = fused_linear(**arguments, backend="cuda")
    for first, count in ((0, 1), (7, 1), (3, 5), (1, 2), (4, 4), (6, 1)):
        rows = slice(first, first + count)
        some = {name: x[rows] if name in ("x", "residual") and x is not None else x for name, x in arguments.items()}
        assert torch.equal(fused_linear(**some, backend="cuda"), all_rows[rows])


def test_strides_and_unread_memory(cuda, device):
    """Rows that are parts of longer ones; NaN between them, behind them, and in other rows, reaches nothing."""
    case = Case(BF16, 3, 136, 24, residual=True, norm=True)
    arguments = make(case, device)
    wanted = fused_linear(**arguments, backend="cuda")
    for name, rows, columns in (("x", 8, 200), ("weight", 40, 152), ("residual", 5, 31)):
        x = arguments[name]
        wide = torch.full((rows, columns), torch.nan, dtype=x.dtype, device=device)
        wide[: x.shape[0], : x.shape[1]] = x
        arguments[name] = wide[: x.shape[0], : x.shape[1]]
    assert torch.equal(fused_linear(**arguments, backend="cuda"), wanted)


def test_a_nan_stays_in_its_row(cuda, device):
    arguments = make(Case(BF16, 4, 256, 32, norm=True), device)
    wanted = fused_linear(**arguments, backend="cuda")
    arguments["x"][2, 100] = torch.nan
    got = fused_linear(**arguments, backend="cuda")
    assert got[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(got[others], wanted[others])


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_chain_in_a_graph_gives_what_it_gives_alone(device):
    """Blocks of the next product start while the one before runs: each must still read what that has written."""
    K, inner, depth = 2048, 8192, 12
    generator = torch.Generator().manual_seed(0)
    layers = [
        [torch.randn(n, k, generator=generator).mul(k**-0.5).to(device, BF16) for n, k in ((2 * inner, K), (K, inner))]
        for _ in range(depth)
    ]
    gain = torch.ones(K, dtype=BF16, device=device)
    start = torch.randn(5, K, generator=generator).to(device, BF16)

    def run(wait) -> Tensor:
        x = start.clone()
        for up, down in layers:
            gated = fused_linear(x, up, norm=gain, swiglu=True, backend="cuda")
            wait()
            x = fused_linear(gated, down, residual=x, backend="cuda")
            wait()
        return x

    wanted = run(torch.cuda.synchronize)
    assert torch.equal(run(lambda: None), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(lambda: None)
    for _ in range(5):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)
