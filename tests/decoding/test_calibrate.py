"""The calibration run: real forwards, real scores, maps that hold what the models show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.config import Budget, SamplingParams
from outrider.decoding import unlisted
from outrider.decoding.calibrate import DEFAULT_MAPS, calibrate
from outrider.decoding.list_costs import one_list
from outrider.decoding.outrider import Outrider
from outrider.decoding.pair import find_alignment, identity, make_selector
from outrider.decoding.scoring import score
from outrider.errors import OptionError, PromptError
from outrider.guidance.alignment import save
from outrider.guidance.budgets import SHARES, WEIGHED, listed, rank
from outrider.guidance.selectors import SELECTORS

SMALL = {"text_name": "book", "tokens": 300, "rounds": 16, "queries_per_round": 3, "keep": 0.1, "budget_rounds": 4}


@pytest.fixture(scope="module")
def found(text_pair, book):
    """Both default maps and the joint Jaccard map of a small pair."""
    return calibrate(*text_pair, book[2000:3000], maps=(*DEFAULT_MAPS, "joint+jaccard"), **SMALL)


@pytest.mark.parametrize("family_of_itself", ["llama", "llama-mha", "gemma3"])
def test_a_model_is_mapped_onto_itself(family_of_itself, make_model, byte_tokenizer, book):
    """Nothing overlaps with a head more than the head itself: target == draft gives the identity."""
    model = make_model(family_of_itself, vocab_size=257, tokenizer=byte_tokenizer)
    maps = ("joint+jaccard", "monotone+average")
    file = calibrate(model, model, book[2000:3000], maps=maps, **SMALL)
    heads = model.spec.layers[0].query_heads
    jaccard, average = (file.maps[name].alignment.sources for name in maps)
    for layer, shape in enumerate(model.spec.layers):
        if shape.window is None:
            assert jaccard[layer].tolist() == [[[layer, head]] for head in range(heads)]
            assert average[layer, ..., 0].unique().tolist() == [layer]
        else:
            assert (jaccard[layer] == -1).all()
    assert file.maps["joint+jaccard"].quality["jaccard"] == 1
    assert file.maps["monotone+average"].quality["kl"] == pytest.approx(0, abs=1e-6)


def test_a_copy_with_noise_is_mapped_mostly_onto_itself(found, text_pair):
    sources = found.maps["joint+jaccard"].alignment.sources[:, :, 0]
    layers, heads = sources.shape[:2]
    wanted = torch.cartesian_prod(torch.arange(layers), torch.arange(heads)).view(layers, heads, 2)
    assert (sources == wanted).all(-1).float().mean() > 0.6


def test_file_names_what_was_calibrated(found, text_pair):
    assert (found.target, found.draft) == tuple(map(identity, text_pair))
    assert (found.text, found.tokens, found.rounds, found.queries_per_round, found.keep) == ("book", 300, 16, 3, 0.1)
    for entry in found.maps.values():
        assert 0 < entry.quality["recall"] <= 1


def test_file_survives_the_disk_and_guides_a_run(found, text_pair, method, tmp_path, make_engine):
    save(found, tmp_path / "a.json")
    loaded = find_alignment(tmp_path / "a.json", *text_pair)
    assert (loaded.target, loaded.draft, loaded.text_digest) == (found.target, found.draft, found.text_digest)
    for name, entry in found.maps.items():
        assert torch.equal(loaded.maps[name].alignment.sources, entry.alignment.sources)
        assert loaded.maps[name].quality == entry.quality
    config = make_engine(text_pair, mode="sparse", method=method).config
    [result] = Outrider(*text_pair, config, loaded).generate("A prompt of a few words", SamplingParams(max_new_tokens=8))
    assert result.statistics.kept_fraction < 0.9


def test_every_method_gets_a_fit_of_the_text_it_was_calibrated_on(found, text_pair, book):
    target = text_pair[0]
    cache = target.new_cache(1, 300)
    tokens = target.tokenizer(book[2000:3000], verbose=False)["input_ids"][:300]
    target.forward(torch.tensor([tokens]), cache, logits=False)
    for entry in found.maps.values():
        assert entry.alignment.unlisted.keys() == SELECTORS.keys()
        for fit in entry.alignment.unlisted.values():
            for layer in target.spec.full_layers:
                mean = cache.values(layer, 300)[0].mean(0)
                torch.testing.assert_close(fit.values[layer], mean, rtol=1e-4, atol=1e-5)
            assert fit.weights.shape == (len(target.spec.layers), target.spec.full_shape.query_heads)
            assert (fit.weights >= 0).all() and fit.weights.max() > 0


def test_fits_bring_outputs_nearer_to_dense_ones(text_pair, book, monkeypatch):
    """Of outputs, squared and summed over the rounds fitted on, all budgets in one: least squares find the best weights."""
    seen = []
    weigh = unlisted._products

    def record(out, dense, values, mass):
        seen.append((out.double(), dense.double(), values.double(), mass.double()))
        return weigh(out, dense, values, mass)

    monkeypatch.setattr(unlisted, "_products", record)
    monkeypatch.setattr(unlisted, "SELECTORS", {"sts": SELECTORS["sts"]})
    file = calibrate(*text_pair, book[2000:3000], maps=("proportional+jaccard",), **SMALL)
    weights = file.maps["proportional+jaccard"].alignment.unlisted["sts"].weights.double()
    layers = len(weights)

    def error(weights):
        total = torch.zeros_like(weights)
        for i, (out, dense, values, mass) in enumerate(seen):
            share = (weights[i % layers] * mass)[:, None, :, None]
            mixed = (1 - share) * out + share * values.repeat_interleave(out.shape[2] // len(values), 0)
            total[i % layers] += (mixed - dense).square().sum((0, 1, 3))
        return total

    best = error(weights)
    assert (best <= error(torch.zeros_like(weights))).all() and (best < 0.99 * error(torch.zeros_like(weights))).any()
    for change in (0.9, 1.1):
        assert (best <= error(weights * change) + 1e-12).all()


def test_costs_are_those_of_the_lists(found, text_pair):
    """Of method outrider's map alone: they fall to nothing at the whole cache, and lists follow them."""
    target = text_pair[0].spec
    assert [name for name, entry in found.maps.items() if entry.alignment.costs is not None] == ["joint+divergence"]
    costs = found.maps["joint+divergence"].alignment.costs
    assert costs.values.shape == (len(target.layers), target.full_shape.kv_heads, len(costs.shares))
    assert (costs.values[..., 0] > 0).all() and (costs.values[..., -1] < 1e-6 * costs.values[..., 0]).all()


