"""chunk_attention kernels against a dense fp64 oracle, with every row that must not be read set to NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from outrider.ops import chunk_attention

pytest.importorskip("triton", reason="kernels need triton")

GPU = torch.cuda.is_available()
FP8 = torch.float8_e4m3fn
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", FP8: "fp8"}
DTYPES = [  # queries, cache
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, FP8),
    (torch.float16, FP8),
]
LISTS = ["kv_head", "query_head", "shared"]
DENSE = {"lists": "none", "keep": "all"}
KEEP = {"most": 0.7, "some": 0.1, "all": 1.0, "one": 0.0, "none": 0.0}  # share of what lies before a block that a list holds
if GPU:
    HEAD_DIMS = [64, 80, 96, 128, 256]
    HEADS = [(8, 8), (6, 2), (8, 2), (8, 1)]  # query heads, KV heads: groups of 1, 3, 4, 8
    CHUNKS = [(1, 128), (300, 128), (256, 64), (129, 17), (600, 512)]  # tokens, block
    LENGTHS = [(0, 1, 33, 700), (4999, 64, 0), (2048,), (1023, 1025, 1, 3000), (129, 0, 5000)]
    LAYOUTS = ["plain", "head_major", "gaps", "token_kv", "head_token_kv"]
    WINDOWS = [None, 1, 3, 100, 128, 1024, 4096]
else:
    HEAD_DIMS = [64, 24]
    HEADS = [(4, 2), (3, 1)]
    CHUNKS = [(1, 4), (21, 8), (40, 32)]
    LENGTHS = [(0, 1, 75), (150, 0), (33,)]
    LAYOUTS = ["plain", "gaps", "head_token_kv"]
    WINDOWS = [None, 1, 3, 40, 1000]
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = torch.bfloat16
    cache: torch.dtype = torch.bfloat16
    D: int = HEAD_DIMS[0]
    heads: tuple[int, int] = HEADS[1]
    chunk: tuple[int, int] = CHUNKS[1]
    lengths: tuple[int, ...] = LENGTHS[0]
    layout: str = "plain"
    lists: str = "kv_head"
    keep: str = "some"
    window: int | None = None

    def __str__(self) -> str:
        kinds = f"{NAMES[self.dtype]}_{NAMES[self.cache]}-D{self.D}-{self.heads[0]}q{self.heads[1]}kv-T{self.chunk[0]}"
        return (
            f"{kinds}_{self.chunk[1]}-{'_'.join(map(str, self.lengths))}-{self.layout}-{self.lists}-{self.window or self.keep}"
        )

    @property
    def owners(self) -> int:
        return {"none": 1, "shared": 1, "kv_head": self.heads[1], "query_head": self.heads[0]}[self.lists]


def matrix() -> list[Case]:
    """Every combination of dtypes, head dim, heads and chunk; what else varies is drawn."""
    draw = random.Random(0).choice
    return [
        Case(*dtypes, D, heads, chunk, draw(LENGTHS), draw(LAYOUTS), draw(LISTS), draw([*KEEP]))
        for dtypes, D, heads, chunk in product(DTYPES, HEAD_DIMS, HEADS, CHUNKS)
    ]


def dense_matrix() -> list[Case]:
    """Without lists: every combination of dtypes, head dim and window."""
    draw = random.Random(0).choice
    return [
        Case(*dtypes, D, draw(HEADS), draw(CHUNKS), draw(LENGTHS), draw(LAYOUTS), "none", "all", window)
        for dtypes, D, window in product(DTYPES, HEAD_DIMS, WINDOWS)
    ]


@dataclass
class Problem:
    """Arguments of a call, with rows that no query may read set to NaN, and what is needed to judge the result."""

    arguments: dict
    exact: Tensor  # fp64
    rounded: Tensor  # PyTorch's own result in the dtype of the queries
    logsumexp: Tensor  # [B, Hq, T] fp64


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    (T, block), B, D, (Hq, Hkv), Hs = case.chunk, len(case.lengths), case.D, case.heads, case.owners
    N, NB = max(case.lengths) + T + 3, -(-T // block)
    lengths = torch.tensor(case.lengths, device=device)
    position = torch.arange(N, device=device)
    starts = lengths.view(B, 1, 1, 1) + block * torch.arange(NB, device=device).view(NB, 1, 1)
    before = position < starts  # [B, NB, 1, N]
    draws = torch.rand(B, NB, Hs, N, generator=generator, device=device)
    listed = (draws < KEEP[case.keep]) & before
    if case.keep == "one":
        listed = before & (draws == draws.masked_fill(~before, -1).amax(-1, keepdim=True))
    counts = listed.sum(-1).int()
    M = min(int(counts.max()) + (2 if case.keep != "none" else 0), N)
    indices = torch.where(listed, position, N).sort(-1).values[..., :M].int()
    slot = torch.arange(M, device=device)
    indices = torch.where(slot < counts.unsqueeze(-1), indices, torch.where(slot % 2 == 0, -1, 2**31 - 1)).int()

    queries = (2 * torch.randn(B, T, Hq, D, generator=generator, device=device)).to(case.dtype)
    keys, values = (torch.randn(B, N, Hkv, D, generator=generator, device=device).to(case.cache).float() for _ in range(2))
    scales = [None, None]
    if case.cache == FP8:
        scales = [0.5 + torch.rand(Hkv, generator=generator, device=device) for _ in range(2)]

    step = torch.arange(T, device=device)
    own = (position >= starts) & (position < starts + block)  # [B, NB, 1, N]
    visible = (listed | own).repeat_interleave(Hq // Hs, 2)[:, step // block].transpose(1, 2)  # [B, Hq, T, N]
    visible = visible & (position <= lengths.view(B, 1, 1, 1) + step.view(T, 1))
    if case.window is not None:
        visible &= position > lengths.view(B, 1, 1, 1) + step.view(T, 1) - case.window
    scale = D**-0.5
    exact, rounded, logsumexp = judge(queries, keys, values, scales, visible, scale)

    unread = ~visible.reshape(B, Hkv, -1, N).any(2).transpose(1, 2).unsqueeze(-1)  # [B, N, Hkv, 1]
    keys, values = lay_out(keys.masked_fill(unread, torch.nan), values.masked_fill(unread, torch.nan), case.layout, case.cache)
    arguments = {
        "queries": queries, "keys": keys, "values": values, "indices": indices, "counts": counts, "lengths": lengths,
        "block": block, "scale": scale, "key_scale": scales[0], "value_scale": scales[1],
    }  # fmt: skip
    if case.lists == "none":
        arguments |= {"indices": None, "counts": None, "window": case.window}
    return Problem(arguments, exact, rounded, logsumexp)


def judge(
    queries: Tensor, keys: Tensor, values: Tensor, scales: list, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs in fp64, and as PyTorch computes them in the dtype of the queries; logsumexp. `visible` is `[B, Hq, T, N]`."""
    group = queries.shape[2] // keys.shape[2]
    q = queries.transpose(1, 2)
    k, v = (x.double() * (1 if s is None else s.double().view(-1, 1)) for x, s in zip((keys, values), scales, strict=True))
    k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    logits = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    exact = logits.softmax(-1) @ v
    rounded = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=visible, scale=scale)
    if q.dtype == torch.float32:  # what it errs by is one draw among orders of its sums: the worse of two
        q, k = q.flip(-1), k.flip(-1)
        other = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=visible, scale=scale)
        rounded = torch.where((other - exact).abs() > (rounded - exact).abs(), other, rounded)
    return exact.transpose(1, 2), rounded.transpose(1, 2), logits.logsumexp(-1)


