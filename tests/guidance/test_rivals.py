"""Rivals against naive re-implementations: what each method promises of its lists, and what it is charged for."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from outrider.config import Budget
from outrider.errors import OptionError
from outrider.guidance.controller import Controller
from outrider.guidance.rivals import RIVALS, InForward, Rival, Target, adore, build_rival
from outrider.guidance.rivals.double_sparsity import DoubleSparsity
from outrider.guidance.rivals.spatten import HEADS, SpAtten
from outrider.ops import sparse_attention

L, Hq, Hkv, D, T = 6, 4, 2, 8, 3
EMBEDDINGS = torch.randn(50, 12, generator=torch.Generator().manual_seed(3))


def make_controller() -> Controller:
    """Untrained: its scores are noise, but always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        made = Controller(EMBEDDINGS.shape[1], width=6).requires_grad_(False)
    return made.eval()


TARGET = Target(
    layers=(0, 1, 2, 3, 5),  # layer 4 has a sliding window
    query_heads=Hq,
    kv_heads=Hkv,
    head_dim=D,
    scales=(D**-0.5,) * L,
    value_bytes=2,
    channels=torch.stack([torch.randperm(D, generator=torch.Generator().manual_seed(i)) for i in range(L * Hkv)]).view(
        L, Hkv, D
    ),
    controller=make_controller(),
    embed=EMBEDDINGS.__getitem__,
)
LENGTHS = torch.tensor([150, 97])


