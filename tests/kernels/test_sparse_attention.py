"""sparse_attention kernels against a dense fp64 oracle, with every row that must not be read set to NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from outrider.ops import sparse_attention

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
KEEP = {"most": 0.7, "some": 0.1, "all": 1.0, "one": 0.0, "none": 0.0}  # share of the past that a list holds, or so
FIRST = "first"  # there are counts alone
if GPU:
    HEAD_DIMS = [64, 80, 96, 128, 256]
    HEADS = [(8, 8), (6, 2), (8, 2), (8, 1)]  # query heads, KV heads: groups of 1, 3, 4, 8
    QUERIES = [1, 5, 16]
    LENGTHS = [(0, 1, 33, 700), (4999, 64, 0), (2048,), (1023, 1025, 1, 3000), (129, 0, 5000)]
    LAYOUTS = ["plain", "head_major", "gaps", "token_kv", "head_token_kv", "pages_1", "pages_3", "pages_16", "pages_64"]
    WINDOWS = [None, 1, 3, 100, 1024, 4096]
else:
    HEAD_DIMS = [64, 24]
    HEADS = [(4, 2), (3, 1)]
    QUERIES = [1, 3]
    LENGTHS = [(0, 1, 75), (130, 0), (33,)]
    LAYOUTS = ["plain", "gaps", "head_token_kv", "pages_1", "pages_3"]
    WINDOWS = [None, 1, 3, 40, 1000]
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
    lists: str = "kv_head"
    keep: str = "some"
    window: int | None = None
    unlisted: bool = False  # a value stands for unlisted tokens

    def __str__(self) -> str:
        kinds = f"{NAMES[self.dtype]}_{NAMES[self.cache]}-D{self.D}-{self.heads[0]}q{self.heads[1]}kv-T{self.T}"
        name = f"{kinds}-{'_'.join(map(str, self.lengths))}-{self.layout}-{self.lists}-{self.window or self.keep}"
        return name + "-unlisted" * self.unlisted

    @property
    def owners(self) -> int:
        return {"none": 1, "shared": 1, "kv_head": self.heads[1], "query_head": self.heads[0]}[self.lists]


def matrix() -> list[Case]:
    """Every combination of dtypes, head dim, heads and queries; what else varies is drawn."""
    draw, flip = random.Random(0).choice, random.Random(1).choice
    return [
        Case(*dtypes, D, heads, T, draw(LENGTHS), draw(LAYOUTS), draw(LISTS), draw([*KEEP]), unlisted=flip([False, True]))
        for dtypes, D, heads, T in product(DTYPES, HEAD_DIMS, HEADS, QUERIES)
    ]


def dense_matrix() -> list[Case]:
    """Without lists: every combination of dtypes, head dim and heads; on a CPU the heads are drawn, too."""
    draw = random.Random(0).choice
    return [
        Case(*dtypes, D, heads or draw(HEADS), draw([1, 5, 16]), draw(LENGTHS), draw(LAYOUTS), "none", "all", draw(WINDOWS))
        for dtypes, D, heads, _ in product(DTYPES, HEAD_DIMS, HEADS if GPU else [None], range(3 if GPU else 1))
    ]


def first_matrix() -> list[Case]:
    """With counts alone: every combination of dtypes, head dim and kind of list."""
    draw = random.Random(0).choice
    return [
        Case(*dtypes, D, draw(HEADS), draw([1, 5, 16]), draw(LENGTHS), draw(LAYOUTS), lists, FIRST)
        for dtypes, D, lists in product(DTYPES, HEAD_DIMS if GPU else [draw(HEAD_DIMS)], LISTS)
    ]


@dataclass
class Problem:
    """Arguments of a call, with rows that no query may read set to NaN, and what is needed to judge the result."""

    arguments: dict
    exact: Tensor  # fp64
    rounded: Tensor  # PyTorch's own result in the dtype of the queries
    listed: Tensor  # [B, Hs, N]
    logsumexp: Tensor  # [B, Hq, T] fp64


def make(case: Case, device: torch.device, seed: int = 0) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    B, T, D, (Hq, Hkv), Hs = len(case.lengths), case.T, case.D, case.heads, case.owners
    N = max(case.lengths) + T + 3
    lengths = torch.tensor(case.lengths, device=device)
    position = torch.arange(N, device=device)
    past = position < lengths.view(B, 1, 1)
    draws = torch.rand(B, Hs, N, generator=generator, device=device)
    listed = (draws < KEEP.get(case.keep, 0)) & past
    if case.keep == "one":
        listed = past & (draws == draws.masked_fill(~past, -1).amax(-1, keepdim=True))
    if case.keep == FIRST:
        listed = past & (position < (lengths + 1).view(B, 1, 1) * (3 * draws[..., :1]).floor() / 2)  # none, half, all
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

    per_query_head = listed.repeat_interleave(Hq // Hs, 1)
    step = torch.arange(T, device=device).view(T, 1)
    tail = (position >= lengths.view(B, 1, 1, 1)) & (position <= lengths.view(B, 1, 1, 1) + step)
    visible = per_query_head.unsqueeze(2) | tail  # [B, Hq, T, N]
    if case.window is not None:
        visible &= position > lengths.view(B, 1, 1, 1) + step - case.window
    scale = D**-0.5
    exact, rounded, logsumexp = judge(queries, keys, values, scales, visible, scale)

    unread = ~visible.view(B, Hkv, -1, N).any(2).transpose(1, 2).unsqueeze(-1)  # [B, N, Hkv, 1]
    keys, values, page_table = lay_out(
        keys.masked_fill(unread, torch.nan), values.masked_fill(unread, torch.nan), lengths + T, case.layout, case.cache
    )
    arguments = {
        "queries": queries, "keys": keys, "values": values, "indices": indices, "counts": counts, "lengths": lengths,
        "scale": scale, "key_scale": scales[0], "value_scale": scales[1], "page_table": page_table,
    }  # fmt: skip
    if case.unlisted:
        value = torch.randn(Hkv, D, generator=generator, device=device)
        share = torch.rand(B, Hq, generator=generator, device=device)
        arguments |= {"unlisted_values": value, "unlisted_shares": share}
        exact = mix(exact, value, share)
        rounded = mix(rounded, value, share).to(case.dtype)
    if case.lists == "none":
        arguments |= {"indices": None, "counts": None, "window": case.window}
    if case.keep == FIRST:
        arguments["indices"] = None
    return Problem(arguments, exact, rounded, listed, logsumexp)


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
    return exact.transpose(1, 2), rounded.transpose(1, 2), logits.logsumexp(-1)


def mix(out: Tensor, value: Tensor, share: Tensor) -> Tensor:
    """`[B, T, Hq, D]` in fp64: outputs, with shares [B, Hq] of the values [Hkv, D]."""
    value = value.double().repeat_interleave(out.shape[2] // len(value), 0)
    return torch.lerp(out.double(), value.expand(out.shape), share.double()[:, None, :, None])


def lay_out(
    keys: Tensor, values: Tensor, ends: Tensor, layout: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Caches `[B, N, Hkv, D]` as views of storage whose other memory is NaN, and a page table with junk behind the ends."""
    B, N, Hkv, D = keys.shape
    device = keys.device
    if layout == "plain":
        return keys.to(dtype), values.to(dtype), None
    if layout == "head_major":
        return *(x.transpose(1, 2).contiguous().to(dtype).transpose(1, 2) for x in (keys, values)), None
    if layout == "gaps":  # between rows, heads and sequences; rows of an odd stride
        views = []
        for x in (keys, values):
            storage = torch.full((B + 1, N + 2, Hkv + 1, D + 3), torch.nan, device=device)
            storage[1:, 1:-1, :Hkv, 2:-1] = x
            views.append(storage.to(dtype)[1:, 1:-1, :Hkv, 2:-1])
        return *views, None
    if layout == "token_kv":
        storage = torch.stack([keys, values], 3).to(dtype)  # [B, N, Hkv, 2, D]
        return storage[:, :, :, 0], storage[:, :, :, 1], None
    if layout == "head_token_kv":
        storage = torch.stack([keys, values], 3).transpose(1, 2).contiguous().to(dtype)  # [B, Hkv, N, 2, D]
        return storage[..., 0, :].transpose(1, 2), storage[..., 1, :].transpose(1, 2), None
    page_size = int(layout.removeprefix("pages_"))
    P = -(-N // page_size)
    order = torch.randperm(B * P + 3, generator=torch.Generator().manual_seed(0))[: B * P].to(device)
    pages = []
    for x in (keys, values):
        padded = torch.full((B, P * page_size, Hkv, D), torch.nan, device=device)
        padded[:, :N] = x
        storage = torch.full((B * P + 3, page_size, Hkv, D), torch.nan, device=device)
        storage[order] = padded.view(B * P, page_size, Hkv, D)
        pages.append(storage.to(dtype))
    page = torch.arange(P, device=device)
    junk = torch.where(page % 2 == 0, -1, 2**31 - 1)
    return *pages, torch.where(page * page_size < ends.view(B, 1), order.view(B, P), junk).int()


@pytest.mark.parametrize("case", [*matrix(), *dense_matrix(), *first_matrix()], ids=str)
def test_error_is_at_most_twice_that_of_torch(backend, device, run_or_skip, margin, case):
    problem = make(case, device)
    got = run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend))
    assert got.dtype == case.dtype
    margin(got, problem.rounded, problem.exact)


