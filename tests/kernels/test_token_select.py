"""token_select kernels against an oracle that sorts 16-bit keys; tiny shapes in the interpreter, all of them on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.ops import TokenLists, token_select

GPU = torch.cuda.is_available()
DTYPES = [
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.float32, id="fp32"),
]
MERGED = [(1, "mean"), (2, "max"), (3, "mean"), (4, "mean")] + ([(4, "max"), (9, "mean"), (32, "max")] if GPU else [])
LONG = 5000  # more than one tile of every kernel, at an odd place
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture
def check(backend, run_or_skip) -> Callable[..., TokenLists]:
    """Runs the kernel and checks every list against the oracle."""

    def run(scores: Tensor, lengths: Tensor, sources: Tensor, **options) -> TokenLists:
        lists = run_or_skip(lambda: token_select(scores, lengths, sources, backend=backend, **options))
        verify(lists, scores, lengths, sources, **options)
        return lists

    return run


def verify(
    lists: TokenLists,
    scores: Tensor,
    lengths: Tensor,
    sources: Tensor,
    *,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    merge: str = "mean",
    sinks: int = 0,
    recent: int = 0,
    width: int | None = None,
) -> None:
    (Lt, Hs, G), B = sources.shape, len(lengths)
    indices, counts = lists
    assert indices.dtype == counts.dtype == torch.int32
    assert counts.shape == (Lt, B, Hs)
    assert indices.shape[:-1] == counts.shape
    if width is not None:
        assert indices.shape[-1] == width
    used = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    assert (indices.masked_fill(used, -1) == -1).all()

    exact = scores.dtype == torch.bfloat16 and G == 1
    for layer in range(Lt):
        for b, n in enumerate(lengths.tolist()):
            for h in range(Hs):
                row = merge_rows(scores[b, sources[layer, h], :n], merge)
                got = indices[layer, b, h, : counts[layer, b, h]].long()
                k, p = (budget_of(x, layer, b, h) for x in (top_k, top_p))
                check_list(got, row, k=k, p=p, sinks=sinks, recent=recent, width=width, exact=exact)


def budget_of(budget: Tensor | float | None, layer: int, b: int, h: int) -> float | None:
    if not isinstance(budget, Tensor):
        return budget
    return budget[(layer, b, h) if budget.dim() == 3 else b].item()


def merge_rows(rows: Tensor, merge: str) -> Tensor:
    """`[n]` float32 from `[G, n]` scores."""
    rows = torch.where(rows > 0, rows, 0).float()
    merged = rows[0]
    for row in rows[1:]:
        merged = merged + row if merge == "mean" else merged.maximum(row)
    return merged / len(rows) if merge == "mean" else merged


def check_list(
    got: Tensor, row: Tensor, *, k: int | None, p: float | None, sinks: int, recent: int, width: int | None, exact: bool
) -> None:
    """Forced tokens, then the others by key from the highest down, by position among equals; as many as the budget asks for."""
    n = len(row)
    key = row.view(torch.int32) >> 16
    position = torch.arange(n, device=row.device)
    is_forced = (position < sinks) | (position >= n - recent)
    forced, others = position[is_forced], position[~is_forced]
    order = others[key[others].sort(descending=True, stable=True).indices]

    extra = smallest(key, forced, order, p, exact) if k is None else max(min(k, n) - len(forced), 0)
    room = n if width is None else width
    cut = len(forced) + extra > room
    extra = min(extra, max(room - len(forced), 0))
    if p is not None and not exact and not cut:  # a kernel that is less cautious and still right may keep fewer
        kept = len(got) - len(forced)
        assert kept <= extra
        assert row[got].double().sum() >= (min(p, 1) - 1e-12) * row.double().sum()
        extra = kept
    expected = torch.cat([forced[:room], order[:extra]]).sort().values
    assert torch.equal(got, expected)


def smallest(key: Tensor, forced: Tensor, order: Tensor, p: float, exact: bool) -> int:
    """How many of `order` a top-p list needs beside the forced tokens.

    Where keys round the scores, kept ones may be as small as their keys and dropped ones as large as the next key.
    """
    if p >= 1:
        return len(order)
    value = (key << 16).view(torch.float32).double()
    held = value[forced].sum()
    mass = torch.cat([held.new_zeros(1), value[order].cumsum(0)])  # of the first 0, 1, .. tokens
    if exact:
        enough = mass >= p * (held + mass[-1]) - held
    else:
        enough = (held + mass) * (1 - p) >= p * (mass[-1] - mass) * (1 + 2**-7) * (1 + 1e-12)
    enough[int((value[order] > 0).sum())] = True  # zeros add no mass
    return int(enough.int().argmax())


def random_scores(kind: str, B: int, R: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(S + R)
    normal = torch.randn(B, R, S, generator=generator, device=device)
    uniform = torch.rand(B, R, S, generator=generator, device=device)
    if kind == "peaked":
        return (8 * normal).softmax(-1).to(dtype)
    if kind == "softmax":
        return (2 * normal).softmax(-1).to(dtype)
    if kind == "flat":
        return (0.01 + 1e-4 * uniform).to(dtype)
    if kind == "equal":
        return torch.full_like(normal, 0.001).to(dtype)
    if kind == "zeros":
        return torch.zeros_like(normal).to(dtype)
    if kind == "one_huge":
        x = uniform.to(dtype)
        x[..., S // 2] = 6e4
        return x
    if kind == "ties":
        return (uniform * 4).floor().div(64).to(dtype)
    if kind == "denormal":  # of bfloat16, the smallest there are
        return (uniform * 200).to(torch.int16).view(torch.bfloat16).to(dtype)
    assert kind == "dirty"
    x = uniform.to(dtype)
    for junk, share in ((torch.nan, 0.1), (-torch.inf, 0.2), (-1.0, 0.5), (-0.0, 0.6)):
        x = torch.where((uniform > share) & (uniform < share + 0.05), junk, x)
    return x


def rows_of(device: torch.device, Lt: int, Hs: int, G: int, R: int) -> Tensor:
    return torch.randint(0, R, (Lt, Hs, G), generator=torch.Generator().manual_seed(G)).to(device)


@pytest.mark.parametrize(("G", "merge"), MERGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k(check, device, dtype, G, merge):
    scores = random_scores("softmax", 3, 5, LONG, dtype, device)
    lengths = torch.tensor([LONG, 1, 333], device=device)
    ks = torch.tensor([2001, 0, 100], device=device, dtype=torch.int32 if G == 1 else torch.int64)
    check(scores, lengths, rows_of(device, 1, 1, G, 5), top_k=ks, sinks=4, recent=16, merge=merge, width=LONG)
    if GPU:
        check(scores, lengths, rows_of(device, 2, 1, G, 5), top_k=101, merge=merge)


@pytest.mark.parametrize(("G", "merge"), MERGED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_p(check, device, dtype, G, merge):
    scores = random_scores("softmax", 3, 5, LONG, dtype, device)
    lengths = torch.tensor([LONG, 1, 333], device=device)
    ps = torch.tensor([0.95, 1.0625, 0.5], device=device, dtype=torch.float32 if G == 1 else torch.float64)
    check(scores, lengths, rows_of(device, 1, 1, G, 5), top_p=ps, sinks=4, recent=16, merge=merge, width=LONG)
    if GPU:
        check(scores, lengths, rows_of(device, 2, 1, G, 5), top_p=0.9, merge=merge)


@pytest.mark.parametrize("k", [0, 1, 5, 2047, LONG - 1, LONG, LONG + 7])
def test_any_k(check, device, k):
    scores = random_scores("softmax", 1, 1, LONG, torch.bfloat16, device)
    lengths = torch.tensor([LONG], device=device, dtype=torch.int32)
    check(scores, lengths, rows_of(device, 1, 1, 1, 1), top_k=k)
    check(scores, lengths, rows_of(device, 1, 1, 1, 1), top_k=torch.tensor([k], device=device), width=LONG, recent=3)


def test_negative_k_is_zero(check, device):
    scores = random_scores("softmax", 2, 1, 40, torch.bfloat16, device)
    ks = torch.tensor([-(2**40), -1], device=device)
    check(scores, torch.tensor([40, 40], device=device), rows_of(device, 1, 1, 1, 1), top_k=ks, recent=2, width=9)


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.5, 0.95, 0.999999, 1.0, 1.5])
@pytest.mark.parametrize("kind", ["peaked", "flat", "equal"])
def test_any_p(check, device, kind, p):
    scores = random_scores(kind, 1, 1, 3001, torch.bfloat16, device)
    check(scores, torch.tensor([3001], device=device), rows_of(device, 1, 1, 1, 1), top_p=p)


@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "zeros", "one_huge", "ties", "denormal", "dirty"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_of_rows(check, device, dtype, kind):
    scores = random_scores(kind, 1, 2, 1500, dtype, device)
    lengths, sources = torch.tensor([1499], device=device), rows_of(device, 1, 1, 1, 2)
    check(scores, lengths, sources, top_k=750, sinks=1)
    if kind != "denormal" or dtype != torch.float32:
        check(scores, lengths, sources, top_p=0.75, recent=2)


def test_extremes_are_told_apart(check, device):
    tiny, huge = 2**-133, 3.3e38  # the smallest and nearly the largest number of 8 bits
    scores = torch.tensor([[[0.0, tiny, 2 * tiny, 1.0, huge, torch.inf]]], device=device)
    for k in range(7):
        got = check(scores, torch.tensor([6], device=device), rows_of(device, 1, 1, 1, 1), top_k=k)
        assert got.indices.tolist() == [[[list(range(6 - k, 6))]]]


def test_sums_beyond_float32(check, device):
    """Each row adds up to more than the largest float32, and merging overflows to infinity."""
    scores = torch.full((1, 2, 64), 3e38, dtype=torch.bfloat16, device=device)
    lengths = torch.tensor([64], device=device)
    check(scores, lengths, torch.tensor([[[0]]], device=device), top_p=0.5)
    check(scores, lengths, torch.tensor([[[0, 1]]], device=device), top_k=5)


@pytest.mark.parametrize("forced", [(0, 0), (1, 0), (0, 1), (4, 64), (300, 200), (500, 500), (10**12, 0), (0, 10**12)], ids=str)
def test_sinks_and_recent(check, device, forced):
    sinks, recent = forced
    scores = random_scores("softmax", 3, 1, 600, torch.bfloat16, device)
    lengths = torch.tensor([600, 2, 0], device=device)
    check(scores, lengths, rows_of(device, 1, 1, 1, 1), top_k=100, sinks=sinks, recent=recent, width=600)
    check(scores, lengths, rows_of(device, 1, 1, 1, 1), top_p=0.7, sinks=sinks, recent=recent)


@pytest.mark.parametrize("budget", [{"top_k": 90}, {"top_p": 0.9}, {"top_p": 1.0}], ids=str)
@pytest.mark.parametrize("width", [0, 1, 20, 50, 1500, 2500])
def test_width(check, device, budget, width):
    """Unused slots are -1; a list that is too long keeps its best tokens, forced ones first."""
    scores = random_scores("softmax", 2, 2, 1500, torch.bfloat16, device)
    lengths = torch.tensor([1500, 30], device=device)
    check(scores, lengths, rows_of(device, 1, 1, 1, 2), width=width, sinks=4, recent=24, **budget)


@pytest.mark.parametrize("budget", [{"top_k": 50}, {"top_p": 0.6}], ids=str)
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e4, -1.0])
def test_scores_behind_the_length_are_ignored(check, device, junk, budget):
    scores = random_scores("softmax", 1, 2, 1500, torch.bfloat16, device)
    scores[..., 777:] = junk
    check(scores, torch.tensor([777], device=device), rows_of(device, 1, 1, 2, 2), **budget)


@pytest.mark.parametrize("budget", [{"top_k": 31}, {"top_p": 0.8}], ids=str)
def test_layers_and_ragged_batches(check, device, budget):
    """Every layer and head has its own rows, and a sequence in a batch gets what it gets alone."""
    scores = random_scores("softmax", 3, 6, 200, torch.bfloat16, device)
    lengths, sources = torch.tensor([200, 0, 77], device=device), rows_of(device, 3 if GPU else 2, 2 if GPU else 1, 2, 6)
    together = check(scores, lengths, sources, width=200, sinks=2, recent=3, **budget)
    for b in range(3) if GPU else [2]:
        alone = check(scores[b : b + 1], lengths[b : b + 1], sources, width=200, sinks=2, recent=3, **budget)
        assert torch.equal(alone.indices[:, 0], together.indices[:, b])


@pytest.mark.parametrize(
    ("budget", "dtype"), [("top_k", torch.int32), ("top_k", torch.int64), ("top_p", torch.float32)], ids=str
)
def test_budgets_by_list(check, device, budget, dtype):
    """Each list has its own, whatever the strides."""
    scores = random_scores("softmax", 2, 2, 90, torch.bfloat16, device)
    lengths, sources = torch.tensor([90, 40], device=device), rows_of(device, 1, 2, 2, 2)
    values = [[[20, 7], [40, 9]]] if budget == "top_k" else [[[0.5, 0.9], [1.5, 0.7]]]
    own = torch.tensor(values, dtype=dtype, device=device)
    lists = check(
        scores, lengths, sources, width=90, sinks=2, recent=3, **{budget: own.transpose(1, 2).contiguous().transpose(1, 2)}
    )
    assert len(lists.counts.unique()) == 4
    if GPU:
        alike = check(scores, lengths, sources, width=90, **{budget: own[:, :, :1].expand(1, 2, 2)})
        wanted = check(scores, lengths, sources, width=90, **{budget: own[0, :, 0]})
        assert torch.equal(alike.indices, wanted.indices)


def test_any_strides(check, device):
    scores = random_scores("softmax", 2, 3, 300, torch.bfloat16, device)
    lengths = torch.tensor([[300, 7], [123, 8]], device=device)[:, 0]  # with a gap
    sources = rows_of(device, 2, 1, 1, 3).repeat(1, 1, 4)[..., ::2]
    sources = sources if GPU else sources[:1]
    ks = torch.tensor([[30, 7], [20, 8]], device=device)[:, 0]
    wanted = check(scores, lengths, sources, top_k=ks, width=40)
    for strided in (
        scores.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([scores, -scores], 2)[:, :, 0],
        torch.cat([scores, scores], 2)[..., 300:],
        scores.new_full((2, 3, 301), torch.nan)[..., 1:].copy_(scores),
        torch.stack([scores, scores], 3)[..., 1],
    ):
        assert torch.equal(check(strided, lengths, sources, top_k=ks, width=40).indices, wanted.indices)


def test_equals_the_reference_where_nothing_is_rounded(check, device):
    """The reference compares whole scores; those of bfloat16 that are not merged are their own keys."""
    scores = random_scores("softmax", 2, 3, LONG, torch.bfloat16, device)
    lengths, sources = torch.tensor([LONG, 1234], device=device), torch.tensor([[[2], [0]]], device=device)
    for options in ({"top_k": 500, "sinks": 4, "recent": 64}, {"top_p": 0.95, "sinks": 4}, {"top_p": 0.3}):
        wanted = token_select(scores, lengths, sources, backend="reference", **options)
        got = check(scores, lengths, sources, **options)
        assert torch.equal(got.counts, wanted.counts)
        assert torch.equal(got.indices, wanted.indices)


def test_same_in_every_run(check, device):
    scores = random_scores("flat", 1, 4, LONG, torch.float32, device)
    lengths, sources = torch.tensor([LONG], device=device), rows_of(device, 1, 1, 3, 4)
    first, *others = [check(scores, lengths, sources, top_p=0.9) for _ in range(20 if GPU else 2)]
    assert all(torch.equal(first.indices, other.indices) for other in others)


def test_no_lists(check, device):
    """No sequence, or no cached token, is no error."""
    none = check(torch.zeros(0, 1, 8, device=device), torch.zeros(0, dtype=torch.int64, device=device),
                 torch.zeros(2, 1, 1, dtype=torch.int64, device=device), top_k=3)  # fmt: skip
    assert none.counts.shape == (2, 0, 1)
    for budget in ({"top_k": 3}, {"top_p": 0.9}):
        empty = check(torch.zeros(1, 1, 0, device=device), torch.tensor([0], device=device),
                      torch.zeros(1, 1, 1, dtype=torch.int64, device=device), sinks=2, **budget)  # fmt: skip
        assert empty.indices.shape == (1, 1, 1, 0)


@st.composite
def cases(draw):
    """Scores from few values (so with many ties) or from all of bfloat16, some beyond the length."""
    B, R, S = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 24))
    some = [st.sampled_from(values) for values in ([0], [3], [0, 1], [0, 1, 2, 7], [0, 2**-20, 1, 2**20])]
    values = draw(st.sampled_from([*some, st.integers(0, 0x7F7F).map(of_key)]))
    scores = torch.tensor(draw(st.lists(values, min_size=B * R * S, max_size=B * R * S)), dtype=torch.float32)
    lengths = draw(st.lists(st.integers(0, S), min_size=B, max_size=B))
    Hs, G = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2]))
    sources = draw(st.lists(st.integers(0, R - 1), min_size=Hs * G, max_size=Hs * G))
    options = {name: draw(st.sampled_from([0, 0, 1, 2, 5, 40])) for name in ("sinks", "recent")}
    options["merge"] = draw(st.sampled_from(["mean", "max"]))
    options["width"] = draw(st.sampled_from([None, S, S // 2]))
    budget = {
        "top_k": st.integers(0, 30),
        "top_p": st.one_of(st.integers(0, 17).map(lambda n: n / 16), st.floats(0, 0.999999)),
    }[name := draw(st.sampled_from(["top_k", "top_p"]))]
    options[name] = draw(budget)
    return scores.view(B, R, S).bfloat16(), torch.tensor(lengths), torch.tensor(sources).view(1, Hs, G), options


def of_key(key: int) -> float:
    return torch.tensor(key << 16, dtype=torch.int32).view(torch.float32).item()


@settings(
    max_examples=300 if GPU else 15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases())
def test_properties(check, device, case):
    """Law 6, by itself and through the oracle: unique, sorted, causal, with what is forced; mass at least p; exactly k."""
    scores, lengths, sources, options = case
    lists = check(scores.to(device), lengths.to(device), sources.to(device), **options)
    for b, n in enumerate(lengths.tolist()):
        for h, rows in enumerate(sources[0].tolist()):
            kept = lists.indices[0, b, h, : lists.counts[0, b, h]].tolist()
            assert all(0 <= i < n for i in kept)
            assert all(i < j for i, j in pairwise(kept))
            if options["width"] is not None:
                continue
            forced = {i for i in range(n) if i < options["sinks"] or i >= n - options["recent"]}
            assert forced <= set(kept)
            if "top_k" in options:
                assert len(kept) == min(max(options["top_k"], len(forced)), n)
            else:
                row = merge_rows(scores[b, rows, :n], options["merge"]).double()
                assert row[kept].sum() >= (min(options["top_p"], 1) - 1e-12) * row.sum()


def test_values_are_checked_on_request(backend, device, run_or_skip, monkeypatch):
    scores, lengths = torch.ones(1, 2, 9, device=device), torch.tensor([9], device=device)
    sources = torch.tensor([[[1]]], device=device)
    run_or_skip(lambda: token_select(scores, lengths, sources, top_k=2, backend=backend))
    monkeypatch.setenv("OUTRIDER_DEBUG", "1")
    token_select(scores, lengths, sources, top_k=2, backend=backend)
    with pytest.raises(ValueError, match=r"lengths: expected values in 0 \.\. 9, got 10"):
        token_select(scores, lengths + 1, sources, top_k=2, backend=backend)
    with pytest.raises(ValueError, match=r"sources: expected values in 0 \.\. 1, got 2"):
        token_select(scores, lengths, sources + 1, top_k=2, backend=backend)


def test_float64_is_refused(backend, device):
    with pytest.raises(ValueError, match=f"'{backend}' cannot run this call"):
        token_select(
            torch.ones(1, 1, 9, dtype=torch.float64, device=device),
            torch.tensor([9], device=device),
            torch.zeros(1, 1, 1, dtype=torch.int64, device=device),
            top_k=2,
            backend=backend,
        )


@on_gpu
@pytest.mark.parametrize("S", [1, 15, 1024, 1025, 16384, 131072 + 1, 300_000, 2**20 + 3, 2**22])
@pytest.mark.parametrize(("dtype", "G"), [(torch.bfloat16, 1), (torch.bfloat16, 4), (torch.float32, 2), (torch.float16, 1)])
@pytest.mark.parametrize("kind", ["softmax", "peaked", "equal", "ties"])
def test_long_rows(check, device, kind, dtype, G, S):
    scores = random_scores(kind, 2, 3, S, dtype, device)
    lengths, sources = torch.tensor([S, S - S // 3], device=device), rows_of(device, 1, 2, G, 3)
    check(scores, lengths, sources, top_k=min(S, 4096), sinks=4, recent=64)
    check(scores, lengths, sources, top_p=0.95, sinks=4, recent=64)
    check(scores, lengths, sources, top_p=0.95, width=min(S, 1000))


@on_gpu
@pytest.mark.parametrize("budget", [{"top_k": 13107}, {"top_p": 0.95}], ids=str)
@pytest.mark.parametrize("G", [1, 4])
def test_many_lists(check, device, G, budget):
    scores = random_scores("softmax", 1, 64, 131072, torch.bfloat16, device)
    check(scores, torch.tensor([131072 - 5], device=device), rows_of(device, 32, 8, G, 64), sinks=4, recent=64, **budget)


@on_gpu
def test_scores_beyond_32_bit_offsets(check, device):
    scores = random_scores("softmax", 1, 1, 2**20, torch.bfloat16, device).expand(1, 2200, -1).contiguous()
    scores[0, -1] = scores[0, -1].flip(0)
    check(scores, torch.tensor([2**20 - 1], device=device), torch.tensor([[[2199], [2198]]], device=device), top_k=5000)


@on_gpu
def test_lists_beyond_32_bit_offsets(backend, device, run_or_skip):
    scores = random_scores("softmax", 1, 1, 2**20, torch.bfloat16, device)
    lengths, sources = torch.tensor([2**20], device=device), torch.zeros(1, 2100, 1, dtype=torch.int64, device=device)
    lists = run_or_skip(lambda: token_select(scores, lengths, sources, top_k=9, width=2**20, backend=backend))
    assert (lists.counts == 9).all()
    first = TokenLists(lists.indices[:, :, :1], lists.counts[:, :, :1])
    verify(first, scores, lengths, sources[:, :1], top_k=9, width=2**20)
    assert (lists.indices == first.indices).all()


@on_gpu
@pytest.mark.parametrize("budget", ["top_k", "top_p"])
def test_graph_replay(backend, device, run_or_skip, budget):
    """Captured once, replayed with other scores, lengths and budgets: nothing is decided on the host."""
    scores = random_scores("softmax", 2, 4, 20_000, torch.bfloat16, device)
    lengths, sources = torch.tensor([20_000, 7], device=device), rows_of(device, 2, 3, 1, 4)
    value = torch.tensor([500, 3] if budget == "top_k" else [0.9, 0.5], device=device)
    options = {budget: value, "sinks": 4, "recent": 64, "width": 20_000}

    def call() -> TokenLists:
        return token_select(scores, lengths, sources, backend=backend, **options)

    run_or_skip(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = call()
    for n, m in ((20_000, 7), (1, 20_000), (0, 4096), (19_999, 13_131)):
        lengths.copy_(torch.tensor([n, m], device=device))
        scores.copy_(random_scores("softmax", 2, 4, 20_000, torch.bfloat16, device).roll(n, 2))
        value.copy_(torch.tensor([n // 3, m // 7] if budget == "top_k" else [0.5, 0.99], device=device))
        graph.replay()
        torch.cuda.synchronize()
        verify(lists, scores, lengths, sources, **options)
