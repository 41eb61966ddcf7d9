"""Selectors against naive re-implementations, and what each method promises of its lists."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.config import Budget
from outrider.errors import OptionError, PairError
from outrider.guidance.budgets import SHARES
from outrider.guidance.selectors import SELECTORS, build_selector
from outrider.guidance.selectors.base import list_width, longest_list, top_k
from outrider.types import Alignment, DraftScores, ListCosts, Shares, UnlistedFit

B, Ld, Hd, Lt, Hq, Hkv, S, T = 3, 3, 2, 5, 4, 2, 60, 4
TARGET_LAYERS = (0, 1, 3, 4)  # layer 2 has a sliding window
LENGTHS = [60, 41, 9]


def alignment(heads: int, merged: int, seed: int = 0) -> Alignment:
    generator = torch.Generator().manual_seed(seed)
    layer = torch.randint(Ld, (Lt, heads, merged, 1), generator=generator)
    head = torch.randint(Hd, (Lt, heads, merged, 1), generator=generator)
    return Alignment(sources=torch.cat((layer, head), dim=-1))


def averaged(layers: list[int]) -> Alignment:
    """SpecAttn's own: all heads of one draft layer per target layer."""
    return Alignment(sources=torch.tensor([[[[layer, head] for head in range(Hd)]] for layer in layers]))


def make_scores(selector, lengths=LENGTHS, queries=None, seed=0) -> tuple[DraftScores, torch.Tensor]:
    """Scores of the selector's layers, and the masses of all draft layers [B, T, Ld, Hd, S] they come from."""
    generator = torch.Generator().manual_seed(seed)
    mass = (torch.randn(len(lengths), T, Ld, Hd, S, generator=generator) * 2).softmax(-1)
    lengths = torch.tensor(lengths)
    mass = mass.masked_fill(torch.arange(S) >= lengths.view(-1, 1, 1, 1, 1), 0)
    rows = mass[:, :, list(selector.draft_layers)].flatten(2, 3)
    if not selector.per_query:
        rows = rows.mean(1, keepdim=True)
    return DraftScores(mass=rows, layers=selector.draft_layers, lengths=lengths), mass


def make(method, alignment, **budget):
    options = {"sinks": 2, "recent": 3, "min_context": 0} | budget
    return build_selector(
        method, alignment=alignment, budget=Budget(**options), target_layers=TARGET_LAYERS, kv_heads=Hkv, draft_heads=Hd
    )


FITS = {
    name: UnlistedFit(
        values=torch.randn(Lt, Hkv, 8), weights=4 * torch.rand(Lt, Hq, generator=torch.Generator().manual_seed(i))
    )
    for i, name in enumerate(SELECTORS)
}


