"""unlisted_mass against sums over single lists in fp64; what lies behind a length or a count is junk."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from outrider.ops import token_select, unlisted_mass

GPU = torch.cuda.is_available()
LENGTHS = [(0, 1, 700), (2500, 30), (1300,)] + ([(131072, 5, 70000, 0)] if GPU else [])


@pytest.fixture(scope="module", params=["triton", "reference"])
def backend(request) -> str:
    return request.param


def make(device: torch.device, lengths: tuple[int, ...], dtype: torch.dtype, G: int, keep: float, seed: int = 0) -> dict:
    """Scores whose tails are NaN, and lists of a share of the tokens with junk in their unused slots."""
    generator = torch.Generator().manual_seed(seed)
    B, R, S, Lt, Hs = len(lengths), 6, max(lengths) + 3, 2, 3
    scores = (torch.rand(B, R, S, generator=generator) ** 8).to(dtype)
    for b, length in enumerate(lengths):
        scores[b, :, length:] = torch.nan
    sources = torch.randint(R, (Lt, Hs, G), generator=generator)
    kept = [[[torch.rand(n, generator=generator) < keep for _ in range(Hs)] for n in lengths] for _ in range(Lt)]
    counts = torch.tensor([[[int(x.sum()) for x in row] for row in layer] for layer in kept], dtype=torch.int32)
    indices = torch.full((Lt, B, Hs, int(counts.max()) + 2), -1, dtype=torch.int32)
    indices[..., -1] = 2**31 - 1
    for i, layer in enumerate(kept):
        for b, row in enumerate(layer):
            for h, x in enumerate(row):
                indices[i, b, h, : counts[i, b, h]] = x.nonzero()[:, 0].int()
    made = {"scores": scores, "lengths": torch.tensor(lengths), "sources": sources, "indices": indices, "counts": counts}
    return {name: x.to(device) for name, x in made.items()}


def oracle(scores: Tensor, lengths: Tensor, sources: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    shares = torch.zeros(counts.shape, dtype=torch.float64)
    for place in product(*map(range, counts.shape)):
        layer, b, h = place
        rows = scores[b, sources[layer, h], : lengths[b]].double().cpu().sum(0)
        listed = rows[indices[place][: counts[place]].long().cpu()].sum()
        if counts[place] < lengths[b]:
            shares[place] = 1 - listed / rows.sum()
    return shares


@pytest.mark.parametrize("keep", [0.1, 1.0, 0.0], ids=["some", "all", "none"])
@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_shares_are_those_of_the_oracle(backend, device, lengths, dtype, G, keep):
    made = make(device, lengths, dtype, G, keep)
    got = unlisted_mass(**made, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), oracle(**made), rtol=1e-5, atol=1e-5)
    if keep == 1:
        assert (got == 0).all()
    assert torch.equal(got, unlisted_mass(**made, backend=backend))


def test_float64_is_summed_in_float64(device):
    made = make(device, (700, 33), torch.float64, 2, 0.3)
    got = unlisted_mass(**made, backend="reference").cpu()
    assert torch.equal(got, oracle(**made).float())


def test_rows_without_a_score_and_negative_ones_count_as_nothing(backend, device):
    made = make(device, (40, 40), torch.float32, 2, 0.5)
    made["scores"][0] = 0
    made["scores"][1, :, ::2] *= -1
    got = unlisted_mass(**made, backend=backend)
    assert (got[:, 0] == 0).all()
    torch.testing.assert_close(got, unlisted_mass(**(made | {"scores": made["scores"].clamp(min=0)}), backend=backend))


def test_lists_and_scores_may_have_any_strides(backend, device):
    made = make(device, (700, 33), torch.bfloat16, 2, 0.3)
    plain = unlisted_mass(**made, backend=backend)
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in made.items()}
    assert torch.equal(unlisted_mass(**strided, backend=backend), plain)
    shared = made | {name: made[name][:1].expand(2, *made[name].shape[1:]) for name in ("sources", "indices", "counts")}
    assert torch.equal(unlisted_mass(**shared, backend=backend), plain[:1].expand(2, -1, -1))


def test_a_list_of_the_best_tokens_leaves_out_least(backend, device):
    made = make(device, (900,), torch.float32, 2, 0.2)
    best = token_select(made["scores"].nan_to_num(0), made["lengths"], made["sources"], top_k=90, backend="reference")
    drawn = unlisted_mass(**(made | {"indices": best.indices, "counts": best.counts}), backend=backend)
    other = (made["counts"] * 0 + 90).int()
    some = torch.arange(0, 900, 10, device=device, dtype=torch.int32).expand(*other.shape, -1)
    assert (drawn < unlisted_mass(**(made | {"indices": some, "counts": other}), backend=backend)).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counts": torch.zeros(2, 1, 3)}, TypeError, "counts: expected dtype int32"),
        ({"sources": torch.zeros(2, 2, 1).long()}, ValueError, "indices: expected shape .* with .*Hs=2"),
        ({"sources": torch.full((2, 3, 1), 6)}, ValueError, r"sources: expected values in 0 \.\. 5"),
        ({"lengths": torch.tensor([34])}, ValueError, r"lengths: expected values in 0 \.\. 33"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'reference', 'triton', got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    made = make(torch.device("cpu"), (30,), torch.float32, 1, 0.5)
    with pytest.raises(error, match=message):
        unlisted_mass(**({"backend": "reference"} | made | change))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_captured_call_follows_its_arguments(device):
    static = make(device, (3000, 2000), torch.bfloat16, 3, 0.4)
    unlisted_mass(**static, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = unlisted_mass(**static, backend="triton")
    for seed in range(1, 4):
        other = make(device, (3000, 2000), torch.bfloat16, 3, 0.1 * seed, seed)
        for name in ("scores", "sources", "counts"):
            static[name].copy_(other[name])
        width = min(static["indices"].shape[-1], other["indices"].shape[-1])
        static["indices"].fill_(-1)[..., :width] = other["indices"][..., :width]
        static["counts"].clamp_(max=width)
        static["lengths"].copy_(torch.tensor((2500 + seed, 2000)))
        graph.replay()
        assert torch.equal(result, unlisted_mass(**static, backend="triton"))
