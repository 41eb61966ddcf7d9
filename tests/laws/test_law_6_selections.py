"""Law 6: selections are unique, sorted, causal, hold sinks and recent tokens; top-p keeps the mass asked for, top-k exactly k.

All through the engine's own scoring of real rounds, in a ragged batch.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.guidance.selectors import Dustin

PROMPTS = [44, 1, 27, 9, 33]  # no cached token, and fewer than any shortest context, among them
SHARES = st.floats(0.01, 1.0)
BUDGETS = st.builds(
    lambda rest, share: rest | share,
    st.fixed_dictionaries({"sinks": st.integers(0, 6), "recent": st.integers(0, 10), "min_context": st.integers(0, 30)}),
    st.fixed_dictionaries({"keep": SHARES}) | st.fixed_dictionaries({"top_p": SHARES}),
)


@pytest.fixture(scope="module")
def pair(make_pair):
    return make_pair("llama")


@pytest.fixture(scope="module")
def begun(pair, begin_round, random_prompts):
    return begin_round(pair, random_prompts(PROMPTS), "outrider", keep=0.3)


def owners_mass(round_, number, owner):
    """Naive score of one list by the alignment: [B, Q, S], for every query whose tokens the list must cover."""
    selector, scores = round_.selector, round_.scores
    sources = selector.alignment.sources[round_.selection.layers[number]]
    heads_per_layer = round_.draft.spec.layers[0].query_heads
    own = sources.flatten(0, 1) if selector.per_query else sources[owner]
    if isinstance(selector, Dustin):  # one list for all layers and heads, from every draft head that is named
        own = selector.alignment.sources.flatten(0, 2).unique(dim=0)
    rows = [scores.layers.index(layer) * heads_per_layer + head for layer, head in own.tolist()]
    mass = scores.mass.double()[:, :, rows].mean(2)
    return mass if selector.per_query else mass.mean(1, keepdim=True)


@settings(max_examples=40)
@given(budget=BUDGETS)
def test_lists_of_a_round(method, pair, begun, make_selector, budget):
    round_ = begun.select_again(make_selector(pair, method, allocation="flat", **budget))
    selection, lengths = round_.selection, begun.lengths.tolist()
    sinks, recent = (budget["sinks"], budget["recent"]) if method in ("outrider", "dustin") else (0, 0)
    dense_layers = 2 if method == "specattn" and "top_p" in budget else 0
    assert selection.layers == tuple(range(dense_layers, 3))
    assert selection.lengths.tolist() == lengths
    for number, b, owner in torch.cartesian_prod(*map(torch.arange, selection.counts.shape)).tolist():
        length, row = lengths[b], selection.indices[number, b, owner].tolist()
        count = int(selection.counts[number, b, owner])
        listed, always = row[:count], {i for i in range(length) if i < sinks or i >= length - recent}
        assert set(row[count:]) <= {-1}
        assert listed == sorted(set(listed))
        assert all(0 <= i < length for i in listed)
        assert always <= set(listed)
        if length < budget["min_context"]:
            assert count == length, "below min_context everything is kept"
        elif "keep" in budget:
            assert count == min(max(math.ceil(budget["keep"] * length - 1e-9), len(always)), length)
        else:
            for mass in owners_mass(round_, number, owner)[b]:
                assert mass[listed].sum() >= budget["top_p"] * mass[:length].sum() * (1 - 1e-6)


@settings(max_examples=40)
@given(budget=BUDGETS.filter(lambda budget: "keep" in budget))
def test_lists_of_several_lengths(pair, begun, make_selector, budget):
    """Fitted lists have together what equal ones have before these are rounded up; each holds the heaviest tokens."""
    fitted = begun.select_again(make_selector(pair, "outrider", allocation="fitted", **budget))
    lists = fitted.selection.counts[:, 0].numel()
    for b, length in enumerate(begun.lengths.tolist()):
        always = min(budget["sinks"] + budget["recent"], length)
        exact = length if length < budget["min_context"] else min(max(budget["keep"] * length, always), length)
        assert abs(int(fitted.selection.counts[:, b].sum()) - lists * exact) <= 0.5001
    for number, b, owner in torch.cartesian_prod(*map(torch.arange, fitted.selection.counts.shape)).tolist():
        length, count = int(begun.lengths[b]), int(fitted.selection.counts[number, b, owner])
        row = fitted.selection.indices[number, b, owner]
        always = {i for i in range(length) if i < budget["sinks"] or i >= length - budget["recent"]}
        listed = row[:count].tolist()
        assert (row[count:] == -1).all()
        assert listed == sorted(set(listed)) and all(0 <= i < length for i in listed) and always <= set(listed)
        mass = owners_mass(fitted, number, owner)[b, 0]
        chosen, others = (sorted(tokens) for tokens in (set(listed) - always, set(range(length)) - set(listed)))
        if chosen and others:
            assert min(mass[chosen]) >= max(mass[others]) - 1e-7


def test_top_k_keeps_the_heaviest_tokens(pair, begun, make_selector):
    """No token left out weighs more than a listed one, but for the sinks and the recent window."""
    round_ = begun.select_again(make_selector(pair, "outrider", keep=0.4, sinks=2, recent=4, allocation="flat"))
    for number in range(3):
        for owner in range(2):
            mass = owners_mass(round_, number, owner)[0, 0]
            listed = set(round_.selection.indices[number, 0, owner].tolist()) - {-1}
            length = int(begun.lengths[0])
            chosen = listed - {0, 1, *range(length - 4, length)}
            others = set(range(length)) - listed
            assert len(chosen) > 5
            assert len(others) > 5
            assert min(mass[sorted(chosen)]) >= max(mass[sorted(others)]) - 1e-7


def test_scores_are_the_mass_on_cached_tokens(method, pair, begun, make_selector):
    """Masses of every scored head and query: none behind the cached tokens, at most 1 in sum, most of it on the past."""
    round_ = begun.select_again(make_selector(pair, method, keep=0.5))
    mass, lengths = round_.scores.mass, begun.lengths
    assert int(lengths.max()) <= mass.shape[-1] <= begun.target_cache.capacity
    behind = torch.arange(mass.shape[-1]) >= lengths[:, None]
    assert (mass.masked_select(behind[:, None, None]) == 0).all()
    assert (mass >= 0).all()
    assert (mass.sum(-1) <= 1 + 1e-5).all()
    assert mass.sum(-1)[lengths > 20].mean() > 0.5


@pytest.mark.parametrize("draft_family", ["llama", "qwen3"])
def test_scores_equal_the_attention_weights_of_the_draft(draft_family, make_model, begin_round, random_prompts, independent):
    """Every row of the scores equals the attention weights that transformers itself reports."""
    pair, [prompt] = (make_model("llama"), make_model(draft_family, 3)), random_prompts([30])
    round_ = begin_round(pair, [prompt], "specattn", keep=0.5)
    sequence = torch.tensor([prompt[:-1] + round_.tokens[0].tolist()])
    with torch.inference_mode():
        attentions = independent(pair[1])(input_ids=sequence, output_attentions=True).attentions
    length = len(prompt) - 1
    wanted = torch.cat([attentions[layer][0, :, length:, :length] for layer in round_.scores.layers])  # [R, T, S]
    torch.testing.assert_close(round_.scores.mass[0, ..., :length].transpose(0, 1), wanted, rtol=1e-4, atol=1e-5)


def test_builtin_pair(method, builtin_pair, begin_round, make_selector, book):
    tokens = builtin_pair[0].tokenizer(book, verbose=False)["input_ids"]
    begun = begin_round(builtin_pair, [tokens[3000:3200], tokens[7000:7120]], method, keep=0.1, recent=8, allocation="flat")
    for b, length in enumerate(begun.lengths.tolist()):
        assert set(begun.selection.counts[:, b].flatten().tolist()) == {math.ceil(length / 10)}