@pytest.mark.parametrize("budget", [{"keep": 0.3}, {"top_p": 0.6}], ids=str)
@pytest.mark.parametrize("method", SELECTORS)
def test_what_stands_for_unlisted_tokens_against_naive(method, budget):
    """Its share is the weight times what the lists leave out of the draft's mass, at most 1."""
    aligned = averaged([0, 1, 0, 2, 1]) if method == "specattn" else alignment(Hq, 2)
    aligned = Alignment(sources=aligned.sources, unlisted=FITS)
    selector = make(method, aligned, unlisted="mean", **budget)
    scores, mass = make_scores(selector)
    selection = selector.select(scores)
    plain = make(method, aligned, unlisted="none", **budget).select(scores)
    assert plain.unlisted is None and torch.equal(selection.indices, plain.indices)
    got, heads, clamped = lists(selection), selection.indices.shape[2], 0
    for layer in selection.layers:
        values, shares = selection.unlisted_of(layer)
        assert torch.equal(values, FITS[method].values[layer])
        for b, length in enumerate(LENGTHS):
            for h in range(Hq):
                owner = h * heads // Hq
                named = aligned.sources[layer] if method in ("outrider", "sts") else aligned.sources[list(TARGET_LAYERS)]
                if method in ("outrider", "sts"):
                    named = named[owner * Hq // heads : (owner + 1) * Hq // heads]
                elif method == "specattn":
                    named = aligned.sources[layer]
                pairs = named.flatten(0, -2).unique(dim=0).tolist() if method == "dustin" else named.flatten(0, -2).tolist()
                row = torch.stack([mass[b, :, d, i, :length] for d, i in pairs]).double().mean((0, 1))
                left = 1 - float(row[got[layer, b, owner]].sum() / row.sum())
                wanted = min(float(FITS[method].weights[layer, h]) * left, 1)
                clamped += wanted == 1
                assert float(shares[b, h]) == pytest.approx(wanted, abs=1e-5)
    assert clamped
    assert selection.unlisted_of(2) == (None, None) == plain.unlisted_of(0)
    part = selection.rows(1, 3)
    assert torch.equal(part.unlisted_of(3)[1], selection.unlisted_of(3)[1][1:])


@pytest.mark.parametrize("budget", [{"keep": 0.3}, {"top_p": 0.6}], ids=str)
@pytest.mark.parametrize("method", SELECTORS)
def test_a_sequence_with_a_share_of_its_own_has_the_lists_of_that_budget(method, budget):
    aligned = averaged([0, 1, 0, 2, 1]) if method == "specattn" else alignment(Hq, 2)
    selector = make(method, aligned, **budget)
    scores, _ = make_scores(selector)
    [name], shares = budget, [0.2, 0.75, 1.0]
    found = lists(selector.select(scores, Shares(kept=torch.tensor(shares, dtype=torch.float64), most=1.0)))
    for row, share in enumerate(shares):
        wanted = lists(make(method, aligned, **{name: share}).select(scores))
        assert {at: one for at, one in found.items() if at[1] == row} == {at: one for at, one in wanted.items() if at[1] == row}
    assert selector.entries(S, 1.0) >= selector.entries(S)


def test_fitted_lists_of_a_sequence_that_keeps_everything_hold_everything():
    values = torch.linspace(1, 0, 27, dtype=torch.float64) ** torch.arange(1, Lt * Hkv + 1).view(Lt, Hkv, 1)
    selector = make("outrider", replace(alignment(Hq, 2), costs=ListCosts(shares=SHARES, values=values)), keep=0.3)
    scores, _ = make_scores(selector)
    counts = selector.select(scores, Shares(kept=torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64), most=1.0)).counts
    alone = selector.select(scores).counts
    assert torch.equal(counts[:, 0], alone[:, 0]) and len(alone[:, 0].unique()) > 1
    assert counts[:, 1].sum() > 1.5 * alone[:, 1].sum()
    assert (counts[:, 2] == LENGTHS[2]).all()


@pytest.mark.parametrize("method", SELECTORS)
def test_nothing_stands_for_unlisted_tokens_unless_asked_and_calibrated(method):
    fitted = Alignment(sources=alignment(Hq, 2).sources, unlisted=FITS)
    assert make(method, fitted).unlisted is None and make(method, fitted, unlisted="mean").unlisted is not None
    with pytest.raises(OptionError, match=f"unlisted: got 'mean'; allowed: none, .* method {method} .* calibrate again"):
        make(method, alignment(Hq, 2), unlisted="mean")


def lists(selection) -> dict[tuple[int, int, int], list[int]]:
    """(target layer, sequence, head) -> listed tokens; checks the padding and law 6 (unique, sorted, causal)."""
    result = {}
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    for i, layer in enumerate(selection.layers):
        for b in range(selection.indices.shape[1]):
            for h in range(selection.indices.shape[2]):
                row, count = selection.indices[i, b, h].tolist(), int(selection.counts[i, b, h])
                assert all(token == -1 for token in row[count:])
                kept = row[:count]
                assert kept == sorted(set(kept)) and all(0 <= token < int(selection.lengths[b]) for token in kept)
                result[layer, b, h] = kept
    return result