class Document:
    """Keys of all layers, and the queries of a round, with NaN where nobody may read."""

    def __init__(self, seed: int = 0, lengths: Tensor = LENGTHS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths, size = lengths, int(lengths.max()) + T
        self.cached = torch.randn(L, len(lengths), size, Hkv, D, generator=generator)
        self.stored = torch.randn(L, len(lengths), size, Hkv, D, generator=generator)
        self.tokens = torch.randint(50, (len(lengths), size), generator=generator)
        self.queries = 2 * torch.randn(L, len(lengths), T, Hq, D, generator=generator)
        self.window = 2 * torch.randn(L, len(lengths), 32, Hq, D, generator=generator)
        behind = torch.arange(size) >= lengths[:, None] + T
        self.cached[:, behind] = self.stored[:, behind] = torch.nan

    def keys(self, layer: int) -> Tensor:
        return self.cached[layer]

    def values(self, layer: int) -> Tensor:
        return self.stored[layer]

    @property
    def round(self) -> Tensor:
        """The round's tokens [B, T]."""
        return torch.stack([row[n : n + T] for row, n in zip(self.tokens, self.lengths.tolist(), strict=True)])

    def attended(self, layer: int, indices: Tensor | None, counts: Tensor | None) -> Tensor:
        """What attention makes of such lists, None: of everything [B, T, Hq, D]."""
        if indices is not None:
            indices = indices[..., : self.cached.shape[2]]  # pages may end behind the cache
        given = self.queries[layer], self.cached[layer], self.stored[layer], indices, counts, self.lengths
        return sparse_attention(*given, scale=D**-0.5)

    def observe(self, rival: Rival) -> None:
        """The prefix, of which sequence 0 is all and the others lack some: tests of what is seen look at sequence 0."""
        start, size = (0, int(self.lengths.max())) if rival.window is None else (int(self.lengths.max()) - 32, 32)
        whole = torch.randn(L, len(self.lengths), size, Hq, D, generator=torch.Generator().manual_seed(7))
        self.seen = 2 * whole if rival.window is None else self.window
        rival.observe(tuple(self.seen), lambda layer: self.cached[layer, :, : start + size].nan_to_num(), start)

    def masses(self, layer: int) -> Tensor:
        """Softmax of each query over the past and the round's own tokens up to itself, mean over the queries [B, Hq, S]."""
        keys = self.cached[layer].nan_to_num().repeat_interleave(Hq // Hkv, 2)
        logits = torch.einsum("bthd,bshd->bhts", self.queries[layer], keys) * D**-0.5
        position, step = torch.arange(keys.shape[1]), torch.arange(T)[:, None]
        length = self.lengths.view(-1, 1, 1, 1)
        mass = logits.masked_fill(position > length + step, -torch.inf).softmax(-1).masked_fill(position >= length, 0)
        return mass.mean(2)

    def run(self, rival: Rival) -> dict[int, list[list[list[int]]]]:
        """Layer -> sequence -> head -> listed tokens, of one round; dense layers are not there."""
        lists = InForward(rival, self.round, self.keys, self.values, self.lengths)
        found = {}
        self.outputs = []
        for layer in range(L):
            indices, counts = lists.of(layer, self.queries[layer])
            output = self.attended(layer, indices, counts)
            self.outputs.append(lists.attended(layer, self.queries[layer], output))
            assert self.outputs[-1].shape == output.shape
            if indices is not None:
                found[layer] = [
                    [row[:n].tolist() for row, n in zip(*pair, strict=True)] for pair in zip(indices, counts, strict=True)
                ]
                assert (indices == -1).sum() == indices.numel() - counts.sum()
        made = lists.made
        assert (made is None) == (not found)
        if made is not None:
            assert made.layers == tuple(found)
            assert made.indices.dtype == made.counts.dtype == torch.int32
        return found


def rival(method: str, share: float = 0.2, document: Document | None = None, **budget) -> Rival:
    """With a budget of that share, of the tokens or of what the method takes a share of."""
    made = build_rival(method, TARGET, Budget(**({RIVALS[method].budgeted: share, "min_context": 0} | budget)))
    if document is not None:
        made.begin(document.keys, document.lengths)
        made.read(document.tokens[:, : int(document.lengths.max())], torch.zeros_like(document.lengths))
        if made.window != 0:
            document.observe(made)
    return made


def wanted(keep: float) -> list[int]:
    return [math.ceil(keep * int(n)) for n in LENGTHS]


@pytest.mark.parametrize("method", RIVALS)
def test_lists_hold_cached_tokens_once_and_in_order(method):
    document = Document()
    for found in document.run(rival(method, document=document)).values():
        for b, heads in enumerate(found):
            for tokens in heads:
                assert tokens == sorted(set(tokens))
                assert tokens and tokens[0] >= 0 and tokens[-1] < LENGTHS[b]


@pytest.mark.parametrize("method", RIVALS)
def test_keeping_everything_lists_everything(method):
    document = Document()
    for share, context in ((1.0, 0), (0.1, 1000)):
        found = document.run(rival(method, share, document, min_context=context))
        for b, heads in (pair for layer in found.values() for pair in enumerate(layer)):
            assert all(tokens == list(range(int(LENGTHS[b]))) for tokens in heads)


@pytest.mark.parametrize("method", sorted(RIVALS.keys() - {"quest", "spatten", "twilight"}))
def test_lists_are_as_long_as_the_budget_says(method):
    document = Document()
    for found in document.run(rival(method, 0.4, document)).values():
        for b, heads in enumerate(found):
            assert {len(tokens) for tokens in heads} == {wanted(0.4)[b]}


def test_oracle_keeps_the_most_mass():
    document, made = Document(), rival("oracle")
    for layer, found in document.run(made).items():
        mass = document.masses(layer).unflatten(1, (Hkv, -1)).sum(2)
        for b, heads in enumerate(found):
            for h, tokens in enumerate(heads):
                assert set(tokens) == set(mass[b, h].topk(wanted(0.2)[b]).indices.tolist())
    assert made.touched.sum() == len(TARGET.layers) * int(LENGTHS.sum()) * Hkv * D * 2


def test_streaming_keeps_both_ends():
    document, made = Document(), rival("streaming")
    for found in document.run(made).values():
        for b, [tokens] in enumerate(found):
            n, k = int(LENGTHS[b]), wanted(0.2)[b]
            assert tokens == [0, 1, 2, 3, *range(n - k + 4, n)]
    assert made.touched == 0


def page_bounds(document: Document, layer: int, b: int, h: int) -> list[float]:
    keys = document.cached[layer, b, : int(document.lengths[b]), h // (Hq // Hkv)]
    queries = document.queries[layer, b, :, h]
    return [float(torch.maximum(queries * page.amax(0), queries * page.amin(0)).sum(-1).mean()) for page in keys.split(16)]


def test_quest_reads_the_pages_of_the_highest_bounds():
    document, made = Document(), rival("quest")
    found = document.run(made)
    assert sorted(found) == [2, 3, 5], "the first two layers are dense"
    for layer, sequences in found.items():
        for b, heads in enumerate(sequences):
            assert len(heads) == Hq
            for h, tokens in enumerate(heads):
                bounds = page_bounds(document, layer, b, h)
                kept = math.ceil(wanted(0.2)[b] / 16)
                best = sorted(range(len(bounds)), key=lambda page: -bounds[page])
                forced = len(bounds) - 1  # the newest page
                pages = {forced, *[page for page in best if page != forced][: kept - 1]}
                assert {token // 16 for token in tokens} == pages
                assert len(tokens) == sum(min(16, int(LENGTHS[b]) - 16 * page) for page in pages), "whole pages"
    pages = sum(math.ceil(int(n) / 16) for n in LENGTHS)
    assert made.touched.sum() == 3 * 2 * pages * Hkv * D * 2


def test_quest_bounds_are_bounds():
    """No key of a page has a larger product than its bound: what would stand out is never left out."""
    document = Document()
    document.cached[2, 0, 40, 0] = 30 * document.queries[2, 0, :, 0].mean(0)
    document.cached[2, 0, 40, 1] = 30 * document.queries[2, 0, :, 2].mean(0)
    found = document.run(rival("quest", 0.15))[2][0]
    assert 40 in found[0] and 40 in found[2]


def test_tidal_reads_what_two_layers_have_chosen():
    document = Document()
    found = document.run(rival("tidal"))
    assert sorted(found) == [5], "0 and 1 are dense, 2 and 3 choose"
    mass = document.masses(3).unflatten(1, (Hkv, -1)).sum(2)
    for b, heads in enumerate(found[5]):
        assert [set(tokens) for tokens in heads] == [set(row.topk(wanted(0.2)[b]).indices.tolist()) for row in mass[b]]
    deep = build_rival("tidal", replace(TARGET, layers=tuple(range(32)), scales=(1.0,) * 32), Budget(keep=0.2, min_context=0))
    lists = InForward(deep, document.round, lambda layer: document.cached[layer % L], document.values, LENGTHS)
    dense = [layer for layer in range(32) if lists.of(layer, document.queries[layer % L])[0] is None]
    assert dense == [0, 1, 2, 13], "as published for 32 layers"


def naive_spatten(
    document: Document, b: int, wanted_tokens: int, last: int
) -> tuple[dict[int, list[int]], dict[int, Tensor], int]:
    """Lists, outputs [T, Hq, D] and bytes spared of sequence b's round, token by token and head by head."""
    n, lists, outputs, spared = int(document.lengths[b]), {}, {}, 0
    importance, worth, left, alive = torch.zeros(n), torch.zeros(Hq), list(range(n)), list(range(Hq))
    for place, layer in enumerate(TARGET.layers):
        if place >= 1:
            kept = math.ceil(wanted_tokens * (1.5 - (place - 1) / 3))
            left = lists[layer] = sorted(sorted(left, key=lambda token: -importance[token])[:kept])
        if place >= 3:  # 0.7 of the depth
            alive = sorted(alive, key=lambda head: -worth[head])[:last]
        outputs[layer], reads = torch.zeros(T, Hq, D), {}
        weights = {}
        for h in alive:
            keys, values = (rows[layer, b, :, h // (Hq // Hkv)] for rows in (document.cached, document.stored))
            for t in range(T):
                seen = [*left, *range(n, n + t + 1)]
                weights[h, t] = dict(
                    zip(seen, (keys[seen] @ document.queries[layer, b, t, h] * D**-0.5).softmax(0), strict=True)
                )
            total = {token: sum(weights[h, t][token] for t in range(T)) for token in left}
            for token in left:
                importance[token] += total[token]
            reads[h] = set(sorted(left, key=total.get, reverse=True)[: math.ceil(0.3 * len(left))])
            for t in range(T):
                for token, weight in weights[h, t].items():
                    if token >= n or token in reads[h]:
                        outputs[layer][t, h] += weight * values[token]
            worth[h] += outputs[layer][:, h].abs().sum()
        for group in range(Hkv):
            heads = [h for h in alive if h // (Hq // Hkv) == group]
            spared += len(left) * (not heads) + len(left) - len(set().union(*(reads[h] for h in heads)))
    return lists, outputs, spared * D * TARGET.value_bytes


class AllParts(SpAtten):
    """With head pruning."""

    heads = HEADS


@pytest.mark.parametrize("method, gone", [(AllParts, [0, 0, 0, 1, 1]), (SpAtten, [0] * 5)])
def test_spatten_prunes_tokens_values_and_heads(method, gone):
    document, made = Document(), method(target=TARGET, budget=Budget(keep=0.2, min_context=0))
    found = document.run(made)
    assert sorted(found) == [1, 2, 3, 5], "the front is dense"
    spared = 0
    for b in range(len(LENGTHS)):
        lists, outputs, one = naive_spatten(document, b, wanted(0.2)[b], Hq - gone[-1])
        spared += one
        assert {layer: [tokens] for layer, tokens in lists.items()} == {layer: found[layer][b] for layer in found}
        for layer, output in outputs.items():
            torch.testing.assert_close(document.outputs[layer][b], output, rtol=1e-4, atol=1e-5)
        kept = [set(tokens) for tokens in lists.values()]
        assert all(after < before for before, after in pairwise(kept)), "what is pruned is gone"
        assert sum(map(len, kept)) / 4 == pytest.approx(wanted(0.2)[b], abs=1)
        silent = [(document.outputs[layer][b] == 0).all(-1).all(0).sum() for layer in TARGET.layers]
        assert silent == gone, "a head of four goes, for all layers that follow"
    assert (made.touched, made.spared.sum()) == (0, spared)


def test_spatten_spares_the_keys_of_a_group_that_is_gone():
    class OneHead(SpAtten):
        heads = ((0.0, 0.25),)

    document = Document()
    made = OneHead(target=TARGET, budget=Budget(keep=0.2, min_context=0))
    left = [*LENGTHS.tolist(), *(len(tokens) for layer in document.run(made).values() for [tokens] in layer)]
    values = sum(math.ceil(0.3 * count) for count in left)
    assert made.spared.sum() == (3 * sum(left) - values) * D * 2, "one group's keys, and all values but those of one head"


def test_snapkv_chooses_once():
    document = Document()
    made = rival("snapkv", document=document)
    first = document.run(made)
    for found in first.values():
        for b, heads in enumerate(found):
            assert all(set(tokens) >= set(range(int(LENGTHS[b]) - 32, int(LENGTHS[b]))) for tokens in heads), "the window"
    later = Document(seed=1, lengths=LENGTHS + torch.tensor([7, 4]))  # other queries and keys: they do not matter any more
    for layer, found in later.run(made).items():
        for b, heads in enumerate(found):
            new = list(range(int(LENGTHS[b]), int(later.lengths[b])))
            assert heads == [[*tokens, *new] for tokens in first[layer][b]]


def test_snapkv_smooths_over_neighbours():
    """A token that stands out brings its neighbours."""
    document = Document()
    document.window[2, 0] = document.window[2, 0, 0, 0]
    document.cached[2, 0, 60] = 3 * document.window[2, 0, 0, 0]
    made = rival("snapkv", 0.25, document)
    assert all({58, 59, 60, 61, 62} <= set(tokens) for tokens in document.run(made)[2][0])


def test_h2o_keeps_heavy_hitters_and_recent_tokens():
    document = Document()
    made = rival("h2o", document=document)
    n, k = int(LENGTHS[0]), wanted(0.2)[0]
    recent = min(wanted(0.2)) // 2
    keys = document.cached[2, 0, :n].repeat_interleave(Hq // Hkv, 1)
    logits = torch.einsum("thd,shd->hts", document.seen[2, 0], keys) * D**-0.5
    past = torch.ones(n, n, dtype=torch.bool).tril()
    sums = logits.masked_fill(~past, -torch.inf).softmax(-1).sum(1).unflatten(0, (Hkv, -1)).sum(1)
    for h, tokens in enumerate(document.run(made)[2][0]):
        assert set(tokens) >= set(range(n - recent, n))
        heavy = sums[h, : n - recent].topk(k - recent).indices.tolist()
        assert set(tokens) == {*heavy, *range(n - recent, n)}


def test_h2o_evicts_for_good():
    """A token that is not kept does not come back, however much the next queries would like it."""
    document = Document()
    made = rival("h2o", document=document)
    first = document.run(made)
    for step in range(1, 4):
        later = Document(seed=step, lengths=LENGTHS + 3 * step)
        found = later.run(made)
        for layer, sequences in found.items():
            for b, heads in enumerate(sequences):
                for h, tokens in enumerate(heads):
                    old = {token for token in tokens if token < LENGTHS[b]}
                    assert old <= set(first[layer][b][h])
                    assert len(tokens) == math.ceil(0.2 * int(later.lengths[b]))
        first = found


class EveryChannel(DoubleSparsity):
    """All channels, as cached."""

    share, bits = 1.0, None


def code(row: list[float], bits: int) -> list[float]:
    """Each number rounded to the nearest of 2**bits steps between the least and the largest."""
    least, step = min(row), (max(row) - min(row)) / (2**bits - 1)
    return [least + step * round((x - least) / step) for x in row]


def guessed(document: Document, layer: int, labels: Tensor, channels: Tensor | None = None) -> Tensor:
    """What `masses` says when the keys of a layer are `labels` [B, S, Hkv, r], those of `channels` [Hkv, r]."""
    queries = document.queries[layer]
    if channels is not None:
        own = channels.repeat_interleave(Hq // Hkv, 0)  # [Hq, r]
        queries = queries.gather(-1, own.expand(*queries.shape[:2], -1, -1))
    copy = Document(lengths=document.lengths)
    copy.cached, copy.queries = {layer: labels}, {layer: queries}
    return copy.masses(layer)


def coded_labels(document: Document, layer: int, channels: Tensor) -> Tensor:
    keys = document.cached[layer].nan_to_num()
    picked = keys.gather(-1, channels.expand(*keys.shape[:2], -1, -1))
    rows = [code(row, 4) if max(row) > min(row) else row for row in picked.flatten(0, 2).tolist()]
    return torch.tensor(rows).view_as(picked)


def test_double_sparsity_reads_the_best_tokens_by_its_labels():
    document, made = Document(), rival("double-sparsity")
    found = document.run(made)
    assert sorted(found) == [2, 3, 5], "the first two layers are dense"
    for layer, sequences in found.items():
        channels = TARGET.channels[layer, :, : D // 4]
        mass = guessed(document, layer, coded_labels(document, layer, channels), channels)
        for b, heads in enumerate(sequences):
            assert len(heads) == Hq
            for h, tokens in enumerate(heads):
                assert set(tokens) == set(mass[b, h].topk(wanted(0.2)[b]).indices.tolist())
    assert made.touched.sum() == 3 * int(LENGTHS.sum()) * Hkv * (2 * 4 / 8 + 4), "two channels in 4 bits, and their range"


def test_double_sparsity_with_every_channel_is_the_top_k():
    document = Document()
    made = EveryChannel(target=TARGET, budget=Budget(keep=0.2, min_context=0))
    for layer, found in document.run(made).items():
        mass = document.masses(layer)
        for b, heads in enumerate(found):
            for h, tokens in enumerate(heads):
                assert set(tokens) == set(mass[b, h].topk(wanted(0.2)[b]).indices.tolist())
    assert made.touched.sum() == 3 * int(LENGTHS.sum()) * Hkv * D * 2


def test_twilight_keeps_the_fewest_candidates_that_hold_the_share():
    document, made, base = Document(), rival("twilight", 0.7), rival("quest", 0.25)
    found, candidates = document.run(made), document.run(base)
    assert sorted(found) == sorted(candidates) == [2, 3, 5]
    coded = 0
    for layer, sequences in found.items():
        keys = coded_labels(document, layer, torch.arange(D).expand(Hkv, D))
        for b, heads in enumerate(sequences):
            each = candidates[layer][b]
            coded += sum(len({token for own in each[g : g + Hq // Hkv] for token in own}) for g in (0, Hq // Hkv))
            for h, tokens in enumerate(heads):
                assert set(tokens) <= set(each[h])
                weights = torch.zeros(T, int(LENGTHS[b]), dtype=torch.float64)
                for t in range(T):
                    logits = keys[b, each[h], h // (Hq // Hkv)] @ document.queries[layer, b, t, h] * D**-0.5
                    weights[t, each[h]] = logits.double().softmax(-1)
                weights = weights.mean(0)
                assert float(weights[tokens].sum()) >= 0.7 - 1e-6
                assert float(weights[tokens].sum() - weights[tokens].min()) < 0.7, "one fewer does not"
                assert weights[tokens].min() >= max([weights[x] for x in each[h] if x not in tokens], default=0)
    assert made.touched.sum() == base.touched.sum() + coded * (D * 4 / 8 + 4)


def test_twilight_finds_what_a_head_needs():
    """A head that looks at one token keeps few; one that looks everywhere keeps many."""
    document = Document()
    document.queries[2, 0, :, 0] = document.queries[2, 0, 0, 0]
    document.cached[2, 0, 40, 0] = 9 * document.queries[2, 0, 0, 0]
    document.queries[2, 0, :, 1] = 0
    few, many, *_ = document.run(rival("twilight", 0.9))[2][0]
    assert few == [40] and len(many) > 0.9 * wanted(0.25)[0]


class Scripted(Controller):
    """Scores come from a table: those that `given` [S] holds at the moment."""

    given: Tensor

    def logits(self, asking: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
        return self.given[: states.shape[1]].expand(*asking.shape[:2], -1)


def scripted_adore(document: Document, keep: float) -> Rival:
    made = build_rival(
        "adore", replace(TARGET, controller=Scripted(EMBEDDINGS.shape[1], width=6)), Budget(keep=keep, min_context=0)
    )
    made.begin(document.keys, document.lengths)
    made.read(document.tokens[:, : int(document.lengths.max())], torch.zeros_like(document.lengths))
    return made


def test_adore_keeps_what_its_controller_scores_highest():
    document = Document()
    found = document.run(rival("adore", document=document))
    assert sorted(found) == list(TARGET.layers)
    states = TARGET.controller.states(EMBEDDINGS[document.tokens])
    for b, n in enumerate(LENGTHS.tolist()):
        scores = TARGET.controller.logits(states[b : b + 1, n : n + T], states[b : b + 1, :n], LENGTHS[b : b + 1])
        best = scores.sigmoid().mean(1)[0].topk(wanted(0.2)[b]).indices.tolist()
        assert all(found[layer][b] == [sorted(best)] for layer in TARGET.layers), "one list, the same in all layers"


def test_adore_takes_released_tokens_back(monkeypatch):
    """Its size stays; what scores high again comes back, but only so many in a round; all of it is charged."""
    monkeypatch.setattr(adore, "REBUILT", 2)
    document = Document(lengths=torch.tensor([150]))
    made, n = scripted_adore(document, 0.1), 150
    rising = torch.arange(200.0) / 200
    made.target.controller.given = rising
    first = document.run(made)[0][0][0]
    assert first == list(range(n - 15, n)), "the last fifteen score highest"
    assert made.touched == n * 6 * 2, "states alone: nothing was released yet"
    made.target.controller.given = -rising  # now the first ones do
    cached = set(first)
    for step in range(1, 5):
        later = Document(seed=step, lengths=document.lengths + 2 * step)
        before, [found] = made.touched, document_lists(later, made)
        size = int(later.lengths)
        cached |= set(range(size - 2, size))  # what has come since
        returned = sorted(set(found) - cached)
        assert len(found) == math.ceil(0.1 * size)
        assert len(returned) == min(2 * T, len(found)) or step > 2
        assert set(found) == set(sorted(cached | set(returned))[: len(found)]), "of both, the highest scores"
        assert returned == sorted(set(range(size)) - cached)[: len(returned)]
        assert made.touched - before == size * 6 * 2 + len(returned) * 2 * Hkv * D * 2 * len(TARGET.layers)
        cached = set(found)
    assert cached == set(range(len(found))), "the first tokens are all back"


def document_lists(document: Document, made: Rival) -> list[list[int]]:
    """The one list of every sequence."""
    found = document.run(made)
    assert all(layer == found[0] for layer in found.values()), "the same in all layers"
    return [heads[0] for heads in found[0]]


def test_adore_forgets_rejected_tokens():
    """A token's state follows from those in front of it alone, whatever was read in its place before."""
    document, other = Document(), Document(seed=5)
    made, plain = rival("adore", document=document), rival("adore", document=document)
    made.read(other.round, LENGTHS)
    made.read(document.round, LENGTHS)
    plain.read(document.round, LENGTHS)
    assert torch.equal(made._asking, plain._asking) and not torch.equal(made._asking, torch.zeros_like(made._asking))
    assert document.run(made) == document.run(plain)


def test_what_is_refused():
    with pytest.raises(
        OptionError,
        match=r"method: got 'none'; allowed: oracle, streaming, h2o, snapkv, quest, tidal, spatten, double-",
    ):
        build_rival("none", TARGET, Budget())
    with pytest.raises(OptionError, match=r"top-p: got 0\.9; allowed: --keep with method quest"):
        build_rival("quest", TARGET, Budget(top_p=0.9))
    with pytest.raises(OptionError, match=r"keep: got 0\.1; allowed: --top-p with method twilight"):
        build_rival("twilight", TARGET, Budget())
    with pytest.raises(OptionError, match=r"channels: got None; allowed: a file made by `outrider calibrate --channels`"):
        build_rival("double-sparsity", replace(TARGET, channels=None), Budget())
    with pytest.raises(OptionError, match=r"controller: got None; allowed: a file made by `recipes/adore` for this target"):
        build_rival("adore", replace(TARGET, controller=None), Budget())