SUMMED = {
    "lists": {"keep": "most", "unlisted": True},
    "query_heads": {"lists": "query_head", "layout": "pages_3"},
    "one_split": {"keep": "one"},
    "first": {"keep": FIRST, "layout": "pages_3"},
    "dense": DENSE,
    "window": DENSE | {"window": 40, "layout": "pages_3"},
}


@pytest.mark.parametrize(
    ("dtype", "cache", "form"),
    [
        *((*DTYPES[1], form) for form in SUMMED),
        *((*dtypes, form) for dtypes in (DTYPES[2], DTYPES[4]) for form in ("lists", "dense")),
    ],
    ids=lambda x: NAMES.get(x, x),
)
def test_logsumexp_is_that_of_what_a_query_reads(backend, device, run_or_skip, dtype, cache, form):
    """Of any strides; and asking for it changes no output."""
    problem = make(Case(dtype, cache, lengths=LENGTHS[0], **SUMMED[form]), device)
    plain = run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend))
    for strides in ("plain", "transposed"):
        filled = torch.full(problem.logsumexp.shape, torch.nan, device=device)
        if strides == "transposed":
            filled = filled.transpose(1, 2).contiguous().transpose(1, 2)
        got = sparse_attention(**problem.arguments, logsumexp=filled, backend=backend)
        torch.testing.assert_close(filled.double(), problem.logsumexp, rtol=1e-5, atol=1e-5)
        assert torch.equal(got, plain)