def naive_top_k(row: torch.Tensor, length: int, k: int, forced: set[int] = frozenset()) -> list[int]:
    order = sorted(range(length), key=lambda s: (s not in forced, -float(row[s])))
    return sorted(order[:k])


def naive_top_p(row: torch.Tensor, length: int, p: float, forced: set[int] = frozenset()) -> list[int]:
    values, kept = row.double().tolist(), sorted(forced)
    for token in sorted(set(range(length)) - forced, key=lambda s: -values[s]):
        if sum(values[s] for s in kept) >= p * sum(values[:length]):
            break
        kept.append(token)
    return sorted(kept)


def forced_tokens(length: int) -> set[int]:
    return {s for s in range(length) if s < 2 or s >= length - 3}


@pytest.mark.parametrize("budget", [{"keep": 0.3}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize(("heads", "merged"), [(Hq, 1), (Hq, 2), (Hkv, 4), (1, 2)], ids=["query", "query-2", "kv", "shared"])
def test_outrider_against_naive(heads, merged, budget):
    aligned = alignment(heads, merged)
    selector = make("outrider", aligned, **budget)
    scores, mass = make_scores(selector)
    selection = selector.select(scores)
    owners = min(heads, Hkv)
    assert selection.layers == TARGET_LAYERS and selection.indices.shape[2] == owners
    assert selection.lengths is scores.lengths
    got = lists(selection)
    for layer in TARGET_LAYERS:
        for b, length in enumerate(LENGTHS):
            for h in range(owners):
                members = range(h * heads // owners, (h + 1) * heads // owners)
                pairs = [pair for m in members for pair in aligned.sources[layer, m].tolist()]
                row = torch.stack([mass[b, :, d, i] for d, i in pairs]).mean((0, 1))
                kept = got[layer, b, h]
                assert forced_tokens(length) <= set(kept)
                if "keep" in budget:
                    assert len(kept) == max(math.ceil(0.3 * length), len(forced_tokens(length)))
                    assert kept == naive_top_k(row, length, len(kept), forced_tokens(length))
                else:
                    assert float(row[kept].sum()) >= 0.8 * float(row.sum()) - 1e-6
                    assert kept == naive_top_p(row, length, 0.8, forced_tokens(length))


def with_costs(aligned: Alignment, heads: int, seed: int = 0) -> Alignment:
    falls = torch.rand(Lt, heads, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    costs = torch.cat([falls.flip(-1).cumsum(-1).flip(-1), torch.zeros(Lt, heads, 1)], -1)
    return replace(aligned, costs=ListCosts(shares=(0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0), values=costs))


@pytest.mark.parametrize("keep", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("heads", "merged"), [(Hq, 1), (Hkv, 4), (1, 2)], ids=["query", "kv", "shared"])
def test_fitted_lists_have_the_total_of_equal_ones(heads, merged, keep):
    """The best tokens still, in numbers that follow the costs; a sequence below min_context is read whole."""
    owners = min(heads, Hkv)
    aligned = with_costs(alignment(heads, merged), owners)
    selector = make("outrider", aligned, keep=keep, min_context=10)
    flat = make("outrider", aligned, keep=keep, min_context=10, allocation="flat")
    scores, mass = make_scores(selector)
    selection = selector.select(scores)
    got, counts, equal = lists(selection), selection.counts.sum((0, 2)), flat.select(scores).counts
    assert len(equal.flatten(2).unique(dim=2)[0, 0]) == 1
    missing = equal.sum((0, 2)) - counts
    assert (missing >= 0).all() and (missing < equal[:, 0].numel()).all(), (
        "less than a token a list, by which equal ones are rounded up"
    )
    assert (selection.counts[:, 2] == LENGTHS[2]).all(), "below min_context"
    assert (keep < 1) == bool(selection.counts[:, 0].unique().numel() > 1)
    for b, length in enumerate(LENGTHS):
        assert int(selection.counts[:, b].sum()) <= selector.entries(length)
        assert int(selection.counts[:, b].max()) <= longest_list(selector.budget, length, 5, selector.longest)
        for layer, h in itertools.product(TARGET_LAYERS, range(owners)):
            members = range(h * heads // owners, (h + 1) * heads // owners)
            pairs = [pair for m in members for pair in aligned.sources[layer, m].tolist()]
            row, kept = torch.stack([mass[b, :, d, i] for d, i in pairs]).mean((0, 1)), got[layer, b, h]
            assert kept == naive_top_k(row, length, len(kept), forced_tokens(length))


def test_allocation():
    plain, costly = alignment(Hkv, 4), with_costs(alignment(Hkv, 4), Hkv)
    for aligned, budget, fitted in (
        (plain, {"keep": 0.3}, False),
        (costly, {"keep": 0.3}, True),
        (costly, {"keep": 0.3, "allocation": "fitted"}, True),
        (costly, {"keep": 0.3, "allocation": "flat"}, False),
        (costly, {"top_p": 0.3}, False),
    ):
        assert (make("outrider", aligned, **budget).bounds is not None) == fitted
    with pytest.raises(OptionError, match="allocation: got 'fitted'; allowed: flat, or an alignment with budgets"):
        make("outrider", plain, allocation="fitted")
    with pytest.raises(OptionError, match="allocation: got 'fitted'; allowed: flat or auto with method sts"):
        make("sts", costly, allocation="fitted")
    with pytest.raises(OptionError, match="allocation: got 'fitted'; allowed: flat or auto with top-p"):
        Budget(top_p=0.5, allocation="fitted")
    with pytest.raises(OptionError, match="allocation: got 'best'; allowed: auto, flat, fitted"):
        Budget(allocation="best")
    with pytest.raises(PairError, match="costs of 1 lists a layer, but 2 lists"):
        make("outrider", with_costs(plain, 1), keep=0.3)


@pytest.mark.parametrize("budget", [{"keep": 0.2}, {"top_p": 0.7}], ids=str)
def test_sts_against_naive(budget):
    aligned = alignment(Hq, 1)
    selector = make("sts", aligned, sinks=2, recent=3, **budget)
    scores, mass = make_scores(selector)
    got = lists(selector.select(scores))
    assert len(got) == len(TARGET_LAYERS) * B * Hq
    for (layer, b, h), kept in got.items():
        d, i = aligned.sources[layer, h, 0].tolist()
        row, length = mass[b, :, d, i].mean(0), LENGTHS[b]
        expected = naive_top_k(row, length, math.ceil(0.2 * length)) if "keep" in budget else naive_top_p(row, length, 0.7)
        assert kept == expected


@pytest.mark.parametrize("method", ["sts", "specattn"])
@pytest.mark.parametrize("budget", [{"keep": 0.1}, {"top_p": 0.5}], ids=str)
def test_published_methods_force_no_tokens(method, budget):
    """All mass lies in the middle of the context: neither sinks nor recent tokens may appear."""
    selector = make(method, averaged([0, 1, 1, 2, 2]), sinks=4, recent=8, **budget)
    queries = T if selector.per_query else 1
    mass = torch.zeros(1, queries, len(selector.draft_layers) * Hd, S)
    mass[..., 20:40] = torch.rand(20) + 0.1
    scores = DraftScores(mass=mass, layers=selector.draft_layers, lengths=torch.tensor([S]))
    got = lists(selector.select(scores))
    assert all(kept and kept[0] >= 20 and kept[-1] < 40 for kept in got.values())


def test_specattn_top_p_is_the_union_over_steps_with_two_dense_layers():
    draft_of = [0, 0, 1, 1, 2]
    selector = make("specattn", averaged(draft_of), top_p=0.6)
    assert selector.per_query and selector.draft_layers == (1, 2)
    scores, mass = make_scores(selector)
    selection = selector.select(scores)
    assert selection.layers == (3, 4) and selection.indices.shape[2] == 1
    for (layer, b, _), kept in lists(selection).items():
        steps = mass[b, :, draft_of[layer]].mean(1)  # [T, S]
        union = set().union(*(naive_top_p(step, LENGTHS[b], 0.6) for step in steps))
        assert kept == sorted(union)
        assert all(float(step[kept].sum()) >= 0.6 * float(step.sum()) - 1e-6 for step in steps)


def test_specattn_keep_is_the_top_of_the_maximum_in_all_layers():
    draft_of = [0, 0, 1, 1, 2]
    selector = make("specattn", averaged(draft_of), keep=0.25)
    scores, mass = make_scores(selector)
    selection = selector.select(scores)
    assert selection.layers == TARGET_LAYERS
    for (layer, b, _), kept in lists(selection).items():
        row = mass[b, :, draft_of[layer]].mean(1).amax(0)
        assert kept == naive_top_k(row, LENGTHS[b], math.ceil(0.25 * LENGTHS[b]))


def test_specattn_keep_drops_no_layer_of_a_shallow_target():
    options = {"alignment": averaged([0, 1]), "target_layers": (0, 1), "kv_heads": Hkv, "draft_heads": Hd}
    assert build_selector("specattn", budget=Budget(keep=0.5), **options).draft_layers == (0, 1)
    with pytest.raises(OptionError, match="target layers"):
        build_selector("specattn", budget=Budget(top_p=0.5), **options)


@pytest.mark.parametrize("budget", [{"keep": 0.6}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize(("heads", "merged"), [(Hq, 1), (Hkv, 4), (1, 2)], ids=["query", "kv", "shared"])
def test_dustin_against_naive(heads, merged, budget):
    """One list for all layers and heads, from every draft head that the alignment names, each once."""
    aligned = alignment(heads, merged)
    selector = make("dustin", aligned, **budget)
    scores, mass = make_scores(selector)
    selection = selector.select(scores)
    assert selection.layers == TARGET_LAYERS and selection.indices.shape[2] == 1
    named = {tuple(pair) for pair in aligned.sources[list(TARGET_LAYERS)].flatten(0, 2).tolist()}
    got = lists(selection)
    for b, length in enumerate(LENGTHS):
        forced = forced_tokens(length)
        row = torch.stack([mass[b, :, d, i].mean(0) for d, i in sorted(named)]).mean(0)
        if "keep" in budget:
            expected = naive_top_k(row, length, math.ceil(0.6 * length), forced)
        else:
            expected = naive_top_p(row, length, 0.8, forced)
        assert [got[layer, b, 0] for layer in TARGET_LAYERS] == [expected] * len(TARGET_LAYERS)


@pytest.mark.parametrize("method", SELECTORS)
@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(0, S), min_size=1, max_size=3),
    share=st.floats(0.01, 1.0),
    top_p=st.booleans(),
    min_context=st.integers(0, S + 1),
    heads=st.sampled_from([1, Hkv, Hq]),
    seed=st.integers(0, 100),
)
def test_laws_of_every_method(method, lengths, share, top_p, min_context, heads, seed):
    selector = make(method, alignment(heads, 2, seed), **{"top_p" if top_p else "keep": share}, min_context=min_context)
    scores, _ = make_scores(selector, lengths, seed=seed)
    selection = selector.select(scores)
    for (_, b, _), kept in lists(selection).items():
        length = lengths[b]
        if length < min_context or share == 1.0:
            assert kept == list(range(length))
        elif not top_p:
            forced = len(forced_tokens(length)) if method in ("outrider", "dustin") else 0
            assert len(kept) == min(length, max(math.ceil(share * length - 1e-9), forced))
        if method in ("outrider", "dustin"):
            assert forced_tokens(length) <= set(kept)
    for b, length in enumerate(lengths):  # law 7: a row of a ragged batch equals the same row alone
        own = DraftScores(mass=scores.mass[b : b + 1], layers=scores.layers, lengths=scores.lengths[b : b + 1])
        alone = lists(selector.select(own))
        assert all(alone[layer, 0, h] == kept for (layer, i, h), kept in lists(selection).items() if i == b), length


@pytest.mark.parametrize("method", SELECTORS)
def test_scores_of_every_query_may_be_given_to_every_method(method):
    """Averaged here or before: the same lists."""
    selector = make(method, averaged([0, 1, 1, 2, 2]), keep=0.3)
    _, mass = make_scores(selector)
    rows = mass[:, :, list(selector.draft_layers)].flatten(2, 3)
    scores = DraftScores(mass=rows, layers=selector.draft_layers, lengths=torch.tensor(LENGTHS))
    expected = lists(selector.select(make_scores(selector)[0]))
    assert lists(selector.select(scores)) == expected


@pytest.mark.parametrize("method", SELECTORS)
def test_only_the_layers_the_alignment_uses_are_scored(method):
    selector = make(method, averaged([0, 2, 1, 2, 2]), keep=0.3)
    assert selector.draft_layers == (0, 2)
    scores, _ = make_scores(selector)
    wrong = DraftScores(mass=scores.mass, layers=(0, 1), lengths=scores.lengths)
    with pytest.raises(OptionError, match=r"\(0, 1\).*\(0, 2\)"):
        selector.select(wrong)


@pytest.mark.parametrize("method", SELECTORS)
def test_alignments_that_do_not_fit(method):
    holes = averaged([0, 1, 2, 0, 1]).sources
    holes[2] = -1
    make(method, Alignment(sources=holes))  # layer 2 gets no lists: none are missed
    holes[3] = -1
    with pytest.raises(PairError, match="target layer 3"):
        make(method, Alignment(sources=holes))
    with pytest.raises(PairError, match="4 target layers"):
        make(method, averaged([0, 1, 2, 0]))
    options = {"budget": Budget(), "kv_heads": Hkv, "draft_heads": Hd}
    with pytest.raises(PairError, match="draft head 1"):
        build_selector(method, alignment=averaged([0, 1]), target_layers=(0, 1), **options | {"draft_heads": 1})
    for layers in ((), (1, 0), (1, 1), (-1, 0)):
        with pytest.raises(OptionError, match="target layers"):
            build_selector(method, alignment=averaged([0, 1]), target_layers=layers, **options)


@given(st.integers(0, 5000), st.floats(0.001, 1.0), st.integers(0, 2000), st.integers(0, 200))
@settings(deadline=None, max_examples=100)
def test_list_width_holds_every_list(size, keep, min_context, forced):
    """On a device the width comes from shapes alone: no sequence of at most `size` tokens may have a longer list."""
    budget = Budget(keep=keep, min_context=min_context)
    width = list_width(budget, size, forced, torch.device("meta"))
    every = torch.arange(size + 1)
    assert 1 <= width <= max(1, size)
    assert width >= int(torch.maximum(top_k(budget, every), torch.clamp(every, max=forced)).max())


def test_outrider_needs_heads_that_group():
    with pytest.raises(PairError, match="3 heads"):
        make("outrider", alignment(3, 1))


def test_unknown_method():
    with pytest.raises(OptionError, match="method: got 'quest'; allowed: outrider, sts, specattn, dustin"):
        make("quest", alignment(1, 1))


def test_default_maps():
    assert {name: cls.default_map for name, cls in SELECTORS.items()} == {
        "outrider": "joint+divergence",
        "sts": "proportional+jaccard",
        "specattn": "monotone+average",
        "dustin": "joint+divergence",
    }
