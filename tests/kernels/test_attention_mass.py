"""attention_mass kernels against a dense fp64 oracle, with every key that must not be read set to NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from outrider.ops import attention_mass

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
REDUCTIONS = ["mean", "max", "none"]
OUTPUTS = [None, torch.bfloat16]
if GPU:
    HEAD_DIMS = [64, 80, 96, 128, 256]
    HEADS = [(8, 8), (6, 2), (8, 2), (8, 1)]  # query heads, KV heads: groups of 1, 3, 4, 8
    QUERIES = [1, 5, 16]
    LENGTHS = [(0, 1, 33, 700), (4999, 64, 0), (2048,), (1023, 1025, 1, 3000), (129, 0, 20000)]
    LAYOUTS = ["plain", "head_major", "gaps", "token_kv", "head_token_kv", "pages_1", "pages_3", "pages_16", "pages_64"]
else:
    HEAD_DIMS = [64, 24]
    HEADS = [(4, 2), (3, 1)]
    QUERIES = [1, 3]
    LENGTHS = [(0, 1, 75), (300, 0), (128,)]
    LAYOUTS = ["plain", "gaps", "head_token_kv", "pages_1", "pages_3"]
GROUPS = [None, [[0], [1], [1]], [[2, 0], [1, 1], [0, 2], [2, 1]]]
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype = torch.bfloat16
    D: int = HEAD_DIMS[0]
    heads: tuple[int, int] = HEADS[1]
    T: int = QUERIES[1]
    lengths: tuple[int, ...] = LENGTHS[0]
    layout: str = "plain"
    reduce: str = "mean"
    groups: int = 0  # index into GROUPS
    output: torch.dtype | None = None

    def __str__(self) -> str:
        kinds = f"{NAMES[self.dtype]}_{NAMES[self.cache]}-D{self.D}-{self.heads[0]}q{self.heads[1]}kv-T{self.T}"
        rest = f"{self.reduce}-groups{self.groups}-{NAMES[self.output or torch.float32]}"
        return f"{kinds}-{'_'.join(map(str, self.lengths))}-{self.layout}-{rest}"


def matrix() -> list[Case]:
    """Every combination of dtypes, head dim, heads and queries; what else varies is drawn."""
    draw = random.Random(0).choice
    return [
        Case(*dtypes, D, heads, T, draw(LENGTHS), draw(LAYOUTS), draw(REDUCTIONS), draw(range(len(GROUPS))), draw(OUTPUTS))
        for dtypes, D, heads, T in product(DTYPES, HEAD_DIMS, HEADS, QUERIES)
    ]


@dataclass
class Problem:
    """Arguments of a call, with keys that no query may read set to NaN, and what is needed to judge the result."""

    arguments: dict
    N: int  # without what a page table rounds up
    exact: Tensor  # fp64
    rounded: Tensor  # softmax of a product in the dtype of the queries


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    B, T, D, (Hq, Hkv) = len(case.lengths), case.T, case.D, case.heads
    N = max(case.lengths) + T + 3
    lengths = torch.tensor(case.lengths, device=device)
    queries = (2 * torch.randn(B, T, Hq, D, generator=generator, device=device)).to(case.dtype)
    keys = torch.randn(B, N, Hkv, D, generator=generator, device=device).to(case.cache).float()
    key_scale = 0.5 + torch.rand(Hkv, generator=generator, device=device) if case.cache == FP8 else None
    heads = None if GROUPS[case.groups] is None else torch.tensor(GROUPS[case.groups], device=device)
    scaled = keys.double() * (1 if key_scale is None else key_scale.double().view(-1, 1))
    exact, rounded = (
        masses(queries.to(dtype), scaled.to(dtype), lengths, D**-0.5, case.reduce, heads)
        for dtype in (torch.float64, case.dtype)
    )
    behind = torch.arange(N, device=device) >= lengths.view(-1, 1) + T
    keys, page_table = lay_out(keys.masked_fill(behind[..., None, None], torch.nan), lengths + T, case.layout, case.cache)
    arguments = {
        "queries": queries, "keys": keys, "lengths": lengths, "scale": D**-0.5, "reduce": case.reduce, "heads": heads,
        "key_scale": key_scale, "page_table": page_table, "dtype": case.output,
    }  # fmt: skip
    return Problem(arguments, N, exact, rounded)


def masses(queries: Tensor, keys: Tensor, lengths: Tensor, scale: float, reduce: str, heads: Tensor | None) -> Tensor:
    """`[B, R, N]` or `[B, T, R, N]`: logits and softmax in the dtype of the arguments, what follows in fp32 or fp64."""
    B, T, Hq, _ = queries.shape
    N = keys.shape[1]
    k = keys.transpose(1, 2).repeat_interleave(Hq // keys.shape[2], 1)
    logits = queries.transpose(1, 2) @ k.transpose(-1, -2) * scale  # [B, Hq, T, N]
    position = torch.arange(N, device=keys.device)
    length = lengths.view(B, 1, 1, 1)
    seen = position <= length + torch.arange(T, device=keys.device).view(T, 1)
    mass = logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(position >= length, 0)
    mass = mass.to(torch.promote_types(mass.dtype, torch.float32))
    mass = {"mean": mass.mean(2), "max": mass.amax(2), "none": mass.transpose(1, 2)}[reduce]
    return mass if heads is None else mass[..., heads, :].sum(-2)


def lay_out(keys: Tensor, ends: Tensor, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The cache `[B, N, Hkv, D]` as a view of storage whose other memory is NaN, and a page table with junk behind the ends."""
    B, N, Hkv, D = keys.shape
    device = keys.device
    if layout == "plain":
        return keys.to(dtype), None
    if layout == "head_major":
        return keys.transpose(1, 2).contiguous().to(dtype).transpose(1, 2), None
    if layout == "gaps":  # between rows, heads and sequences; rows of an odd stride
        storage = torch.full((B + 1, N + 2, Hkv + 1, D + 3), torch.nan, device=device)
        storage[1:, 1:-1, :Hkv, 2:-1] = keys
        return storage.to(dtype)[1:, 1:-1, :Hkv, 2:-1], None
    values = torch.full_like(keys, torch.nan)
    if layout == "token_kv":
        return torch.stack([keys, values], 3).to(dtype)[:, :, :, 0], None  # of [B, N, Hkv, 2, D]
    if layout == "head_token_kv":
        storage = torch.stack([keys, values], 3).transpose(1, 2).contiguous().to(dtype)  # [B, Hkv, N, 2, D]
        return storage[..., 0, :].transpose(1, 2), None
    page_size = int(layout.removeprefix("pages_"))
    P = -(-N // page_size)
    order = torch.randperm(B * P + 3, generator=torch.Generator().manual_seed(0))[: B * P].to(device)
    padded = torch.full((B, P * page_size, Hkv, D), torch.nan, device=device)
    padded[:, :N] = keys
    storage = torch.full((B * P + 3, page_size, Hkv, D), torch.nan, device=device)
    storage[order] = padded.view(B * P, page_size, Hkv, D)
    page = torch.arange(P, device=device)
    junk = torch.where(page % 2 == 0, -1, 2**31 - 1)
    return storage.to(dtype), torch.where(page * page_size < ends.view(B, 1), order.view(B, P), junk).int()


@pytest.mark.parametrize("case", matrix(), ids=str)
def test_error_is_at_most_twice_that_of_torch(backend, device, run_or_skip, margin, case):
    problem = make(case, device)
    got = run_or_skip(lambda: attention_mass(**problem.arguments, backend=backend))
    assert got.dtype == (case.output or torch.float32)
    assert not got[..., problem.N :].any(), "N is rounded up to pages; what is behind the last row has no mass"
    for b, length in enumerate(case.lengths):
        assert (got[b, ..., length:] == 0).all()
    margin(got[..., : problem.N], problem.rounded, problem.exact)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_two_runs_are_equal(backend, device, run_or_skip, reduce):
    problem = make(Case(lengths=LENGTHS[1], reduce=reduce), device)
    first, second = (run_or_skip(lambda: attention_mass(**problem.arguments, backend=backend)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", ["plain", "pages_3"])
def test_a_sequence_in_a_ragged_batch_agrees_with_the_same_alone(backend, device, run_or_skip, margin, layout):
    problem = make(Case(lengths=LENGTHS[0], layout=layout), device)
    together = run_or_skip(lambda: attention_mass(**problem.arguments, backend=backend))
    cut = ["queries", "lengths", "keys" if layout == "plain" else "page_table"]
    for b in range(len(together)):
        row = {name: x[b : b + 1] if name in cut else x for name, x in problem.arguments.items()}
        alone = attention_mass(**row, backend=backend)
        margin(alone[..., : problem.N], problem.rounded[b : b + 1], problem.exact[b : b + 1])
        torch.testing.assert_close(alone, together[b : b + 1], rtol=2**-7, atol=1e-6)


def test_small_masses_are_kept_beside_a_large_one(backend, device, run_or_skip):
    """One token holds nearly all; the others, 2 ** -23 of it and less, are still told apart."""
    length = 100
    keys = torch.zeros(1, length + 1, 1, HEAD_DIMS[0], device=device)
    keys[0, 0, 0, 0], keys[0, 1:50, 0, 0] = 16, -1
    queries = torch.zeros(1, 1, 1, HEAD_DIMS[0], device=device)
    queries[..., 0] = 1
    for dtype in (torch.bfloat16, torch.float16):
        arguments = {"queries": queries.to(dtype), "keys": keys.to(dtype), "lengths": torch.tensor([length], device=device)}
        got = run_or_skip(lambda arguments=arguments: attention_mass(**arguments, scale=1.0, backend=backend))
        exact = masses(queries.double(), keys.double(), arguments["lengths"], 1.0, "mean", None)
        torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=0)


def test_logits_that_rise_along_the_cache(backend, device, run_or_skip, margin):
    """Each key outweighs those before: what was kept of them must become nothing."""
    case = Case(lengths=(1000,))
    arguments, end = make(case, device).arguments, 1000 + case.T
    arguments["queries"][..., 0] = 16
    arguments["keys"][0, :end, :, 0] = torch.arange(end, device=device).view(-1, 1) / 4
    got = run_or_skip(lambda: attention_mass(**arguments, backend=backend))
    queries, keys, lengths = arguments["queries"], arguments["keys"][:, :end], arguments["lengths"]
    exact, rounded = (
        masses(queries.to(dtype), keys.to(dtype), lengths, arguments["scale"], case.reduce, None)
        for dtype in (torch.float64, case.dtype)
    )
    margin(got[..., :end], rounded, exact)


def test_later_tail_keys_do_not_reach_earlier_queries(backend, device, run_or_skip):
    case = Case(lengths=LENGTHS[0], T=3, reduce="none")
    problem = make(case, device)
    clean = run_or_skip(lambda: attention_mass(**problem.arguments, backend=backend))
    for b, length in enumerate(case.lengths):
        problem.arguments["keys"][b, length + 2 :] = torch.nan
    dirty = attention_mass(**problem.arguments, backend=backend)
    assert torch.equal(dirty[:, :2], clean[:, :2])
    assert dirty[1, 2, ..., : case.lengths[1]].isnan().all(), "what a query does see is not hidden"


@pytest.mark.parametrize("heads", [(0, 2), (2, 0)], ids=["no_rows", "no_heads"])
def test_empty_groups_of_heads(backend, device, run_or_skip, heads):
    arguments = make(Case(), device).arguments | {"heads": torch.zeros(heads, dtype=torch.int64, device=device)}
    got = run_or_skip(lambda: attention_mass(**arguments, backend=backend))
    assert got.shape[1] == heads[0]
    assert not got.any()


def test_arguments_are_left_as_they_were(backend, device, run_or_skip):
    arguments = make(Case(layout="pages_3", groups=2), device).arguments
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    run_or_skip(lambda: attention_mass(**arguments, backend=backend))
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True)


def test_queries_and_lengths_may_have_any_strides(backend, device, run_or_skip):
    problem = make(Case(lengths=LENGTHS[0], groups=2), device)
    plain = run_or_skip(lambda: attention_mass(**problem.arguments, backend=backend))
    strided = dict(problem.arguments)
    for name in ("queries", "lengths", "heads"):
        strided[name] = torch.stack([x := problem.arguments[name], x], -1)[..., 0]
        assert not strided[name].is_contiguous()
    assert torch.equal(attention_mass(**strided, backend=backend), plain)


@pytest.mark.parametrize("odd", [0, 1])  # rows of an odd width start at odd places
@pytest.mark.parametrize(("reduce", "groups"), [("mean", 0), ("max", 0), ("none", 0), ("mean", 2)])
@pytest.mark.parametrize(("layout", "output"), [("plain", None), ("pages_3", torch.bfloat16)])
def test_the_result_goes_to_out_and_nowhere_else(backend, device, run_or_skip, layout, output, reduce, groups, odd):
    """`out` is the middle third of the rows of a larger tensor."""
    arguments = make(Case(lengths=LENGTHS[0], layout=layout, reduce=reduce, groups=groups, output=output), device).arguments
    for chosen in ("reference", backend):
        wanted = run_or_skip(lambda chosen=chosen: attention_mass(**arguments, backend=chosen))
        *axes, rows, N = wanted.shape
        storage = torch.full((*axes, 3 * rows, N // 2 * 2 + 2 + odd), torch.nan, dtype=wanted.dtype, device=device)
        out = storage[..., rows : 2 * rows, :N]
        got = run_or_skip(lambda chosen=chosen, out=out: attention_mass(**arguments, out=out, backend=chosen))
        assert got is out
        assert torch.equal(out, wanted)
        out.fill_(torch.nan)
        assert storage.isnan().all()


BAD = [
    pytest.param({"dtype": torch.float64}, ValueError, "cannot run this call: .*float64", id="fp64"),
    pytest.param({"queries": (1, 17, 4, 8)}, ValueError, "cannot run this call: .*T=17", id="queries"),
    pytest.param({"queries": (1, 2, 4, 257)}, ValueError, "cannot run this call: .*257", id="head_dim"),
    pytest.param({"queries": (1, 2, 3, 8)}, ValueError, "queries: expected a multiple of Hkv=2 .* got Hq=3", id="heads"),
    pytest.param({"reduce": "sum"}, ValueError, "reduce: expected one of 'mean', 'max', 'none', got 'sum'", id="reduce"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(device, change, error, message):
    shape, dtype = change.get("queries", (1, 2, 4, 8)), change.get("dtype", torch.float32)
    with pytest.raises(error, match=message):
        attention_mass(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(1, 40, 2, shape[3], dtype=dtype, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            scale=1.0,
            reduce=change.get("reduce", "mean"),
            backend="triton",
        )


@on_gpu
@pytest.mark.parametrize("layout", ["head_major", "pages_16"])
def test_a_captured_call_follows_its_arguments(backend, device, run_or_skip, layout):
    """One graph, replayed with other queries, groups of heads and lengths."""
    static = make(Case(D=128, lengths=(3000, 3000), layout=layout, groups=2), device).arguments
    static["keys"].copy_(torch.randn(static["keys"].shape, device=device))
    run_or_skip(lambda: attention_mass(**static, backend=backend))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attention_mass(**static, backend=backend)
    for lengths in [(3000, 700), (17, 2000), (0, 3000), (1, 2999)]:
        static["lengths"].copy_(torch.tensor(lengths))
        static["queries"].normal_()
        static["heads"].copy_(static["heads"].flip(0).clone())
        graph.replay()
        assert torch.equal(result, attention_mass(**static, backend=backend))


@on_gpu
def test_offsets_beyond_31_bits(backend, device, run_or_skip, margin):
    """Four million tokens: 2.2 G elements of keys, and as many between the two launches."""
    T, Hq, D, length = 16, 32, 64, 2**22 + 24
    N = length + T
    storage = torch.full((1, N, 1, 8, D), torch.nan, dtype=torch.bfloat16, device=device)
    keys = storage[:, :, :, 3]
    generator = torch.Generator(device).manual_seed(0)
    keys.copy_(torch.randn(keys.shape, generator=generator, device=device, dtype=torch.bfloat16))
    queries = (2 * torch.randn(1, T, Hq, D, generator=generator, device=device)).bfloat16()
    lengths = torch.tensor([length], device=device)
    got = run_or_skip(lambda: attention_mass(queries, keys, lengths, scale=D**-0.5, backend=backend))
    for h in (0, Hq - 1):
        one = queries[:, :, h : h + 1]
        exact, rounded = (masses(one.to(d), keys.to(d), lengths, D**-0.5, "mean", None) for d in (torch.float64, one.dtype))
        margin(got[:, h : h + 1], rounded, exact)