@pytest.mark.parametrize("lists", LISTS)
def test_two_runs_are_equal(backend, device, run_or_skip, lists):
    problem = make(Case(lengths=LENGTHS[1], lists=lists, keep="most"), device)
    first, second = (run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("plain", {"keep": "most"}),
        ("pages_3", {"keep": "most", "unlisted": True}),
        ("plain", DENSE),
        ("pages_3", DENSE | {"window": 40}),
    ],
    ids=["plain", "pages_3", "plain-dense", "pages_3-window"],
)
def test_a_sequence_in_a_ragged_batch_agrees_with_the_same_alone(backend, device, run_or_skip, margin, layout, form):
    problem = make(Case(lengths=LENGTHS[0], layout=layout, **form), device)
    together = run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend))
    cut = ["queries", "indices", "counts", "lengths", "unlisted_shares"] + (
        ["keys", "values"] if layout == "plain" else ["page_table"]
    )
    for b in range(len(together)):
        row = {name: x[b : b + 1] if name in cut and x is not None else x for name, x in problem.arguments.items()}
        alone = sparse_attention(**row, backend=backend)
        margin(alone, problem.rounded[b : b + 1], problem.exact[b : b + 1])
        torch.testing.assert_close(alone, together[b : b + 1], rtol=2**-7, atol=2**-7)  # splits and so roundings differ


