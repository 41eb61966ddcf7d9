"""quantized_keys kernels: records against the reference, bit for bit; masses against fp64, with all that is not to be read NaN.

The kernels for masses add up q_d low_d in float16: 16 sums of D / 16 numbers, so D roundings. With the numbers drawn here (root
mean squares: queries 1, `low` 3) and D = 128 what is rounded is about 6, and off by 2^-12 of it; D independent roundings, times
D^-1/2, come to 0.0015 in a logit, and a mass is off by so much of itself. `TYPICAL` limits the root mean square of such errors,
`RELATIVE` the largest of millions. Where numbers are such that float16 holds all sums, `IN_FLOAT32` is left: a few roundings of
float32 at the size of the logits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import product
from math import log

import pytest
import torch
from torch import Tensor

from outrider.ops import compiler, quantize_keys, quantized_mass
from outrider.ops.quantized_keys import cuda, record_words
from outrider.ops.quantized_keys.layout import decode, encode

GPU = torch.cuda.is_available()
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP8: "fp8"}
POISON = 0x7FFF7FFF  # as a pair of float16: not a number
RELATIVE, TYPICAL, IN_FLOAT32 = 2e-2, 4e-3, 2**-18
ROUNDING = {BF16: 2**-8, FP32: 0.0}  # of the result, relative
UNDERFLOW = 2.0**-120
SUM = 1e-2  # of all masses of a query, the tail's too
backends = pytest.mark.parametrize("backend", ["cuda"], indirect=True)  # the one that there is, besides the reference
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = BF16
    cache: torch.dtype = BF16
    bits: int = 4
    D: int = 64
    heads: tuple[int, int] = (8, 2)  # query heads, KV heads
    T: int = 5
    lengths: tuple[int, ...] = (300, 129, 0)
    layout: str = "head_major"
    reduce: str = "mean"
    output: torch.dtype = FP32
    layers: int = 2

    @property
    def group(self) -> int:
        return self.heads[0] // self.heads[1]

    def __str__(self) -> str:
        kinds = f"{NAMES[self.dtype]}_{NAMES[self.cache]}-{self.bits}bit-D{self.D}-{self.heads[0]}q{self.heads[1]}kv-T{self.T}"
        rest = f"{self.layout}-{self.reduce}-{NAMES[self.output]}-L{self.layers}"
        return f"{kinds}-{'_'.join(map(str, self.lengths))}-{rest}"


MEAN, APART = Case(), Case(T=3, heads=(4, 2), reduce="none", lengths=(191, 130, 64), layout="gaps")
CASES = [
    MEAN,
    APART,
    Case(BF16, FP8, 2, 128, (4, 2), 3, (1, 64, 191, 192), "gaps", "none", BF16),
    Case(FP16, FP16, 4, 128, (7, 1), 1, (127, 128, 63), "plain", "mean", BF16, 3),
    Case(FP16, FP8, 2, 64, (2, 2), 16, (0, 130, 0), "head_major", "mean", FP32, 1),
    Case(BF16, BF16, 2, 128, (3, 1), 16, (257, 320), "gaps", "mean", FP32),
    Case(BF16, BF16, 4, 64, (8, 1), 1, (500, 0, 1, 255), "plain", "none", BF16),
    replace(MEAN, lengths=(0, 0), layout="plain"),  # nothing is coded; nothing is cached
    replace(MEAN, lengths=(100, 127, 59), layout="gaps", layers=1),
    replace(APART, lengths=(128,), layers=5),
    replace(APART, lengths=(61, 62, 63, 64, 65, 125, 126), layout="head_major", layers=1),  # tails over the end of a unit
]
if GPU:
    GROUPS = [(8, 8), (8, 4), (6, 2), (32, 8), (14, 2), (8, 1)]  # of 1, 2, 3, 4, 7, 8 heads
    LENGTHS = [(0, 1, 63, 64, 127, 128, 129), (191, 192, 5000, 17), (20_000, 0), (4095, 4096, 4097, 1), (70_001,)]

    def matrix() -> list[Case]:
        """Every T and group that fit, each with three sets of lengths and layouts; what else varies is drawn."""
        choose, cases = random.Random(0), []
        shapes = list(product([2, 4], [64, 128])) * len(GROUPS)  # bits, head dim
        choose.shuffle(shapes)
        for heads, T in product(GROUPS, [1, 3, 5, 16]):
            if cuda.columns(T, heads[0] // heads[1]) > cuda.MAX_COLUMNS:
                continue
            kinds = [(BF16, BF16), (BF16, FP8), (FP16, FP16), (FP16, FP8)], ["mean", "none"], [FP32, BF16]
            (dtypes, reduce, output), (bits, D) = map(choose.choice, kinds), shapes.pop()
            for lengths, layout in zip(choose.sample(LENGTHS, 3), ["head_major", "plain", "gaps"], strict=True):
                cases.append(Case(*dtypes, bits, D, heads, T, lengths, layout, reduce, output, choose.choice([1, 2, 9])))
        return cases

    CASES += matrix()


@dataclass
class Problem:
    """Arguments of both entries; every number that they must not read is none."""

    case: Case
    values: list[Tensor]  # of the keys, all of them, [B, N, Hkv, D]; without the factors of float8
    keys: list[Tensor]  # that lie in poisoned storage; NaN behind the tail
    records: Tensor
    storage: Tensor  # of the records
    lengths: Tensor
    queries: list[Tensor]
    scales: list[float]
    factors: list[Tensor | None]

    @property
    def shared(self) -> dict:
        return {"bits": self.case.bits, "key_scales": self.factors}

    def quantize(self, records: Tensor | None = None, **options) -> None:
        quantize_keys(self.keys, self.lengths, self.records if records is None else records, **self.shared | options)

    def mass(self, **options) -> Tensor:
        given = {"scales": self.scales, "reduce": self.case.reduce, "dtype": self.case.output} | self.shared
        return quantized_mass(self.queries, self.keys, self.records, self.lengths, **given | options)

    def coded(self) -> list[int]:
        return [max(n - 64, 0) // 64 for n in self.case.lengths]

    def hide(self) -> None:
        """Write the records, by the reference; then the keys that they stand for are no longer to be read."""
        self.quantize(backend="reference")
        for keys in self.keys:
            for b, blocks in enumerate(self.coded()):
                keys[b, : 64 * blocks] = torch.nan

    def exact(self) -> tuple[Tensor, Tensor]:
        """Masses [B, T, rows, N] and the tail's share [B, T, rows], from fp64."""
        case, N = self.case, self.keys[0].shape[1]
        B, T, (Hq, Hkv) = len(case.lengths), case.T, case.heads
        masses = torch.zeros(B, T, case.layers * Hq, N, dtype=torch.float64, device=self.lengths.device)
        tails = torch.zeros(B, T, case.layers * Hq, dtype=torch.float64, device=self.lengths.device)
        for layer, (asked, values, factor) in enumerate(zip(self.queries, self.values, self.factors, strict=True)):
            rows = slice(layer * Hq, (layer + 1) * Hq)
            for b, (n, blocks) in enumerate(zip(case.lengths, self.coded(), strict=True)):
                newest = values[b, 64 * blocks : n + T].double() * (1 if factor is None else factor.double().view(-1, 1))
                few = decode(self.records[layer, b, :, :blocks].clone(), case.D, case.bits).double()
                keys = torch.cat([few.flatten(1, 2), newest.transpose(0, 1)], 1)  # [Hkv, n + T, D]
                q = asked[b].double().unflatten(1, (Hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, group, T, D]
                logits = q @ keys.mT.unsqueeze(1) * self.scales[layer]
                seen = torch.arange(n + T, device=q.device) <= n + torch.arange(T, device=q.device).view(-1, 1)
                mass = logits.masked_fill(~seen, -torch.inf).softmax(-1).flatten(0, 1).transpose(0, 1)  # [T, Hq, n + T]
                masses[b, :, rows, :n], tails[b, :, rows] = mass[..., :n], mass[..., n:].sum(-1)
        return masses, tails


def make(case: Case, device: torch.device, seed: int = 0, values: list[Tensor] | None = None) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    B, (Hq, Hkv), D = len(case.lengths), case.heads, case.D
    N = -(-(max(case.lengths) + case.T + 3) // 8) * 8
    lengths = torch.tensor(case.lengths, dtype=[torch.int32, torch.int64][seed % 2], device=device)
    if values is None:  # channels have offsets and ranges of their own
        values = [normal(B, N, Hkv, D) * (0.2 + normal(Hkv, D).abs()) + normal(Hkv, D) for _ in range(case.layers)]
    values = [x.to(case.cache) for x in values]
    factors = [0.25 + torch.rand(Hkv, generator=generator, device=device) if case.cache == FP8 else None for _ in values]
    behind = torch.arange(N, device=device) >= lengths.view(-1, 1) + case.T
    keys = [lay_out(x.float().masked_fill(behind[..., None, None], torch.nan), case.layout).to(case.cache) for x in values]
    if case.layout != "plain":
        keys = [x[1:, 1:-1, :-1, 16:-16] if case.layout == "gaps" else x.transpose(1, 2) for x in keys]
    queries = [normal(B, case.T, Hq + 2, D) for _ in values]
    queries = [x.to(case.dtype)[:, :, 1:-1] if case.layout == "gaps" else x[:, :, 2:].to(case.dtype) for x in queries]
    blocks, extra = max(N // 64 - 1, 0), 3 * (case.layout == "gaps")
    words = record_words(D, case.bits)
    shape = case.layers, B + extra, Hkv + extra, blocks + extra, words + 4 * extra
    storage = torch.full(shape, POISON, dtype=torch.int32, device=device)
    records = storage[:, extra:, :Hkv, : blocks + extra, 4 * extra :]
    scales = [D**-0.5 * (1 + layer % 2 / 4) for layer in range(case.layers)]
    return Problem(case, values, keys, records, storage, lengths, queries, scales, factors)


def lay_out(rows: Tensor, layout: str) -> Tensor:
    """Storage for `[B, N, Hkv, D]`; rows of "gaps" start at multiples of 16 bytes in every dtype."""
    if layout == "plain":
        return rows
    if layout == "head_major":
        return rows.transpose(1, 2).contiguous()
    B, N, Hkv, D = rows.shape
    storage = torch.full((B + 1, N + 2, Hkv + 1, D + 32), torch.nan, device=rows.device)
    storage[1:, 1:-1, :Hkv, 16:-16] = rows
    return storage


def check(problem: Problem, got: Tensor, record_property=None, relative: float = RELATIVE) -> None:
    """Every mass, to `relative` of itself; zeros behind the past; and that all masses of a query make 1."""
    case = problem.case
    assert got.dtype == case.output
    assert got.isfinite().all()
    for b, n in enumerate(case.lengths):
        assert not got[b, ..., n:].any()
    exact, tails = problem.exact()
    if case.reduce == "mean":
        exact, tails = exact.mean(1), tails.mean(1)
    assert got.shape == exact.shape
    error, allowed = (got.double() - exact).abs(), exact * (relative + ROUNDING[case.output]) + UNDERFLOW
    margin = (error / allowed).max().item()
    if record_property is not None:
        record_property("margin", margin)
    assert margin <= 1, f"an error is {margin:.3g} times what is allowed"
    typical = (error / allowed).square().mean().sqrt().item() * relative / TYPICAL
    assert relative < RELATIVE or typical <= 1, f"the errors' root mean square is {typical:.3g} times what is allowed"
    assert ((got.double().sum(-1) + tails - 1).abs() <= SUM).all()


@pytest.mark.parametrize("last", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("case", CASES, ids=str)
@backends
def test_records_are_those_of_the_reference(backend, device, case, last):
    """To the bit, and nothing else in memory changes; no key is read that is not coded."""
    problem = make(case, device, seed=CASES.index(case))
    for keys in problem.keys:
        for b, blocks in enumerate(problem.coded()):
            keys[b, 64 * blocks :] = torch.nan
    problem.quantize(backend=backend, last=last)
    got = problem.records.clone()
    for b, blocks in enumerate(problem.coded()):
        first = max(blocks - 1, 0) if last else 0
        for layer, (values, factor) in enumerate(zip(problem.values, problem.factors, strict=True)):
            rows = values[b, 64 * first : 64 * blocks].float() * (1 if factor is None else factor.view(-1, 1))
            wanted = encode(rows.transpose(0, 1).unflatten(1, (blocks - first, 64)), case.bits)
            assert torch.equal(got[layer, b, :, first:blocks], wanted)
        problem.records[:, b, :, first:blocks] = POISON
    assert (problem.storage == POISON).all(), "memory was written that belongs to no coded block"
    problem.quantize(backend="reference", last=last)
    assert torch.equal(got, problem.records)


@pytest.mark.parametrize("bits", [2, 4])
@backends
def test_channels_of_all_kinds(backend, device, bits):
    """Ranges that float16 does not hold, or holds as nothing; one value alone; values halfway between two codes."""
    levels, place = 2**bits - 1, torch.arange(64, device=device)
    channels = [torch.full((64,), x, device=device) for x in (0.0, 3.0, -700.0, 1e5, -1e30, 1e-8, 1e-40)]
    channels += [place % (levels + 1) * x for x in (1.0, 0.125, 6e-8, 1e-6, 1e-39)]  # every code
    channels += [(place - 32) * x for x in (1e3, 1e4, 1e30, 1e-7)]
    channels += [torch.where(place == 5, x, 0.0) for x in (1.0, -1.0, 1e5, -1e-5)]  # one token apart
    channels += [torch.where(place % 2 == 0, place % levels + 0.5, place % 3 / 2 * levels)]  # ties; 0 and the last code
    channels += [torch.where(place % 2 == 0, zero, -zero) for zero in (0.0, -0.0)]  # both of them
    rows = torch.stack([channels[d % len(channels)].roll(d) for d in range(64)], -1)
    values = torch.zeros(1, 136, 1, 64, device=device)
    values[:, :64, 0] = rows
    problem = make(Case(bits=bits, heads=(2, 1), lengths=(128,), layers=1), device, values=[values])
    problem.quantize(backend=backend)
    got, wanted = problem.records[0, 0, 0, 0], encode(values[0, :64, 0].bfloat16().float(), bits)
    assert torch.equal(got, wanted)
    assert decode(got, 64, bits).isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=str)
@backends
def test_masses_are_those_of_fp64(backend, device, record_property, case):
    """From codes where there are codes, from keys elsewhere; nothing else is read."""
    problem = make(case, device, seed=CASES.index(case))
    problem.hide()
    check(problem, problem.mass(backend=backend), record_property)


@backends
def test_what_one_kernel_writes_the_other_reads(backend, device, record_property):
    problem = make(MEAN, device)
    problem.quantize(backend=backend)
    check(problem, problem.mass(backend=backend), record_property)


def round_numbers(case: Case, device: torch.device, common: float, grid: float) -> Problem:
    """Logits of which about `common` (to base 2) is in all keys; float16 holds all sums in the kernel exactly.

    Queries are 1 and -1, for most channels the same one in all queries; what keys have in common lies along them, what they
    have of their own is one of few multiples of `grid`.
    """
    generator = torch.Generator().manual_seed(0)
    B, Hkv, D = len(case.lengths), case.heads[1], case.D
    N = -(-(max(case.lengths) + case.T + 3) // 8) * 8
    signs = (torch.rand(Hkv, D, generator=generator) < 0.5).float() * 2 - 1
    height = round(common * log(2) * D**-0.5 / grid) * grid
    values = [signs * height + grid * torch.randint(-3, 4, (B, N, Hkv, D), generator=generator) for _ in range(case.layers)]
    problem = make(case, device, values=[x.to(device) for x in values])
    for i, x in enumerate(problem.queries):
        flipped = 1 - 2.0 * (torch.rand(x.shape, generator=generator) < 0.02)
        x.copy_(signs.repeat_interleave(case.group, 0) * flipped)
        problem.scales[i] = D**-0.5
        assert (problem.values[i].float() == values[i].to(device)).all(), "these are bf16 numbers"
    return problem


@pytest.mark.parametrize("case", [MEAN, APART], ids=["mean", "none"])
@pytest.mark.parametrize(("common", "grid"), [(300, 0.125), (-300, 0.125), (1150, 0.5), (-1150, 0.5)])
@backends
def test_large_logits(backend, device, case, common, grid, record_property):
    """Their powers of two are too large or too small for any float."""
    problem = round_numbers(case, device, common, grid)
    problem.hide()
    check(problem, problem.mass(backend=backend), record_property, abs(common) * IN_FLOAT32)


@pytest.mark.parametrize("height", [60, 250])
@pytest.mark.parametrize("place", [0, 97, 250, 299], ids=lambda place: f"token{place}")
@backends
def test_one_token_far_above_all_others(backend, device, place, height, record_property):
    """In the middle of the units that a warp adds up. Masses of 2 ** -60 are still told apart."""
    problem = round_numbers(MEAN, device, 0, 0.125)
    along = problem.queries[0][0, 0].float().view(2, 4, 64).mean(1).sign()  # of the most queries of a KV head
    spike = round(height * log(2) * 64**-0.5 * 4) / 4 * along
    for values, keys in zip(problem.values, problem.keys, strict=True):
        values[0, place] = spike.to(BF16)
        keys[0, place] = spike.to(BF16)
    problem.hide()
    check(problem, problem.mass(backend=backend), record_property, height * IN_FLOAT32)


@pytest.mark.parametrize("kind", ["equal", "zero", "channel"])
@backends
def test_keys_of_one_kind(backend, device, kind, record_property):
    """All alike, so that codes have no steps; all nothing; with one channel a thousand times as large as the others."""
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(3, 312, 2, 64, generator=generator, device=device)
    if kind == "channel":
        values[..., 5] = 3000 + 300 * values[..., 5]
    else:
        values = values[:, :1].expand_as(values) * (kind == "equal")
    problem = make(MEAN, device, values=[values, values.flip(-1)])
    for x, channel in zip(problem.queries, (5, 58), strict=True):
        x[..., channel] /= 100 if kind == "channel" else 1
    problem.hide()
    check(problem, problem.mass(backend=backend), record_property)


@pytest.mark.parametrize("chosen", ["reference", "cuda"])
@backends
def test_later_tail_keys_do_not_reach_earlier_queries(backend, device, chosen):
    problem = make(replace(APART, lengths=(191, 126, 0, 64)), device)
    problem.hide()
    clean = problem.mass(backend=chosen)
    for keys in problem.keys:
        for b, n in enumerate(problem.case.lengths):
            keys[b, n + 2] = torch.nan
    dirty = problem.mass(backend=chosen)
    assert torch.equal(dirty[:, :2], clean[:, :2])
    for b, n in enumerate(problem.case.lengths):
        assert dirty[b, 2, :, :n].isnan().all(), "what a query does see is not hidden"
        assert not dirty[b, ..., n:].any()


@pytest.mark.parametrize("case", [MEAN, APART], ids=["mean", "none"])
@backends
def test_two_runs_are_equal(backend, device, case):
    problem = make(case, device)
    problem.hide()
    first, second = problem.mass(backend=backend), problem.mass(backend=backend)
    assert torch.equal(first, second)


@pytest.mark.skipif(GPU, reason="the GPU has the multiprocessors that it has")
@pytest.mark.parametrize("multiprocessors", [1, 3, 50])
@pytest.mark.parametrize("case", [MEAN, APART], ids=["mean", "none"])
@backends
def test_any_number_of_multiprocessors(backend, emulated, device, case, multiprocessors, record_property):
    """Shares of many units and of several items; of one unit; more warps than units."""
    problem = make(replace(case, lengths=(900, 0, 200)) if multiprocessors == 1 else case, device)
    problem.hide()
    with emulated(multiprocessors=multiprocessors):
        check(problem, problem.mass(backend=backend), record_property)


@pytest.mark.skipif(GPU, reason="the GPU has the multiprocessors that it has")
@pytest.mark.parametrize("case", [MEAN, APART], ids=["mean", "none"])
@backends
def test_the_last_share_is_a_small_one(backend, emulated, device, case, record_property):
    """196 units for 16 warps: of 13 each, and one. Where the last item begins is not to be told from a share's usual size."""
    problem = make(replace(case, lengths=(900, 0, 2100)), device)
    problem.hide()
    with emulated(multiprocessors=1):
        check(problem, problem.mass(backend=backend), record_property)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
@backends
def test_the_result_goes_to_out_and_nowhere_else(backend, device, case):
    """`out` is the middle third of the rows of a larger tensor; of its queries every second one."""
    problem = make(case, device)
    problem.hide()
    for chosen in ("reference", backend):
        wanted = problem.mass(backend=chosen)
        B, *steps, rows, N = wanted.shape
        storage = torch.full((B, *(2 * t for t in steps), 3 * rows, N + 8), torch.nan, dtype=case.output, device=device)
        out = (storage[:, ::2] if steps else storage)[..., rows : 2 * rows, :N]
        assert problem.mass(out=out, backend=chosen) is out
        assert torch.equal(out, wanted)
        out.fill_(torch.nan)
        assert storage.isnan().all()


@backends
def test_lengths_and_factors_may_have_any_strides(backend, device):
    problem = make(CASES[2], device)
    problem.hide()
    wanted = problem.mass(backend=backend)
    problem.lengths = torch.stack([problem.lengths] * 2, -1)[..., 0]
    problem.factors = [torch.stack([x, x + 1], -1)[..., 0] for x in problem.factors]
    assert not problem.lengths.is_contiguous()
    assert torch.equal(problem.mass(backend=backend), wanted)
    problem = make(CASES[2], device)
    problem.quantize(backend=backend)
    wanted = problem.storage.clone()
    problem.storage.fill_(POISON)
    problem.lengths = torch.stack([problem.lengths] * 2, -1)[..., 0]
    problem.factors = [torch.stack([x, x + 1], -1)[..., 0] for x in problem.factors]
    problem.quantize(backend=backend)
    assert torch.equal(problem.storage, wanted)


@backends
def test_arguments_are_left_as_they_were(backend, device):
    problem = make(MEAN, device)
    problem.hide()
    given = [*problem.queries, *problem.keys, problem.storage, problem.lengths]
    before = [x.clone() for x in given]
    problem.mass(backend=backend)
    for x, was in zip(given, before, strict=True):
        torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)
    keys = [x.clone() for x in problem.keys]
    problem.quantize(backend=backend)
    for x, was in zip(problem.keys, keys, strict=True):
        torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)


@backends
def test_records_follow_a_growing_sequence(backend, device):
    """Block after block with `last`, at most 64 tokens further each time: what one call for all would have written."""
    problem = make(replace(MEAN, lengths=(500, 400)), device)
    grown, lengths = problem.records.clone(), problem.lengths.clone()
    for step in range(11):
        problem.lengths = (torch.tensor([20, 0], device=device) + 48 * step).to(lengths).clamp(max=lengths)
        problem.quantize(grown, backend=backend, last=True)
    assert problem.lengths.tolist() == [500, 400]
    problem.quantize(backend=backend)
    assert torch.equal(grown, problem.records)


@backends
def test_no_blocks_and_no_sequences(backend, device):
    """Caches with no room for a coded block need no records; no sequences need nothing."""
    for B, N in ((2, 120), (2, 8), (0, 300)):
        keys = [torch.zeros(B, N, 2, 64, dtype=BF16, device=device)]
        records = torch.zeros(1, B, 2, max(N // 64 - 1, 0), record_words(64, 4), dtype=torch.int32, device=device)
        lengths = torch.full((B,), N - 3, device=device)
        quantize_keys(keys, lengths, records, bits=4, backend=backend)
        assert not records.any()
        if B:
            queries = [torch.zeros(B, 3, 4, 64, dtype=BF16, device=device)]
            got = quantized_mass(queries, keys, records, lengths, bits=4, scales=[1.0], reduce="none", backend=backend)
            wanted = 1 / (N - 2 + torch.arange(3.0, device=device))
            torch.testing.assert_close(got[..., : N - 3], wanted.view(1, 3, 1, 1).expand(B, 3, 4, N - 3), rtol=1e-5, atol=0)
            assert not got[..., N - 3 :].any()


@pytest.mark.parametrize("case", list({(case.T, case.group): case for case in CASES}.values()), ids=str)
@backends
def test_columns_are_those_of_the_kernel(backend, device, monkeypatch, case):
    """What the host allocates and refuses by is what the kernel was built with."""
    libraries, build = [], compiler.build
    monkeypatch.setattr(compiler, "build", lambda *given: libraries.append(build(*given)) or libraries[-1])
    make(case, device).mass(backend=backend)
    assert [library.columns() for library in libraries] == [cuda.columns(case.T, case.group)]


@pytest.mark.parametrize(("T", "group", "columns"), [(16, 5, 128), (33, 2, 72), (65, 1, 72), (5, 32, 160)])
@backends
def test_more_queries_than_a_product_takes(backend, device, T, group, columns):
    problem = make(Case(T=T, heads=(group, 1), lengths=(70,)), device)
    with pytest.raises(ValueError, match=rf"cannot run this call: .* at most 64 .*, got {T} x {group} \({columns}\)"):
        problem.mass(backend=backend)


@on_gpu
@pytest.mark.parametrize("case", [MEAN, APART], ids=["mean", "none"])
@backends
def test_a_captured_call_follows_its_arguments(backend, device, case):
    """One graph of both entries, replayed with other keys, queries and lengths; records are made anew or followed."""
    problem = make(replace(case, lengths=(3000, 3000), layers=4), device)
    for x in problem.keys:
        x.normal_()
    problem.quantize(backend=backend)
    problem.mass(backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.quantize(backend=backend)
        result = problem.mass(backend=backend)
    for lengths in [(3000, 700), (17, 2000), (0, 3000), (128, 2999)]:
        problem.lengths.copy_(torch.tensor(lengths))
        for x in (*problem.queries, *problem.keys):
            x.normal_()
        graph.replay()
        got, records = result.clone(), problem.storage.clone()
        problem.quantize(backend="reference")
        assert torch.equal(problem.storage, records)
        assert torch.equal(problem.mass(backend=backend), got)
        problem.case = replace(problem.case, lengths=lengths)
        problem.values = [x.clone() for x in problem.keys]
        check(problem, got)


@on_gpu
@backends
def test_offsets_beyond_31_bits(backend, device, record_property):
    """Four million tokens: 2.2 G elements of keys. Judged by the last KV head."""
    length, D = 2**22 + 21, 64
    N = length + 3
    generator = torch.Generator(device).manual_seed(0)
    keys = torch.randn(1, N, 8, D, generator=generator, device=device, dtype=BF16)
    queries = torch.randn(1, 1, 8, D, generator=generator, device=device, dtype=BF16)
    records = torch.full((1, 1, 8, N // 64 - 1, record_words(D, 2)), POISON, dtype=torch.int32, device=device)
    lengths = torch.tensor([length], device=device)
    quantize_keys([keys], lengths, records, bits=2, backend=backend)
    got = quantized_mass([queries], [keys], records, lengths, bits=2, scales=[D**-0.5], backend=backend)
    case = Case(bits=2, heads=(1, 1), T=1, lengths=(length,), layers=1)
    last = keys[:, :, 7:]
    problem = Problem(case, [last], [last], records[:, :, 7:], records, lengths, [queries[:, :, 7:]], [D**-0.5], [None])
    check(problem, got[:, 7:], record_property)
    written = problem.records.clone()
    problem.quantize(backend="reference")
    assert torch.equal(problem.records, written)