def test_a_list_alone_costs_the_divergence_it_makes(text_pair, book):
    """At the share at which it is measured a cost is the KL divergence of predictions, all else dense."""
    target, draft = text_pair
    ids = target.tokenizer(book[2000:3000])["input_ids"][:300]
    file = calibrate(*text_pair, book[2000:3000], maps=("joint+divergence",), **(SMALL | {"rounds": 2, "budget_rounds": 2}))
    alignment = file.maps["joint+divergence"].alignment
    t = 3
    cache, start = target.new_cache(1, 300), 300 - t  # of two rounds the first one lies in the tokens that every list holds
    draft_cache = draft.new_cache(1, 300)
    for model, own in ((target, cache), (draft, draft_cache)):
        model.forward(torch.tensor([ids[:start]]), own, logits=False)
        own.advance(start)
    part = torch.tensor([ids[start : start + t]])
    queries = draft.forward(part, draft_cache, record_queries=True, logits=False).queries
    selector = make_selector(target, draft, "outrider", replace(alignment, costs=None), Budget(keep=1.0), t - 1)
    mass = score(draft, draft_cache, queries, torch.tensor([start]), selector.draft_layers, per_query=False).mass[0, 0]
    dense = target.forward(part, cache).logits[0].log_softmax(-1)
    count = listed(start, 68, (WEIGHED,))[0]
    order = rank(mass[selector.rows].mean(2), start, 4, 64)
    for layer, head in ((0, 0), (1, 1)):
        alone = one_list(layer, head, order[layer], count)
        sparse = target.forward(part, cache, selection=alone).logits[0].log_softmax(-1)
        wanted = float((dense.double().exp() * (dense.double() - sparse.double())).sum(-1).mean()) / 2
        assert wanted > 1e-7
        assert float(alignment.costs.values[layer, head, SHARES.index(WEIGHED)]) == pytest.approx(wanted, rel=1e-2)


def test_the_same_run_twice_is_the_same_file(found, text_pair, book):
    again = calibrate(*text_pair, book[2000:3000], maps=("joint+divergence",), **(SMALL | {"prefill_chunk": 77}))
    first = found.maps["joint+divergence"].alignment.sources
    assert torch.equal(again.maps["joint+divergence"].alignment.sources, first), "and chunks do not matter"
    assert again.text_digest == found.text_digest


def test_progress(text_pair, book):
    seen = []
    calibrate(*text_pair, book[2000:3000], maps=("joint+divergence",), progress=lambda *step: seen.append(step), **SMALL)
    assert {what for what, _, _ in seen} == {
        "read text with the draft",
        "read text with the target",
        "compare layers",
        "fit what stands for unlisted tokens",
        "measure lists",
    }
    assert all(done <= of for _, done, of in seen)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"maps": ("joint+magic",)}, OptionError, r"maps: got 'joint\+magic'; allowed: .*joint\+divergence"),
        ({"maps": ("joint",)}, OptionError, "maps: got 'joint'"),
        ({"keep": 0.0}, OptionError, "keep: got 0.0"),
        ({"rounds": 1}, OptionError, "rounds: got 1"),
        ({"budget_rounds": -1}, OptionError, "budget-rounds: got -1; allowed: a whole number >= 0"),
        ({"queries_per_round": 0}, OptionError, "queries-per-round: got 0"),
        ({"queries_per_round": 17}, OptionError, r"queries-per-round: got 17; allowed: 1 \.\. 16"),
        ({"tokens": 20}, OptionError, "tokens: got 20; allowed: .*16 rounds"),
        ({"tokens": 513}, OptionError, "tokens: got 513; allowed: .* 512"),
        ({"tokens": 400}, PromptError, "text book: got 350 tokens; allowed: at least --tokens 400"),
    ],
)
def test_bad_options(options, error, message, text_pair, book):
    with pytest.raises(error, match=message):
        calibrate(*text_pair, "x" * 350, **(SMALL | options))


def test_text_needs_a_tokenizer(make_pair):
    with pytest.raises(PromptError, match="has no tokenizer"):
        calibrate(*make_pair("llama"), "text" * 200, **SMALL)