@pytest.mark.parametrize("lists", LISTS)
def test_what_stands_for_unlisted_tokens_counts_by_its_share(backend, device, run_or_skip, lists):
    """A share of 0 changes no bit, a share of 1 leaves nothing else (fp16: the interpreter cuts bfloat16 off)."""
    arguments = make(Case(*DTYPES[1], lengths=LENGTHS[1], lists=lists, unlisted=True), device).arguments
    value, share = arguments["unlisted_values"], arguments["unlisted_shares"]
    plain = run_or_skip(
        lambda: sparse_attention(**(arguments | {"unlisted_values": None, "unlisted_shares": None}), backend=backend)
    )
    nothing = sparse_attention(**(arguments | {"unlisted_shares": torch.zeros_like(share)}), backend=backend)
    assert torch.equal(nothing, plain)
    alone = sparse_attention(**(arguments | {"unlisted_shares": torch.ones_like(share)}), backend=backend)
    wanted = value.repeat_interleave(plain.shape[2] // len(value), 0).to(plain.dtype)
    assert torch.equal(alone, wanted.expand(plain.shape))


@pytest.mark.parametrize("width", [0, 3], ids=["no_slots", "padded_slots"])
def test_empty_lists_leave_the_tail(backend, device, run_or_skip, margin, width):
    case = Case(keep="none", lengths=LENGTHS[0])
    problem = make(case, device)
    B, Hkv = len(case.lengths), case.heads[1]
    problem.arguments["indices"] = torch.full((B, Hkv, width), -1, dtype=torch.int32, device=device)
    got = run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend))
    margin(got, problem.rounded, problem.exact)
    values = problem.arguments["values"]
    first = torch.stack([values[b, length] for b, length in enumerate(case.lengths)])
    torch.testing.assert_close(got[:, 0], first.repeat_interleave(case.heads[0] // Hkv, 1), rtol=2**-7, atol=0)


def test_logits_that_rise_along_the_list(backend, device, run_or_skip, margin):
    """Each token outweighs those before: what was kept of them must become nothing."""
    case = Case(lengths=(1000,), keep="all")
    arguments, end = make(case, device).arguments, 1000 + case.T
    arguments["queries"][..., 0] = 16
    arguments["keys"][0, :end, :, 0] = torch.arange(end, device=device).view(-1, 1) / 4
    got = run_or_skip(lambda: sparse_attention(**arguments, backend=backend))
    visible = torch.arange(end, device=device) <= 1000 + torch.arange(case.T, device=device).view(-1, 1)
    keys, values = (arguments[name][:, :end].float() for name in ("keys", "values"))
    visible = visible.expand(1, case.heads[0], case.T, end)
    exact, rounded, _ = judge(arguments["queries"], keys, values, [None, None], visible, arguments["scale"])
    margin(got, rounded, exact)


def test_without_lists_is_with_every_token_listed(backend, device, run_or_skip):
    arguments = make(Case(lengths=LENGTHS[0], layout="pages_3", keep="all"), device).arguments
    listed = run_or_skip(lambda: sparse_attention(**arguments, backend=backend))
    dense = sparse_attention(**(arguments | {"indices": None, "counts": None}), backend=backend)
    torch.testing.assert_close(dense, listed, rtol=2**-7, atol=2**-8)


@pytest.mark.parametrize("form", [{}, DENSE], ids=["lists", "dense"])
def test_later_tail_rows_do_not_reach_earlier_queries(backend, device, run_or_skip, form):
    case = Case(lengths=LENGTHS[0], T=3, **form)
    problem = make(case, device)
    clean = run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend))
    for b, length in enumerate(case.lengths):
        problem.arguments["keys"][b, length + 2 :] = torch.nan
        problem.arguments["values"][b, length + 2 :] = torch.inf
    dirty = sparse_attention(**problem.arguments, backend=backend)
    # A kernel may add such rows one by one, and so in another order: equal to a rounding.
    torch.testing.assert_close(dirty[:, :2].double(), clean[:, :2].double(), rtol=2**-6, atol=2**-8)
    assert not dirty[:, 2].isfinite().any(), "what a query does see is not hidden"


