"""block_mass kernels against a dense fp64 oracle, with every key that must not be read set to NaN."""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from outrider.ops import block_mass

pytest.importorskip("triton", reason="kernels need triton")

GPU = torch.cuda.is_available()
FP8 = torch.float8_e4m3fn
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", FP8: "fp8"}
DTYPES = [  # queries, keys
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, FP8),
    (torch.float16, FP8),
]
LAYOUTS = ["plain", "head_major", "gaps", "head_token_kv"]
OUTPUTS = [None, torch.bfloat16]
KNOWN = [(False, None), (True, None), (True, 128), (True, 24), (True, 1000)]
# query heads, KV heads, and the heads asked for: all, of one KV head, of some
if GPU:
    HEAD_DIMS = [64, 80, 96, 128, 256]
    HEADS = [(8, 8, None), (6, 2, (4, 5)), (8, 2, None), (8, 2, (0, 3, 6)), (8, 1, (7,))]
    CHUNKS = [(1, 128), (300, 128), (512, 512), (777, 200), (130, 1)]  # tokens, block
    LENGTHS = [(0, 1, 33, 700), (4999, 64, 0), (2048,), (1023, 1025, 1, 3000), (129, 0, 20000)]
else:
    HEAD_DIMS = [64, 24]
    HEADS = [(4, 2, None), (4, 2, (3,)), (3, 1, (0, 2))]
    CHUNKS = [(1, 4), (70, 32), (75, 70)]
    LENGTHS = [(0, 1, 75), (150, 0), (128,)]
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(scope="module", params=["triton", "reference"])
def backend(request) -> str:
    return request.param


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype = torch.bfloat16
    D: int = HEAD_DIMS[0]
    heads: tuple[int, int, tuple[int, ...] | None] = HEADS[0]
    chunk: tuple[int, int] = CHUNKS[1]
    lengths: tuple[int, ...] = LENGTHS[0]
    layout: str = "plain"
    known: bool = False  # the logsumexp is given
    span: int | None = None  # tokens that are listed together, half of them; None: all are. Only where the logsumexp is given
    output: torch.dtype | None = None

    def __str__(self) -> str:
        Hq, Hkv, chosen = self.heads
        heads = f"{Hq}q{Hkv}kv" + "".join(f"_{h}" for h in chosen or ())
        kinds = f"{NAMES[self.dtype]}_{NAMES[self.cache]}-D{self.D}-{heads}-T{self.chunk[0]}_{self.chunk[1]}"
        known = ("known" if self.known else "computed") + (f"-span{self.span}" if self.span else "")
        return f"{kinds}-{'_'.join(map(str, self.lengths))}-{self.layout}-{known}-{NAMES[self.output or torch.float32]}"


def matrix() -> list[Case]:
    """Every combination of dtypes, head dim, heads and chunk; what else varies is drawn."""
    draw = random.Random(0).choice
    return [
        Case(*dtypes, D, heads, chunk, draw(LENGTHS), draw(LAYOUTS), *draw(KNOWN), draw(OUTPUTS))
        for dtypes, D, heads, chunk in product(DTYPES, HEAD_DIMS, HEADS, CHUNKS)
    ]


