"""rotary_append kernels against an fp64 oracle: queries, the rows that are written, and all memory that must stay as it was."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from outrider.ops import rotary_append

GPU = torch.cuda.is_available()
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
NAMES = {BF16: "bf16", FP16: "fp16", FP8: "fp8"}
EPS = 1e-5
backends = pytest.mark.parametrize("backend", ["cuda"], indirect=True)  # the one that there is, besides the reference
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = BF16
    cache: torch.dtype = BF16
    D: int = 128
    heads: tuple[int, int] = (4, 2)  # query heads, KV heads
    T: int = 1
    lengths: tuple[int, ...] = (5, 0, 33)
    norms: str = "both"
    layout: str = "head_major"

    def __str__(self) -> str:
        kinds = f"{NAMES[self.dtype]}_{NAMES[self.cache]}-D{self.D}-{self.heads[0]}q{self.heads[1]}kv-T{self.T}"
        return f"{kinds}-{'_'.join(map(str, self.lengths))}-{self.norms}-{self.layout}"


CASES = [
    Case(),
    Case(norms="none", lengths=(17,)),
    Case(FP16, FP16, 64, (8, 1), 5, layout="gaps"),
    Case(BF16, FP8, 96, (3, 1), 3, (0, 40), "both", "gaps"),
    Case(FP16, FP8, 256, (2, 2), 2, (9,), "none"),
    Case(BF16, BF16, 256, (1, 1), 16, (0, 1, 2, 60), "query", "plain"),
    Case(FP16, FP16, 80, (5, 2), 1, (3, 3), "key", "head_major"),
    Case(BF16, FP8, 8, (7, 3), 4, (11, 0), "both", "plain"),
    Case(FP16, FP16, 200, (2, 1), 4, (1,), "none", "gaps"),
]
if GPU:
    CASES += [
        Case(dtype, FP8 if narrow else dtype, D, heads, T, lengths, norms, layout)
        for (dtype, narrow), D, heads, (T, lengths), (norms, layout) in product(
            [(BF16, False), (FP16, False), (BF16, True), (FP16, True)],
            [64, 96, 128, 256],
            [(32, 8), (8, 8), (6, 2), (8, 1)],
            [(1, (300,)), (5, (0, 1, 500)), (16, (7,) * 8)],
            [("both", "head_major"), ("none", "gaps")],
        )
    ]


@dataclass
class Problem:
    arguments: dict
    storages: tuple[Tensor, Tensor]  # what the caches are views of
    exact: tuple[Tensor, Tensor, Tensor]  # queries, keys, values in fp64
    rounded: tuple[Tensor, Tensor, Tensor]  # in the dtype of the arguments, step by step


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    B, T, D, (Hq, Hkv) = len(case.lengths), case.T, case.D, case.heads
    lengths = torch.tensor(case.lengths, dtype=[torch.int32, torch.int64][seed % 2])
    projected = 3 * torch.randn(B, T, Hq + 2 * Hkv, D, generator=generator)
    angles = (lengths[:, None] + torch.arange(T))[..., None] * 10_000.0 ** -torch.linspace(0, 1, D // 2)
    made = {"projected": projected, "cos": angles.cos().repeat(1, 1, 2), "sin": angles.sin().repeat(1, 1, 2)}
    for name in ("query", "key"):
        made[f"{name}_norm"] = torch.randn(D, generator=generator) if case.norms in ("both", name) else None
    made = {name: x if x is None else x.to(case.dtype) for name, x in made.items()}
    exact, rounded = (rows_of({name: x if x is None else x.to(dtype) for name, x in made.items()}, Hkv)
                      for dtype in (torch.float64, case.dtype))  # fmt: skip
    storages = [torch.randint(256, shape, generator=generator, dtype=torch.uint8).view(case.cache)
                for shape in storage_shapes(case, max(case.lengths) + T + 2)]  # fmt: skip
    storages = tuple(x.to(device) for x in storages)
    made |= {"key_cache": view(case, storages[0]), "value_cache": view(case, storages[1]), "lengths": lengths, "eps": EPS}
    for name in ("key_scale", "value_scale"):
        made[name] = 0.001 + torch.rand(Hkv, generator=generator) ** 8 if case.cache == FP8 else None  # with some that overflow
    made = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in made.items()}
    return Problem(made, storages, *(tuple(x.to(device) for x in rows) for rows in (exact, rounded)))


def storage_shapes(case: Case, N: int) -> list[tuple[int, ...]]:
    """Of keys and of values, in bytes: apart from each other in all strides."""
    B, (_, Hkv), bytes_ = len(case.lengths), case.heads, case.D * case.cache.itemsize
    if case.layout == "head_major":  # as the engine's cache
        return [(B, Hkv, N, bytes_)] * 2
    if case.layout == "plain":
        return [(B, N, Hkv, bytes_)] * 2
    return [(B + i, N + i, Hkv + i, bytes_ + 8 * i) for i in (1, 2)]


def view(case: Case, storage: Tensor) -> Tensor:
    """The cache [B, N, Hkv, D] in its storage."""
    if case.layout == "head_major":
        return storage.transpose(1, 2)
    return storage[-len(case.lengths) :, : max(case.lengths) + case.T + 2, : case.heads[1], -case.D :]


def rows_of(x: dict, Hkv: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the new tokens, every step in the dtype of the arguments."""
    D = x["projected"].shape[-1]
    cos, sin = (x[name][:, :, None, : D // 2] for name in ("cos", "sin"))
    rows = list(x["projected"].split([x["projected"].shape[2] - 2 * Hkv, Hkv, Hkv], 2))
    for i, gain in enumerate((x["query_norm"], x["key_norm"])):
        if gain is not None:
            rows[i] = rows[i] / (rows[i].pow(2).mean(-1, keepdim=True) + EPS).sqrt() * gain
        first, second = rows[i][..., : D // 2], rows[i][..., D // 2 :]
        rows[i] = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return tuple(rows)


def bytes_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("case", CASES, ids=str)
@backends
def test_queries_and_written_rows(backend, device, run_or_skip, margin, case):
    problem = make(case, device, seed=CASES.index(case))
    given, T = problem.arguments, case.T
    before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
    storages_before = [x.clone() for x in problem.storages]
    queries = run_or_skip(lambda: rotary_append(**given, backend=backend))
    assert queries.is_contiguous()
    assert queries.dtype == case.dtype
    margin(queries, problem.rounded[0], problem.exact[0])

    for name, storage, was, exact, rounded in zip(
        ("key", "value"), problem.storages, storages_before, problem.exact[1:], problem.rounded[1:], strict=True
    ):
        cache = given[f"{name}_cache"]
        written = torch.stack([cache[b, n : n + T] for b, n in enumerate(case.lengths)])
        if case.cache == FP8:
            check_float8(written, exact, given[f"{name}_scale"])
        else:
            margin(written, rounded, exact)
        if name == "value":  # nothing is computed but the quotient
            wanted = given["projected"][:, :, -case.heads[1] :]
            assert torch.equal(
                written.float(), (quantize(wanted, given["value_scale"]) if case.cache == FP8 else wanted).float()
            )
        expected = view(case, was)
        for b, n in enumerate(case.lengths):
            expected[b, n : n + T] = written[b]
        assert torch.equal(bytes_of(storage), bytes_of(was)), "memory was written that is not named"
    for name, x in before.items():
        if "cache" not in name:
            assert torch.equal(given[name], x), name


def check_float8(got: Tensor, exact: Tensor, scale: Tensor) -> None:
    """One rounding to the nearest, four significant bits; a little more where fp32 has come down on the other side of a tie.

    How far fp32 is off goes by what is rotated into an element, which may be as large as the row's largest.
    """
    quotient = exact / scale.double().view(-1, 1)
    wanted = quotient.clamp(-448, 448)
    spacing = torch.exp2(wanted.abs().clamp(min=2.0**-6).log2().floor() - 3)
    off = quotient.abs().amax(-1, keepdim=True).clamp(min=1) * 2.0**-20
    assert ((got.double() - wanted).abs() <= spacing / 2 + off).all()


def quantize(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows.float() / scale.view(-1, 1)).clamp(-448, 448).to(FP8)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@backends
def test_every_number_becomes_the_right_float8(backend, device, run_or_skip, dtype):
    """All 65536 of 16 bits as values: subnormal, between two, halfway, too large, infinite, not a number."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 16, 16, 256)
    projected = torch.cat([torch.zeros(1, 16, 17, 256, dtype=dtype), numbers], 2).to(device)
    ones, caches = torch.ones(16, device=device), [torch.zeros(1, 16, 16, 256, device=device).to(FP8) for _ in range(2)]
    angles, lengths = projected[:, :, 0], torch.zeros(1, dtype=torch.int64, device=device)
    scale = 2.0 ** torch.arange(-8, 8, device=device)
    run_or_skip(
        lambda: rotary_append(projected, angles, angles, *caches, lengths, key_scale=ones, value_scale=scale, backend=backend)
    )
    got, wanted = caches[1].float(), quantize(numbers.to(device), scale).float()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@backends
def test_angles_and_lengths_may_have_any_strides(backend, device, run_or_skip):
    """Angles of one sequence for all, in one tensor with others; lengths and scales among others."""
    problem = make(Case(cache=FP8, T=3, lengths=(7, 7, 7)), device, seed=1)
    given = problem.arguments
    plain = run_or_skip(lambda: rotary_append(**given, backend=backend))
    rows = [bytes_of(x).clone() for x in problem.storages]
    both = torch.stack([given["cos"][:1], given["sin"][:1]], 2)  # [1, T, 2, D]
    given["cos"], given["sin"] = (x.expand(3, -1, -1) for x in both.unbind(2))
    for name in ("lengths", "key_scale", "value_scale"):
        given[name] = torch.stack([given[name]] * 2, -1)[..., 0]
        assert not given[name].is_contiguous()
    for cache in problem.storages:
        cache[:, :, 7:10] = 0
    assert torch.equal(rotary_append(**given, backend=backend), plain)
    for cache, wanted in zip(problem.storages, rows, strict=True):
        assert torch.equal(bytes_of(cache), wanted)


@backends
def test_no_tokens(backend, device, run_or_skip):
    for empty in ({"T": 0}, {"lengths": ()}):
        case = Case(**{"lengths": (3,)} | empty)
        projected = torch.zeros(len(case.lengths), case.T, 8, 128, dtype=BF16, device=device)
        cache = torch.zeros(len(case.lengths), 5, 2, 128, dtype=BF16, device=device)
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        angles = projected[:, :, 0]
        got = run_or_skip(lambda p=projected, a=angles, c=cache, n=lengths: rotary_append(p, a, a, c, c, n, backend=backend))
        assert got.shape == (len(case.lengths), case.T, 4, 128)
        assert not cache.any()


@on_gpu
@backends
def test_a_captured_call_follows_the_lengths(backend, device, run_or_skip):
    """Replayed four times, 5 and 3 tokens further each time."""
    problem = make(Case(heads=(8, 2), T=5, lengths=(0, 0), layout="plain"), device, seed=1)
    given = problem.arguments
    for name in ("key_cache", "value_cache"):
        given[name] = torch.zeros(2, 100, 2, 128, dtype=BF16, device=device)
    queries = run_or_skip(lambda: rotary_append(**given, backend=backend))
    keys, values = (given[name][:, :5].clone() for name in ("key_cache", "value_cache"))
    steps, graph = torch.tensor([5, 3], device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = rotary_append(**given, backend=backend)
        given["lengths"].add_(steps)
    for _ in range(4):
        graph.replay()
    assert torch.equal(again, queries)
    for name, rows in (("key_cache", keys), ("value_cache", values)):
        for b, step in enumerate((5, 3)):
            for i in range(4):
                assert torch.equal(given[name][b, i * step : i * step + 3], rows[b, :3])
            assert not given[name][b, 3 * step + 5 :].any()
    assert given["lengths"].tolist() == [20, 12]


@on_gpu
@backends
def test_a_launch_that_begins_early_waits(backend, device, run_or_skip):
    """In a chain without pauses every launch sees what the one before has written, and spoils nothing for it."""
    given = make(Case(heads=(32, 8), T=5, lengths=(40, 3), norms="none"), device, seed=1).arguments
    for name in ("key_cache", "value_cache"):
        given[name].zero_()
    inputs = torch.randn(50, *given["projected"].shape, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    run_or_skip(lambda: rotary_append(**given, backend=backend))

    def chain(pause) -> list[Tensor]:
        made = []
        for x in inputs:
            torch.add(x, 0, out=given["projected"])
            pause()
            queries = rotary_append(**given, backend=backend)  # 32 heads, the next call's 16 + 2 * 8
            pause()
            made.append(rotary_append(**(given | {"projected": queries}), backend=backend))
            pause()
            made += [queries, given["key_cache"] * 1, given["value_cache"] * 1]
        return made

    wanted, graph = chain(torch.cuda.synchronize), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(lambda: None)
    for _ in range(20):
        for x in got:
            x.zero_()
        graph.replay()
        for x, y in zip(got, wanted, strict=True):
            assert torch.equal(x, y)
