"""Calibration finds planted structure: target heads that are noisy copies of known draft heads."""

from __future__ import annotations

import pytest
import torch

from outrider.errors import OptionError
from outrider.guidance.calibration import Calibration
from outrider.guidance.head_map import HEAD_MAPS
from outrider.guidance.layer_map import LAYER_MAPS

N, Ld, Hd, Lt, Hq, Hkv, S = 6, 3, 4, 6, 4, 2, 192
LENGTHS = torch.tensor([192, 180, 150, 192, 170, 160])


def planted(masses, layer_of: list[int]):
    """Draft masses, and per target layer masses [N, Hq, S] copied from draft layer layer_of[t], head h of KV group h // 2."""
    draft = masses["cut"](masses["peaked"](N, Ld, Hd, S), LENGTHS)
    head_of = torch.randint(Hd, (Lt, Hkv), generator=torch.Generator().manual_seed(5)).repeat_interleave(Hq // Hkv, 1)
    target = [masses["noisy"](draft[:, layer_of[t], head_of[t]], seed=t) for t in range(Lt)]
    return draft, target, head_of


def calibrated(draft, target, **options) -> Calibration:
    options = {"num_target_layers": Lt, "kv_heads": Hkv, "keep": 0.1, "sinks": 2, "recent": 6, "jaccard_k": 16} | options
    calibration = Calibration(draft, LENGTHS, **options)
    for layer, mass in enumerate(target):
        calibration.add_target_layer(layer, mass)
    return calibration


SHUFFLED, RISING = [2, 0, 1, 1, 2, 0], [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("layer_of", [SHUFFLED, RISING], ids=["shuffled", "rising"])
def test_joint_maps_find_layer_and_head(masses, layer_of):
    draft, target, head_of = planted(masses, layer_of)
    calibration = calibrated(draft, target)
    expected = torch.stack((torch.tensor(layer_of).unsqueeze(1).expand(Lt, Hq), head_of), dim=-1)
    by_jaccard = calibration.fit("joint", "jaccard")
    assert by_jaccard.alignment.sources.shape == (Lt, Hq, 1, 2)
    assert torch.equal(by_jaccard.alignment.sources[:, :, 0], expected)
    by_recall = calibration.fit("joint", "recall")
    for greedy in (by_recall, calibration.fit("joint", "divergence")):
        assert greedy.alignment.sources.shape[1] == Hkv
        assert torch.equal(greedy.alignment.sources[:, :, 0], expected[:, :: Hq // Hkv])
    assert by_recall.quality["recall"] > 0.6 and by_jaccard.quality["recall"] > 0.6 and by_jaccard.quality["jaccard"] > 0.4


def test_joint_average_takes_the_layer_of_least_kl(masses):
    """Target heads copy all heads of a draft layer, so that head averages match."""
    draft, _, _ = planted(masses, SHUFFLED)
    target = [masses["noisy"](draft[:, layer], seed=t) for t, layer in enumerate(SHUFFLED)]
    sources = calibrated(draft, target).fit("joint", "average").alignment.sources
    assert sources.shape == (Lt, 1, Hd, 2)
    assert sources[:, 0, :, 0].tolist() == [[layer] * Hd for layer in SHUFFLED]
    assert sources[:, 0, :, 1].tolist() == [list(range(Hd))] * Lt


def test_monotone_finds_rising_layers_and_beats_proportional(masses):
    draft, _, _ = planted(masses, RISING)
    target = [masses["noisy"](draft[:, layer], seed=t) for t, layer in enumerate(RISING)]
    calibration = calibrated(draft, target)
    found = calibration.fit("monotone", "average")
    assert found.alignment.sources[:, 0, 0, 0].tolist() == RISING
    proportional = calibration.fit("proportional", "average")
    assert proportional.alignment.sources[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert found.quality["kl"] < proportional.quality["kl"]
    assert found.quality["recall"] > proportional.quality["recall"]


def test_every_pair_of_maps(masses):
    draft, target, _ = planted(masses, SHUFFLED)
    calibration = calibrated(draft, target)
    for layer_map in LAYER_MAPS:
        for head_map in HEAD_MAPS:
            fitted = calibration.fit(layer_map, head_map)
            assert fitted.name == f"{layer_map}+{head_map}"
            sources = fitted.alignment.sources
            assert sources.dtype == torch.int64 and sources.shape[0] == Lt and sources.shape[-1] == 2
            assert (sources >= 0).all() and (sources[..., 0] < Ld).all() and (sources[..., 1] < Hd).all()
            if layer_map != "joint":
                assert (sources[..., 0].flatten(1).amax(1) == sources[..., 0].flatten(1).amin(1)).all()
            assert 0 <= fitted.quality["recall"] <= 1
            assert ("jaccard" in fitted.quality) == (head_map == "jaccard")
            assert ("kl" in fitted.quality) == (layer_map != "joint" or head_map in ("average", "divergence"))
    recall = {(a, b): calibration.fit(a, b).quality["recall"] for a in LAYER_MAPS for b in HEAD_MAPS}
    assert recall["joint", "recall"] > recall["proportional", "recall"]
    kl = {(a, b): calibration.fit(a, b).quality.get("kl") for a in LAYER_MAPS for b in HEAD_MAPS}
    assert kl["joint", "divergence"] < kl["proportional", "divergence"]


def test_quality_is_judged_on_rounds_not_fitted_on(masses):
    """Rounds to judge by that are pure noise: a perfect fit on the others must not show."""
    draft, target, _ = planted(masses, SHUFFLED)
    noise = masses["cut"](masses["peaked"](Lt, N, Hq, S, seed=9).flatten(0, 1), LENGTHS.repeat(Lt)).unflatten(0, (Lt, N))
    for mass, wrong in zip(target, noise, strict=True):
        mass[1::2] = wrong[1::2]
    calibration = calibrated(draft, target)
    assert calibration.fit("joint", "jaccard").alignment.sources[:, 0, 0, 0].tolist() == SHUFFLED
    assert calibration.fit("joint", "recall").quality["recall"] < 0.3


def test_layers_never_added_have_no_sources(masses):
    draft, target, _ = planted(masses, RISING)
    calibration = calibrated(draft, [], draft_layers=(1, 4, 9))
    for layer in (1, 4):
        calibration.add_target_layer(layer, target[layer])
    for head_map in HEAD_MAPS:
        sources = calibration.fit("joint", head_map).alignment.sources
        assert (sources[[0, 2, 3, 5]] == -1).all()
        assert (sources[[1, 4]] >= 0).all()
        assert set(sources[[1, 4], ..., 0].flatten().tolist()) <= {1, 4, 9}
    assert calibration.fit("joint", "jaccard").alignment.sources[4, 0, 0, 0] == 9


def test_options(masses):
    draft, target, _ = planted(masses, RISING)
    calibration = calibrated(draft, [])
    with pytest.raises(OptionError, match="target layers"):
        calibration.fit("joint", "recall")
    calibration.add_target_layer(0, target[0])
    with pytest.raises(OptionError, match="'best'; allowed: average, jaccard, recall, divergence"):
        calibration.fit("joint", "best")
    with pytest.raises(OptionError, match="'depth'; allowed: proportional, monotone, joint"):
        calibration.fit("depth", "recall")
    with pytest.raises(OptionError, match="two rounds"):
        Calibration(draft[:1], LENGTHS[:1], num_target_layers=Lt, kv_heads=Hkv, keep=0.1)
    for layer, mass in ((Lt, target[0]), (0, target[0][:, :3]), (0, target[0][..., 1:]), (0, target[0][1:]), (0, target[0][0])):
        with pytest.raises(OptionError, match="target"):
            calibration.add_target_layer(layer, mass)