def lay_out(keys: Tensor, values: Tensor, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Caches `[B, N, Hkv, D]` as views of storage whose other memory is NaN."""
    B, N, Hkv, D = keys.shape
    if layout == "plain":
        return keys.to(dtype), values.to(dtype)
    if layout == "head_major":
        keys, values = (x.transpose(1, 2).contiguous().to(dtype).transpose(1, 2) for x in (keys, values))
        return keys, values
    if layout == "gaps":  # between rows, heads and sequences; rows of an odd stride
        views = []
        for x in (keys, values):
            storage = torch.full((B + 1, N + 2, Hkv + 1, D + 3), torch.nan, device=keys.device)
            storage[1:, 1:-1, :Hkv, 2:-1] = x
            views.append(storage.to(dtype)[1:, 1:-1, :Hkv, 2:-1])
        return views[0], views[1]
    storage = torch.stack([keys, values], 3)  # token_kv: [B, N, Hkv, 2, D]
    if layout == "head_token_kv":
        storage = storage.transpose(1, 2).contiguous().transpose(1, 2)
    storage = storage.to(dtype)
    return storage[:, :, :, 0], storage[:, :, :, 1]


MATRIX = [*matrix(), *dense_matrix()]
CASES = [(name, case) for name in ("triton", "cuda") for case in MATRIX]
CASES += [("reference", case) for case in MATRIX[::7]]  # prime to the number of chunks, so that it meets them all


@pytest.mark.parametrize(("backend", "case"), CASES, ids=str, indirect=["backend"])
def test_error_is_at_most_twice_that_of_torch(backend, device, run_or_skip, margin, case):
    problem = make(case, device)
    got = run_or_skip(lambda: chunk_attention(**problem.arguments, backend=backend))
    assert got.dtype == case.dtype
    margin(got, problem.rounded, problem.exact)


@pytest.mark.parametrize("form", [{"keep": "all"}, DENSE, DENSE | {"window": 66}], ids=["lists", "dense", "window"])
def test_lengths_around_that_of_a_tile(backend, device, run_or_skip, margin, form):
    """Of 64 or 128 tokens: the tile in which masking begins is a whole one, lacks a token, or has one more."""
    lengths = (*range(60, 67), *range(124, 131))
    problem = make(Case(torch.float16, torch.float16, heads=(2, 1), chunk=(3, 2), lengths=lengths, **form), device)
    got = run_or_skip(lambda: chunk_attention(**problem.arguments, backend=backend))
    margin(got, problem.rounded, problem.exact)


FORMS = {"kv_head": {"keep": "most"}, "query_head": {"lists": "query_head"}, "shared": {"lists": "shared", "keep": "most"}}
FORMS |= {"dense": DENSE, "window": DENSE | {"window": 40}}


@pytest.mark.parametrize("form", FORMS)
def test_logsumexp_is_that_of_what_a_query_reads(backend, device, run_or_skip, form):
    """Of any strides; and asking for it changes no output."""
    problem = make(Case(torch.float16, torch.float16, lengths=LENGTHS[1], **FORMS[form]), device)
    plain = run_or_skip(lambda: chunk_attention(**problem.arguments, backend=backend))
    for strides in ("plain", "transposed"):
        filled = torch.full(problem.logsumexp.shape, torch.nan, device=device)
        if strides == "transposed":
            filled = filled.transpose(1, 2).contiguous().transpose(1, 2)
        got = chunk_attention(**problem.arguments, logsumexp=filled, backend=backend)
        torch.testing.assert_close(filled.double(), problem.logsumexp, rtol=1e-5, atol=1e-5)
        assert torch.equal(got, plain)


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_are_equal(backend, device, run_or_skip, form):
    problem = make(Case(lengths=LENGTHS[1], **FORMS[form]), device)
    first, second = (run_or_skip(lambda: chunk_attention(**problem.arguments, backend=backend)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(backend, device, run_or_skip, form):
    arguments = make(Case(lengths=LENGTHS[0], **FORMS[form]), device).arguments
    together = run_or_skip(lambda: chunk_attention(**arguments, backend=backend))
    for b in range(len(together)):
        row = {name: x[b : b + 1] if isinstance(x, Tensor) else x for name, x in arguments.items()}
        assert torch.equal(chunk_attention(**row, backend=backend), together[b : b + 1])


@pytest.mark.parametrize("width", [0, 3], ids=["no_slots", "padded_slots"])
def test_empty_lists_leave_the_block(backend, device, run_or_skip, margin, width):
    case = Case(keep="none", lengths=LENGTHS[0])
    problem = make(case, device)
    (T, block), (Hq, Hkv) = case.chunk, case.heads
    problem.arguments["indices"] = torch.full(
        (len(case.lengths), -(-T // block), Hkv, width), -1, dtype=torch.int32, device=device
    )
    got = run_or_skip(lambda: chunk_attention(**problem.arguments, backend=backend))
    margin(got, problem.rounded, problem.exact)
    for i in range(-(-T // block)):  # the first query of a block sees itself alone
        own = torch.stack([problem.arguments["values"][b, length + i * block] for b, length in enumerate(case.lengths)])
        torch.testing.assert_close(got[:, i * block], own.repeat_interleave(Hq // Hkv, 1), rtol=2**-7, atol=0)


@pytest.mark.parametrize("form", [{"keep": "all"}, DENSE, DENSE | {"window": 30}], ids=["lists", "dense", "window"])
@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
def test_logits_that_rise_or_fall_along_the_past(backend, device, run_or_skip, margin, form, rising):
    """Each token outweighs those before it, or those behind: in whatever order they come, what was kept must become nothing."""
    case = Case(lengths=(LENGTHS[1][0],), **form)
    arguments = make(case, device).arguments
    T, length = case.chunk[0], case.lengths[0]
    end = length + T
    ramp = torch.arange(end, device=device) / 4 * (1 if rising else -1)
    arguments["queries"][..., 0] = 16
    keys, values = (torch.randn(1, end, case.heads[1], case.D, device=device).bfloat16() for _ in range(2))
    keys[..., 0] = ramp.view(-1, 1)
    got = run_or_skip(lambda: chunk_attention(**(arguments | {"keys": keys, "values": values}), backend=backend))
    position, step = torch.arange(end, device=device), torch.arange(T, device=device).view(T, 1)
    visible = position <= length + step
    if case.window is not None:
        visible &= position > length + step - case.window
    visible = visible.expand(1, case.heads[0], T, end)
    exact, rounded, _ = judge(arguments["queries"], keys.float(), values.float(), [None, None], visible, arguments["scale"])
    margin(got, rounded, exact)


def test_without_lists_is_with_every_token_listed(backend, device, run_or_skip):
    """Law 1: dense and sparse are the same where nothing is left out."""
    arguments = make(Case(lengths=LENGTHS[0], keep="all"), device).arguments
    listed = run_or_skip(lambda: chunk_attention(**arguments, backend=backend))
    dense = chunk_attention(**(arguments | {"indices": None, "counts": None}), backend=backend)
    torch.testing.assert_close(dense, listed, rtol=2**-7, atol=2**-8)


def test_blocks_agree_with_the_chunk_cut_at_their_starts(backend, device, run_or_skip, margin):
    """Each block as a chunk of its own, with its list: what makes prefill in chunks of any size the same."""
    case = Case(lengths=LENGTHS[1], keep="most")
    problem = make(case, device)
    whole = run_or_skip(lambda: chunk_attention(**problem.arguments, backend=backend))
    T, block = case.chunk
    for i, first in enumerate(range(0, T, block)):
        part = slice(first, first + block)
        own = {name: problem.arguments[name][:, i : i + 1] for name in ("indices", "counts")}
        own |= {"queries": problem.arguments["queries"][:, part], "lengths": problem.arguments["lengths"] + first}
        alone = chunk_attention(**(problem.arguments | own), backend=backend)
        margin(alone, problem.rounded[:, part], problem.exact[:, part])
        torch.testing.assert_close(alone, whole[:, part], rtol=2**-7, atol=2**-7)


def test_arguments_are_left_as_they_were(backend, device, run_or_skip):
    arguments = make(Case(), device).arguments
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    run_or_skip(lambda: chunk_attention(**arguments, backend=backend))
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True)


def test_queries_and_lists_may_have_any_strides(backend, device, run_or_skip):
    problem = make(Case(lengths=LENGTHS[0], keep="most"), device)
    plain = run_or_skip(lambda: chunk_attention(**problem.arguments, backend=backend))
    strided = dict(problem.arguments)
    for name in ("queries", "indices", "counts", "lengths"):
        strided[name] = torch.stack([x := problem.arguments[name], x], -1)[..., 0]
        assert not strided[name].is_contiguous()
    strided["queries"] = strided["queries"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(chunk_attention(**strided, backend=backend), plain)


def test_a_block_larger_than_the_chunk_is_the_chunk(backend, device, run_or_skip):
    case = Case(chunk=(CHUNKS[1][0], CHUNKS[1][0]), keep="most")
    arguments = make(case, device).arguments
    plain = run_or_skip(lambda: chunk_attention(**arguments, backend=backend))
    assert torch.equal(chunk_attention(**(arguments | {"block": 10_000}), backend=backend), plain)


BAD = [
    pytest.param({"queries": (1, 2, 4, 8), "dtype": torch.float64}, "cannot run this call: .*float64", id="fp64"),
    pytest.param({"queries": (1, 2, 4, 257)}, "cannot run this call: .*257", id="head_dim"),
    pytest.param({"scale": -1.0}, "cannot run this call: scale -1.0", id="scale"),
    pytest.param({"queries": (1, 2, 3, 8)}, "queries: expected a multiple of Hkv=2 .* got Hq=3", id="heads"),
    pytest.param({"queries": (1, 5, 4, 8)}, "indices: expected .* NB=2", id="blocks"),
    pytest.param({"lists": (1, 1, 3, 2)}, "indices: expected Hs of 1, Hkv=2 or Hq=4 lists, got Hs=3", id="owners"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(device, change, message):
    shape, dtype = change.get("queries", (1, 2, 4, 8)), change.get("dtype", torch.float32)
    lists = change.get("lists", (1, 1, 2, 4))
    cache = torch.zeros(1, 40, 2, shape[3], dtype=dtype, device=device)
    with pytest.raises(ValueError, match=message):
        chunk_attention(
            torch.zeros(shape, dtype=dtype, device=device),
            cache,
            cache,
            torch.zeros(lists, dtype=torch.int32, device=device),
            torch.zeros(lists[:3], dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            block=4,
            scale=change.get("scale", 1.0),
            backend="triton",
        )


CHANGES = [{"lengths": (3000, 700)}, {"lengths": (17, 2000), "keep": "most"}, {"lengths": (0, 3000), "keep": "none"}]


@on_gpu
@pytest.mark.parametrize("form", ["kv_head", "dense", "window"])
def test_a_captured_call_follows_its_arguments(backend, device, run_or_skip, form):
    """One graph, replayed with other queries, caches, lists, counts and lengths."""
    case = Case(D=128, lengths=(3000, 3000), layout="head_token_kv", **(FORMS[form] | {"keep": "all"}))
    problem = make(case, device)
    static = problem.arguments | {"logsumexp": torch.empty(problem.logsumexp.shape, device=device)}
    for name in ("keys", "values"):
        static[name].copy_(torch.randn(static[name].shape, device=device))
    run_or_skip(lambda: chunk_attention(**static, backend=backend))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chunk_attention(**static, backend=backend)
    for seed, change in enumerate(CHANGES):
        other = make(Case(**vars(case) | change | ({} if form == "kv_head" else {"keep": "all"})), device, seed).arguments
        for name in ("queries", "lengths"):
            static[name].copy_(other[name])
        if form == "kv_head":
            static["counts"].copy_(other["counts"])
            static["indices"].fill_(-1)[..., : other["indices"].shape[3]] = other["indices"]
        graph.replay()
        sums = static["logsumexp"].clone()
        assert torch.equal(result, chunk_attention(**static, backend=backend))
        assert torch.equal(sums, static["logsumexp"])


@on_gpu
@pytest.mark.parametrize("form", ["lists", "window"])
def test_offsets_beyond_31_bits(backend, device, run_or_skip, margin, form):
    """A million tokens, their rows 2,048 elements apart: all NaN but the chunk, and what is listed or in a window."""
    T, block, Hq, Hkv, D, M, length = 160, 128, 32, 8, 128, 1500, 1_100_000
    N = length + T
    storage = torch.full((1, N, Hkv, 2, D), torch.nan, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.rand(1, 2, Hkv, length - 1, generator=generator, device=device).topk(M).indices
    indices[..., 0] = length - 1
    indices = indices.sort(-1).values
    if form == "window":  # of M tokens before the first query
        storage[:, length - M : length] = torch.randn(1, M, Hkv, 2, D, generator=generator, device=device).bfloat16()
    else:
        head = torch.arange(Hkv, device=device).view(Hkv, 1)
        for i in range(2):
            rows = torch.randn(Hkv, M, 2, D, generator=generator, device=device).bfloat16()
            storage[0, indices[0, i], head] = rows
    storage[:, length:] = torch.randn(1, T, Hkv, 2, D, generator=generator, device=device).bfloat16()
    queries = torch.randn(1, T, Hq, D, generator=generator, device=device).bfloat16()
    arguments = {
        "queries": queries, "keys": storage[:, :, :, 0], "values": storage[:, :, :, 1], "indices": indices.int(),
        "counts": torch.full((1, 2, Hkv), M, dtype=torch.int32, device=device),
        "lengths": torch.full((1,), length, device=device), "block": block, "scale": D**-0.5,
    }  # fmt: skip
    if form == "window":
        arguments |= {"indices": None, "counts": None, "window": M + 1}
    got = run_or_skip(lambda: chunk_attention(**arguments, backend=backend))
    for i, first in enumerate((0, block) if form == "lists" else (0,)):
        last = min(first + block, T) if form == "lists" else T
        n = last - first
        if form == "lists":
            own = torch.arange(length + first, length + last, device=device).expand(Hkv, n)
            read = torch.cat([indices[0, i], own], -1)  # [Hkv, M + n]
        else:
            read = torch.arange(length - M, length + n, device=device).expand(Hkv, -1)
        rows = storage[0, read, torch.arange(Hkv, device=device).view(Hkv, 1)].float()  # [Hkv, tokens, 2, D]
        keys, values = (rows[:, :, j].transpose(0, 1).unsqueeze(0) for j in (0, 1))
        visible = torch.ones(1, Hq, n, M + n, dtype=torch.bool, device=device).tril(M)
        if form == "window":
            visible = visible.triu()
        exact, rounded, _ = judge(queries[:, first:last], keys, values, [None, None], visible, D**-0.5)
        margin(got[:, first:last], rounded, exact)