@pytest.mark.parametrize("form", [{}, DENSE], ids=["lists", "dense"])
def test_a_value_that_is_not_finite_reaches_the_queries_that_see_it(backend, device, run_or_skip, form):
    case = Case(lengths=(9,), T=3, **form)
    problem = make(case, device)
    problem.arguments["values"][0, 10, 0, 2] = torch.nan  # seen by the queries 1 and 2 of KV head 0
    got = run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend))
    group = case.heads[0] // case.heads[1]
    assert got[0, 1:, :group, 2].isnan().all()
    assert got.isnan().sum() == 2 * group


def test_arguments_are_left_as_they_were(backend, device, run_or_skip):
    arguments = make(Case(layout="pages_3"), device).arguments
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    run_or_skip(lambda: sparse_attention(**arguments, backend=backend))
    for name, x in before.items():
        torch.testing.assert_close(arguments[name], x, rtol=0, atol=0, equal_nan=True)


def test_queries_and_lists_may_have_any_strides(backend, device, run_or_skip):
    problem = make(Case(lengths=LENGTHS[0], keep="most", unlisted=True), device)
    plain = run_or_skip(lambda: sparse_attention(**problem.arguments, backend=backend))
    strided = dict(problem.arguments)
    for name in ("queries", "indices", "counts", "lengths", "unlisted_values", "unlisted_shares"):
        strided[name] = torch.stack([x := problem.arguments[name], x], -1)[..., 0]
        assert not strided[name].is_contiguous()
    strided["queries"] = strided["queries"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sparse_attention(**strided, backend=backend), plain)


