"""span_mass kernels against a dense fp64 oracle, with every key that must not be used set to NaN."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.ops import span_mass

pytest.importorskip("triton", reason="kernels need triton")

GPU = torch.cuda.is_available()
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP8: "fp8"}
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP8)]  # queries, keys
if GPU:
    HEAD_DIMS, HEADS = [64, 80, 128, 256], [(8, 8), (8, 2), (3, 1)]
    CHUNKS = [(1, 128), (300, 128), (777, 200), (512, 512)]  # tokens, block
    LENGTHS = [(0, 1, 33, 700), (4999, 64, 0), (1023, 1025, 3000), (129, 20000)]
    SPANS = [(128, 16), (16, 16), (4096, 16), (128, 32)]  # tokens, those of a page
else:
    HEAD_DIMS, HEADS = [64, 24], [(4, 2), (3, 1)]
    CHUNKS = [(1, 4), (70, 32), (75, 70)]
    LENGTHS = [(0, 1, 75), (150, 0), (1100,)]
    SPANS = [(32, 16), (8, 8), (1024, 8)]


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype = BF16
    cache: torch.dtype = BF16
    D: int = HEAD_DIMS[0]
    heads: tuple[int, int] = HEADS[0]
    chunk: tuple[int, int] = CHUNKS[1]
    lengths: tuple[int, ...] = LENGTHS[0]
    span: tuple[int, int] = SPANS[0]
    gaps: bool = False  # between the keys of tokens and of heads

    def __str__(self) -> str:
        kinds = f"{NAMES[self.dtype]}_{NAMES[self.cache]}-D{self.D}-{self.heads[0]}q{self.heads[1]}kv"
        shape = f"T{self.chunk[0]}_{self.chunk[1]}-{'_'.join(map(str, self.lengths))}-span{self.span[0]}_{self.span[1]}"
        return f"{kinds}-{shape}" + "-gaps" * self.gaps


def matrix() -> list[Case]:
    """Every combination of dtypes, head dim and chunk; what else varies is drawn."""
    draw = random.Random(0).choice
    return [
        Case(*dtypes, D, draw(HEADS), chunk, draw(LENGTHS), draw(SPANS), draw([False, True]))
        for dtypes, D, chunk in product(DTYPES, HEAD_DIMS, CHUNKS)
    ]


def make(case: Case, device: torch.device) -> tuple[dict, Tensor, Tensor]:
    """Arguments of a call, the exact result, and that of PyTorch in the dtype of the queries."""
    generator = torch.Generator(device).manual_seed(0)
    B, (T, block), D, (Hq, Hkv), (span, page) = len(case.lengths), case.chunk, case.D, case.heads, case.span
    N = max(case.lengths) + T + 3
    queries = (2 * torch.randn(B, T, Hq, D, generator=generator, device=device)).to(case.dtype)
    keys = torch.randn(B, N, Hkv, D, generator=generator, device=device).to(case.cache).float()
    key_scale = 0.5 + torch.rand(Hkv, generator=generator, device=device) if case.cache == FP8 else None
    scaled = keys.double() * (1 if key_scale is None else key_scale.double().view(-1, 1))
    stored = keys.clone()
    for b, length in enumerate(case.lengths):
        stored[b, (length + (T - 1) // block * block) // page * page :] = torch.nan
    if case.gaps:
        storage = torch.full((B, N + 1, Hkv + 1, D), torch.nan, device=device).to(case.cache)
        storage[:, 1:, :Hkv] = stored.to(case.cache)
        stored = storage[:, 1:, :Hkv]
    arguments = {
        "queries": queries, "keys": stored.to(case.cache), "lengths": torch.tensor(case.lengths, device=device), "block": block,
        "span": span, "page": page, "scale": D**-0.5, "key_scale": key_scale,
    }  # fmt: skip
    exact, rounded = (masses(queries.to(d), scaled.to(d), case) for d in (torch.float64, case.dtype))
    return arguments, exact, rounded


def masses(queries: Tensor, keys: Tensor, case: Case) -> Tensor:
    """`[B, NB, Hq, NS]` in the dtype of the arguments, the sums in fp32 or fp64."""
    (T, block), (Hq, Hkv), (span, page) = case.chunk, case.heads, case.span
    N, wide = keys.shape[1], torch.promote_types(queries.dtype, torch.float32)
    result = torch.zeros(len(keys), -(-T // block), Hq, -(-N // span), dtype=wide, device=keys.device)
    for b, length in enumerate(case.lengths):
        for i, first in enumerate(range(0, T, block)):
            pages = (length + first) // page
            if not pages:
                continue
            rows = keys[b, : pages * page].unflatten(0, (-1, page)).repeat_interleave(Hq // Hkv, 2)  # [pages, page, Hq, D]
            q = queries[b, first : first + block].transpose(0, 1)  # [Hq, block, D]
            low, high = rows.amin(1).permute(1, 2, 0), rows.amax(1).permute(1, 2, 0)
            bounds = (q.clamp(min=0) @ high + q.clamp(max=0) @ low) * case.D**-0.5
            mass = pad(bounds.softmax(-1).to(wide).mean(1), (0, -pages % (span // page)))
            result[b, i, :, : -(-pages * page // span)] = mass.unflatten(-1, (-1, span // page)).sum(-1)
    return result


@pytest.fixture(scope="module", params=["triton", "reference"])
def backend(request) -> str:
    return request.param


CASES = [("triton", case) for case in matrix()] + [("reference", case) for case in matrix()[::5]]


@pytest.mark.parametrize(("backend", "case"), CASES, ids=lambda x: str(x), indirect=["backend"])
def test_error_is_at_most_twice_that_of_torch(backend, device, run_or_skip, margin, case):
    arguments, exact, rounded = make(case, device)
    got = run_or_skip(lambda: span_mass(**arguments, backend=backend))
    assert got.dtype == torch.float32 and got.shape == exact.shape
    margin(got, rounded, exact)
    assert ((got == 0) | (exact > 0)).all()


def test_two_runs_are_equal(backend, device):
    arguments, _, _ = make(Case(lengths=LENGTHS[1]), device)
    first, second = (span_mass(**arguments, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_a_sequence_in_a_ragged_batch_equals_the_same_alone(backend, device):
    arguments, _, _ = make(Case(), device)
    together = span_mass(**arguments, backend=backend)
    for b in range(len(together)):
        cut = {name: arguments[name][b : b + 1] for name in ("queries", "keys", "lengths")}
        torch.testing.assert_close(span_mass(**(arguments | cut), backend=backend), together[b : b + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("extra", [-1, 0, 1], ids=["a_page_less", "whole_tiles", "a_page_more"])
@pytest.mark.parametrize("span", [1, 32, 64, 128], ids="span_of_{}_pages".format)
def test_pages_around_those_of_a_tile(backend, device, margin, span, extra):
    """Two tiles of 64 pages: the last has all its pages, or lacks one, or there is a third with a single page."""
    arguments, exact, rounded = make(Case(D=200, heads=(2, 1), chunk=(2, 2), lengths=(128 + extra,), span=(span, 1)), device)
    margin(span_mass(**arguments, backend=backend), rounded, exact)


def test_blocks_agree_with_the_chunk_cut_at_their_starts(backend, device):
    """Each block as a chunk of its own: what makes prefill in chunks of any size the same."""
    case = Case(lengths=LENGTHS[1])
    (T, block), (arguments, _, _) = case.chunk, make(case, device)
    whole = span_mass(**arguments, backend=backend)
    for i, first in enumerate(range(0, T, block)):
        part = {"queries": arguments["queries"][:, first : first + block], "lengths": arguments["lengths"] + first}
        torch.testing.assert_close(span_mass(**(arguments | part), backend=backend)[:, 0], whole[:, i], rtol=1e-6, atol=0)


def test_keys_from_a_block_on_do_not_reach_it(backend, device):
    case = Case()
    (_, block), (_, page), (arguments, _, _) = case.chunk, case.span, make(case, device)
    clean = span_mass(**arguments, backend=backend)
    for b, length in enumerate(case.lengths):
        arguments["keys"][b, (length + block) // page * page :] = 100
    changed = span_mass(**arguments, backend=backend)
    assert torch.equal(changed[:, :2], clean[:, :2])
    assert not torch.equal(changed[:, 2], clean[:, 2]), "what is before a block is not hidden"


def test_without_scale_all_pages_weigh_the_same(backend, device):
    case = Case(lengths=LENGTHS[1])
    arguments = make(case, device)[0] | {"scale": 0.0}
    got = span_mass(**arguments, backend=backend)
    span, page = case.span
    for i in range(got.shape[1]):
        pages = (case.lengths[0] + i * case.chunk[1]) // page
        whole = torch.full_like(got[0, i, :, : pages * page // span], span / page / pages)
        torch.testing.assert_close(got[0, i, :, : pages * page // span], whole)


def test_a_page_longer_than_the_cache_leaves_nothing(backend, device):
    arguments = make(Case(lengths=(5,)), device)[0] | {"page": 1024, "span": 1024}
    got = span_mass(**arguments, backend=backend)
    assert got.shape[-1] == 1 and (got == 0).all()


def test_arguments_are_left_as_they_were(backend, device):
    arguments, _, _ = make(Case(cache=FP8), device)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    span_mass(**arguments, backend=backend)
    for name, x in before.items():
        assert torch.equal(arguments[name].float().nan_to_num(9), x.float().nan_to_num(9))


def test_arguments_may_have_any_strides(backend, device):
    arguments, _, _ = make(Case(cache=FP8, heads=HEADS[1]), device)
    strided = dict(arguments)
    for name in ("queries", "lengths", "key_scale"):
        strided[name] = torch.stack([x := arguments[name], x], -1)[..., 0]
    assert not strided["queries"].is_contiguous()
    plain = span_mass(**arguments, backend=backend)
    torch.testing.assert_close(span_mass(**strided, backend=backend), plain, rtol=1e-6, atol=0)


BAD = [
    pytest.param({"dtype": torch.float64}, "cannot run this call: .*float64", id="fp64"),
    pytest.param({"D": 257}, "cannot run this call: .*257", id="head_dim"),
    pytest.param({"span": 12}, "cannot run this call: spans of 3 pages", id="pages"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(device, change, message):
    wanted = {"dtype": FP32, "D": 8, "span": 8} | change
    queries, keys = (torch.zeros(1, n, h, wanted["D"], dtype=wanted["dtype"], device=device) for n, h in ((2, 4), (40, 2)))
    lengths = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=message):
        span_mass(queries, keys, lengths, block=2, span=wanted["span"], page=4, scale=1.0, backend="triton")


def test_large_logits(backend, device, margin):
    """Votes for one page alone, and denominators far beyond the range of fp32."""
    arguments, exact, _ = make(Case(lengths=LENGTHS[1]), device)
    arguments["queries"] = arguments["queries"] * 40
    case, keys = Case(lengths=LENGTHS[1]), arguments["keys"].nan_to_num()
    exact, rounded = (masses(arguments["queries"].to(d), keys.to(d), case) for d in (torch.float64, BF16))
    margin(span_mass(**arguments, backend=backend), rounded, exact)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_call_follows_its_arguments(device):
    """One graph, replayed with other queries and lengths."""
    arguments, _, _ = make(Case(lengths=(3000, 3000)), device)
    arguments["keys"].copy_(torch.randn(arguments["keys"].shape, device=device))
    span_mass(**arguments, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = span_mass(**arguments, backend="triton")
    for lengths in ((3000, 700), (17, 2000), (0, 3000)):
        arguments["lengths"].copy_(torch.tensor(lengths))
        arguments["queries"].normal_()
        graph.replay()
        assert torch.equal(result, span_mass(**arguments, backend="triton"))