@dataclass
class Problem:
    """Arguments of a call, with keys and denominators that must not be read set to NaN, and what judges the result."""

    arguments: dict
    exact: Tensor  # fp64
    rounded: Tensor  # softmax of a product in the dtype of the queries


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    B, (T, block), D, (Hq, Hkv, chosen) = len(case.lengths), case.chunk, case.D, case.heads
    N, scale = max(case.lengths) + T + 3, D**-0.5
    lengths = torch.tensor(case.lengths, device=device)
    queries = (2 * torch.randn(B, T, Hq, D, generator=generator, device=device)).to(case.dtype)
    keys = torch.randn(B, N, Hkv, D, generator=generator, device=device).to(case.cache).float()
    key_scale = 0.5 + torch.rand(Hkv, generator=generator, device=device) if case.cache == FP8 else None
    rows = list(range(Hq)) if chosen is None else list(chosen)
    scaled = keys.double() * (1 if key_scale is None else key_scale.double().view(-1, 1))
    exact, logsumexp = masses(queries.double(), scaled, lengths, block, scale)
    logsumexp = logsumexp.float() if case.known else None
    rounded, _ = masses(queries, scaled.to(case.dtype), lengths, block, scale, logsumexp)
    if logsumexp is not None:
        logsumexp[:, [h for h in range(Hq) if h not in rows]] = torch.nan
    listed = None
    if case.span is not None:
        listed = (
            torch.rand(B, exact.shape[1], Hkv if D % 16 else 1, -(-N // case.span), generator=generator, device=device) < 0.5
        )
        tokens = listed.repeat_interleave(case.span, -1)[..., :N].repeat_interleave(Hq // listed.shape[2], 2)
        exact, rounded = exact * tokens, rounded * tokens
    behind = torch.arange(N, device=device) >= lengths.view(-1, 1) + T
    arguments = {
        "queries": queries, "keys": lay_out(keys.masked_fill(behind[..., None, None], torch.nan), case.layout, case.cache),
        "lengths": lengths, "block": block, "scale": scale,
        "heads": None if chosen is None else torch.tensor(rows, device=device), "logsumexp": logsumexp, "key_scale": key_scale,
        "dtype": case.output, "listed": listed, "span": case.span or 128,
    }  # fmt: skip
    return Problem(arguments, exact[:, :, rows], rounded[:, :, rows])


def masses(
    queries: Tensor, keys: Tensor, lengths: Tensor, block: int, scale: float, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`[B, NB, Hq, N]` and the logsumexp `[B, Hq, T]`: in the dtype of the arguments, the means in fp32 or fp64."""
    B, T, Hq, _ = queries.shape
    N, wide = keys.shape[1], torch.promote_types(queries.dtype, torch.float32)
    position, step = torch.arange(N, device=keys.device), torch.arange(T, device=keys.device)
    result = torch.zeros(B, -(-T // block), Hq, N, dtype=wide, device=keys.device)
    denominators = torch.empty(B, Hq, T, dtype=queries.dtype, device=keys.device)
    for b, length in enumerate(lengths.tolist()):  # one sequence at a time: all of them would be gigabytes
        k = keys[b].transpose(0, 1).repeat_interleave(Hq // keys.shape[2], 0)
        logits = queries[b].transpose(0, 1) @ k.transpose(-1, -2) * scale  # [Hq, T, N]
        logits.masked_fill_(position > (length + step).view(T, 1), -torch.inf)
        denominators[b] = logits.logsumexp(-1)
        weights = logits.softmax(-1).to(wide) if known is None else (logits.to(wide) - known[b].unsqueeze(-1)).exp()
        for i, part in enumerate(weights.split(block, 1)):
            result[b, i] = part.mean(1).masked_fill(position >= length + i * block, 0)
    return result, denominators


def lay_out(keys: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """The cache `[B, N, Hkv, D]` as a view of storage whose other memory is NaN."""
    B, N, Hkv, D = keys.shape
    if layout == "plain":
        return keys.to(dtype)
    if layout == "head_major":
        return keys.transpose(1, 2).contiguous().to(dtype).transpose(1, 2)
    if layout == "gaps":  # between rows, heads and sequences; rows of an odd stride
        storage = torch.full((B + 1, N + 2, Hkv + 1, D + 3), torch.nan, device=keys.device)
        storage[1:, 1:-1, :Hkv, 2:-1] = keys
        return storage.to(dtype)[1:, 1:-1, :Hkv, 2:-1]
    storage = torch.stack([keys, torch.full_like(keys, torch.nan)], 3).transpose(1, 2).contiguous()  # [B, Hkv, N, 2, D]
    return storage.to(dtype)[..., 0, :].transpose(1, 2)


# the reference takes every seventh case: prime to the numbers of choices, so that all of them come
CASES = [("triton", case) for case in matrix()] + [("reference", case) for case in matrix()[::7]]


@pytest.mark.parametrize(("backend", "case"), CASES, ids=str, indirect=["backend"])
def test_error_is_at_most_twice_that_of_torch(backend, device, run_or_skip, margin, case):
    problem = make(case, device)
    got = run_or_skip(lambda: block_mass(**problem.arguments, backend=backend))
    assert got.dtype == (case.output or torch.float32)
    for b, length in enumerate(case.lengths):
        for i in range(got.shape[1]):
            assert (got[b, i, :, length + i * case.chunk[1] :] == 0).all()
    margin(got, problem.rounded, problem.exact)


@pytest.mark.parametrize("halvings", [1, 2, 3], ids="of_2_to_minus_{}".format)
def test_exponentials_in_software_are_as_good(device, margin, monkeypatch, halvings):
    """A mean of masses that are off by 1e-4, some of them, is nearer to the truth than its rounding to bf16."""
    problem = make(Case(chunk=CHUNKS[2], lengths=LENGTHS[1], known=True), device)
    hard = block_mass(**problem.arguments, backend="triton")
    monkeypatch.setattr(importlib.import_module("outrider.ops.block_mass.triton"), "SOFT_HALVINGS", halvings)
    soft = block_mass(**problem.arguments, backend="triton")
    assert not torch.equal(soft, hard)
    torch.testing.assert_close(soft, hard, rtol=1e-4, atol=0)
    margin(soft, problem.rounded, problem.exact)


@pytest.mark.parametrize("known", [False, True], ids=["computed", "known"])
def test_two_runs_are_equal(backend, device, known):
    problem = make(Case(lengths=LENGTHS[1], known=known), device)
    first, second = (block_mass(**problem.arguments, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(backend, device):
    problem = make(Case(lengths=LENGTHS[0], known=True), device)
    together = block_mass(**problem.arguments, backend=backend)
    for b in range(len(together)):
        cut = {name: problem.arguments[name][b : b + 1] for name in ("queries", "keys", "lengths", "logsumexp")}
        alone = block_mass(**(problem.arguments | cut), backend=backend)
        torch.testing.assert_close(alone, together[b : b + 1], rtol=1e-6, atol=0)


def test_a_later_key_does_not_reach_earlier_blocks(backend, device):
    case = Case(lengths=LENGTHS[0])
    (_, block), problem = case.chunk, make(case, device)
    clean = block_mass(**problem.arguments, backend=backend)
    for b, length in enumerate(case.lengths):
        problem.arguments["keys"][b, length + block :] = torch.nan
    dirty = block_mass(**problem.arguments, backend=backend)
    assert torch.equal(dirty[:, 0], clean[:, 0])
    assert dirty[1, 1, :, : case.lengths[1]].isnan().all(), "what a query does see is not hidden"


def test_large_logits(backend, device, margin):
    """Masses from 1 down to nothing, and denominators far beyond the range of fp32."""
    problem = make(Case(lengths=LENGTHS[1]), device)
    arguments = problem.arguments | {"scale": 20 * problem.arguments["scale"]}
    places = [arguments[name] for name in ("queries", "keys", "lengths", "block", "scale")]
    places[1] = places[1].nan_to_num()
    exact, _ = masses(places[0].double(), places[1].double(), *places[2:])
    rounded, _ = masses(*places)
    margin(block_mass(**arguments, backend=backend), rounded, exact)


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_scale_may_be_any_number(backend, device, scale):
    problem = make(Case(dtype=torch.float32, cache=torch.float32), device)
    arguments = problem.arguments | {"scale": scale}
    places = [arguments[name] for name in ("queries", "keys", "lengths", "block", "scale")]
    exact, _ = masses(places[0].double(), places[1].nan_to_num().double(), *places[2:])
    got = block_mass(**arguments, backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-9)


def test_no_heads(backend, device):
    problem = make(Case(), device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    got = block_mass(**(problem.arguments | {"heads": none}), backend=backend)
    assert got.shape == (*problem.exact.shape[:2], 0, problem.exact.shape[3])


def test_arguments_are_left_as_they_were(backend, device):
    arguments = make(Case(heads=HEADS[1], known=True), device).arguments
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    block_mass(**arguments, backend=backend)
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True)


def test_arguments_may_have_any_strides(backend, device):
    problem = make(Case(heads=HEADS[1], known=True), device)
    plain = block_mass(**problem.arguments, backend=backend)
    strided = dict(problem.arguments)
    for name in ("queries", "lengths", "heads", "logsumexp"):
        strided[name] = torch.stack([x := problem.arguments[name], x], -1)[..., 0]
    assert not strided["queries"].is_contiguous()
    assert torch.equal(block_mass(**strided, backend=backend), plain)


@pytest.mark.parametrize("odd", [0, 1])  # rows of an odd width start at odd places
@pytest.mark.parametrize("output", OUTPUTS, ids=["fp32", "bf16"])
def test_the_result_goes_to_out_and_nowhere_else(backend, device, output, odd):
    """`out` is the middle third of the rows of a larger tensor."""
    arguments = make(Case(heads=HEADS[1], output=output), device).arguments
    wanted = block_mass(**arguments, backend=backend)
    *axes, rows, N = wanted.shape
    storage = torch.full((*axes, 3 * rows, N // 2 * 2 + 2 + odd), torch.nan, dtype=wanted.dtype, device=device)
    out = storage[..., rows : 2 * rows, :N]
    assert block_mass(**arguments, out=out, backend=backend) is out
    assert torch.equal(out, wanted)
    out.fill_(torch.nan)
    assert storage.isnan().all()


BAD = [
    pytest.param({"dtype": torch.float64}, ValueError, "cannot run this call: .*float64", id="fp64"),
    pytest.param({"queries": (1, 2, 4, 257)}, ValueError, "cannot run this call: .*257", id="head_dim"),
    pytest.param({"queries": (1, 2, 3, 8)}, ValueError, "queries: expected a multiple of Hkv=2 .* got Hq=3", id="heads"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(device, change, error, message):
    shape, dtype = change.get("queries", (1, 2, 4, 8)), change.get("dtype", torch.float32)
    with pytest.raises(error, match=message):
        block_mass(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(1, 40, 2, shape[3], dtype=dtype, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            block=2,
            scale=1.0,
            backend="triton",
        )


@on_gpu
@pytest.mark.parametrize("known", [False, True], ids=["computed", "known"])
def test_a_captured_call_follows_its_arguments(device, known):
    """One graph, replayed with other queries, heads and lengths."""
    static = make(Case(D=128, heads=HEADS[3], lengths=(3000, 3000), layout="head_major", known=known), device).arguments
    static["keys"].copy_(torch.randn(static["keys"].shape, device=device))
    block_mass(**static, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = block_mass(**static, backend="triton")
    for lengths, heads in [((3000, 700), (0, 1, 2)), ((17, 2000), (5, 6, 7)), ((0, 3000), (1, 4, 5)), ((1, 2999), (0, 3, 6))]:
        static["lengths"].copy_(torch.tensor(lengths))
        static["heads"].copy_(torch.tensor(heads))
        static["queries"].normal_()
        if known:
            static["logsumexp"].normal_(8, 1)
        graph.replay()
        assert torch.equal(result, block_mass(**static, backend="triton"))


@on_gpu
def test_offsets_beyond_31_bits(device, margin):
    """Four million tokens: 2.2 G elements of keys, and as many of the result. Compared in the last block."""
    block, Hq, D, length = 16, 32, 64, 2**22 + 24
    T = 16 * block
    N = length + T
    storage = torch.full((1, N, 1, 8, D), torch.nan, dtype=torch.bfloat16, device=device)
    keys = storage[:, :, :, 3]
    generator = torch.Generator(device).manual_seed(0)
    keys.copy_(torch.randn(keys.shape, generator=generator, device=device, dtype=torch.bfloat16))
    queries = (2 * torch.randn(1, T, Hq, D, generator=generator, device=device)).bfloat16()
    lengths, last = torch.tensor([length], device=device), torch.tensor([N - block], device=device)
    got = block_mass(queries, keys, lengths, block=block, scale=D**-0.5, dtype=torch.bfloat16, backend="triton")
    for h in (0, Hq - 1):
        one = queries[:, -block:, h : h + 1]
        exact, rounded = (masses(one.to(d), keys.to(d), last, block, D**-0.5)[0] for d in (torch.float64, one.dtype))
        margin(got[:, -1:, h : h + 1], rounded, exact)