BAD = [
    pytest.param({"queries": (1, 2, 4, 8), "dtype": torch.float64}, ValueError, "cannot run this call: .*float64", id="fp64"),
    pytest.param({"queries": (1, 17, 4, 8)}, ValueError, "cannot run this call: .*T=17", id="queries"),
    pytest.param({"queries": (1, 2, 4, 257)}, ValueError, "cannot run this call: .*257", id="head_dim"),
    pytest.param({"queries": (1, 2, 3, 8)}, ValueError, "queries: expected a multiple of Hkv=2 .* got Hq=3", id="heads"),
    pytest.param({"lists": (1, 3, 2)}, ValueError, "counts: expected Hs of 1, Hkv=2 or Hq=4 lists, got Hs=3", id="owners"),
    pytest.param({"lists": (1, 2, 41)}, ValueError, "indices: expected lists of at most N=40 tokens, got", id="width"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments_are_named(device, change, error, message):
    shape, dtype = change.get("queries", (1, 2, 4, 8)), change.get("dtype", torch.float32)
    lists = change.get("lists", (1, 2, 4))
    cache = torch.zeros(1, 40, 2, shape[3], dtype=dtype, device=device)
    with pytest.raises(error, match=message):
        sparse_attention(
            torch.zeros(shape, dtype=dtype, device=device),
            cache,
            cache,
            torch.zeros(lists, dtype=torch.int32, device=device),
            torch.zeros(lists[:2], dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            scale=1.0,
            backend="triton",
        )


CHANGES = [
    {"lengths": (3000, 700)},
    {"lengths": (17, 2000), "keep": "most"},
    {"lengths": (3000, 5), "keep": "none"},
    {"lengths": (0, 3000), "keep": "all"},
]
FORMS = {
    "lists": {"keep": "all", "unlisted": True},
    "first": {"keep": FIRST},
    "dense": DENSE,
    "window": DENSE | {"window": 500},
}


@on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["head_token_kv", "pages_16"])
def test_a_captured_call_follows_its_arguments(backend, device, run_or_skip, layout, form):
    """One graph, replayed with other queries, caches, lists, counts and lengths."""
    case = Case(D=128, lengths=(3000, 3000), layout=layout, **FORMS[form])
    problem = make(case, device)
    static = problem.arguments | {"logsumexp": torch.empty(problem.logsumexp.shape, device=device)}
    for name in ("keys", "values"):
        static[name].copy_(torch.randn(static[name].shape, device=device))
    run_or_skip(lambda: sparse_attention(**static, backend=backend))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sparse_attention(**static, backend=backend)
    for seed, change in enumerate(CHANGES):
        other = make(Case(**vars(case) | change | (FORMS[form] if form == "first" else {})), device, seed).arguments
        for name in ("queries", "lengths", *(["counts"] if form == "first" else [])):
            static[name].copy_(other[name])
        if form == "lists":
            for name in ("counts", "unlisted_values", "unlisted_shares"):
                static[name].copy_(other[name])
            static["indices"].fill_(-1)[..., : other["indices"].shape[2]] = other["indices"]
        graph.replay()
        sums = static["logsumexp"].clone()
        assert torch.equal(result, sparse_attention(**static, backend=backend))
        assert torch.equal(sums, static["logsumexp"])


@on_gpu
@pytest.mark.parametrize("form", ["lists", "window"])
def test_offsets_beyond_31_bits(backend, device, run_or_skip, margin, form):
    """Two sequences of a million tokens: 4.6 G elements, all NaN but the listed ones, or those in a window."""
    B, T, Hq, Hkv, D, M, length = 2, 5, 32, 8, 128, 1500, 1_100_000
    N = length + T
    storage = torch.full((B, N, Hkv, 2, D), torch.nan, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(0)
    indices = torch.rand(B, Hkv, length - 1, generator=generator, device=device).topk(M).indices
    indices[..., 0] = length - 1
    indices = indices.sort(-1).values
    if form == "window":  # of M tokens before the first query
        indices = torch.arange(length - M, length, device=device).expand(B, Hkv, M)
    tail = torch.arange(length, N, device=device).expand(B, Hkv, T)
    read = torch.cat([indices, tail], -1)  # [B, Hkv, M + T]
    at = (torch.arange(B, device=device).view(B, 1, 1), read, torch.arange(Hkv, device=device).view(Hkv, 1))
    storage[at] = torch.randn(B, Hkv, M + T, 2, D, generator=generator, device=device).bfloat16()
    queries = torch.randn(B, T, Hq, D, generator=generator, device=device).bfloat16()
    arguments = {
        "queries": queries, "keys": storage[:, :, :, 0], "values": storage[:, :, :, 1], "indices": indices.int(),
        "counts": torch.full((B, Hkv), M, dtype=torch.int32, device=device),
        "lengths": torch.full((B,), length, device=device), "scale": D**-0.5,
    }  # fmt: skip
    if form == "window":
        arguments |= {"indices": None, "counts": None, "window": M + 1}
    got = run_or_skip(lambda: sparse_attention(**arguments, backend=backend))
    keys, values = (storage[at][..., i, :].transpose(1, 2).float() for i in (0, 1))
    visible = torch.ones(B, Hq, T, M + T, dtype=torch.bool, device=device)
    visible[..., M:] = torch.ones(T, T, device=device).tril().bool()
    if form == "window":
        visible[..., :T] = torch.ones(T, T, device=device).triu().bool()
    exact, rounded, _ = judge(queries, keys, values, [None, None], visible, D**-0.5)
    margin(got, rounded, exact)
