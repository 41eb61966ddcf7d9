"""The race: its winners follow the distribution, positions and seeds know nothing of each other, and nobody's batch matters."""

from __future__ import annotations

import pytest
import torch

from outrider.decoding.noise import KEY_BITS, Noise, key_of

PROBS = torch.tensor([0.4, 0.3, 0.2, 0.0, 0.0999, 0.0001])


def noise_of(seeds, first=0):
    return Noise(keys=torch.tensor([key_of(seed) for seed in seeds]), first=torch.full((len(seeds),), first))


def counts(choices):
    return torch.bincount(choices.flatten(), minlength=len(PROBS)).double()


def check_shares(choices):
    found, wanted = counts(choices), PROBS.double() * choices.numel()
    assert found[PROBS == 0].sum() == 0
    some = wanted > 0
    assert float(((found - wanted)[some] ** 2 / wanted[some]).sum()) < 18.5, "chi-square of 4 degrees of freedom, p = 0.001"


@pytest.mark.parametrize("seeds, positions", [(1, 200_000), (4000, 50), (200_000, 1)])
def test_winners_follow_the_distribution(seeds, positions):
    """Over the positions of one text, over many seeds, and both."""
    keys = torch.randint(2**KEY_BITS, (seeds,), generator=torch.Generator().manual_seed(3))
    noise = Noise(keys=keys, first=torch.full((seeds,), 1000))
    check_shares(noise.choose(PROBS.expand(seeds, positions, -1)))


def test_neighbours_know_nothing_of_each_other():
    """Pairs of choices at adjacent positions, and of adjacent seeds, are as independent draws."""
    choices = noise_of(range(3000)).choose(PROBS.expand(3000, 60, -1))
    for one, other in ((choices[:, 1:], choices[:, :-1]), (choices[1:], choices[:-1])):
        pairs = torch.bincount((one * 6 + other).flatten(), minlength=36).double()
        wanted = (PROBS[:, None] * PROBS).flatten().double() * one.numel()
        some = wanted > 5
        freedom = int(some.sum()) - 1
        assert float(((pairs - wanted)[some] ** 2 / wanted[some]).sum()) < freedom + 4 * (2 * freedom) ** 0.5


def test_a_token_as_rare_as_one_in_ten_million_is_drawn_as_often():
    """Random numbers of 24 bits would draw it too often, or never."""
    rare = torch.tensor([1 - 1e-5, 1e-5])
    keys = torch.arange(3_000_000) * 977
    found = int(Noise(keys=keys, first=torch.zeros_like(keys)).choose(rare.expand(len(keys), 1, -1)).sum())
    assert abs(found - 30) < 4 * 30**0.5


def test_a_choice_depends_on_seed_and_position_alone():
    noise = noise_of([5, 6, 7], first=10)
    together = noise.choose(PROBS.expand(3, 8, -1))
    for row, seed in enumerate((5, 6, 7)):
        for at in range(8):
            [[alone]] = noise_of([seed], first=10 + at).choose(PROBS.expand(1, 1, -1)).tolist()
            assert alone == together[row, at]
    assert torch.equal(noise.choose(PROBS.expand(3, 3, -1), skip=5), together[:, 5:])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_near_distributions_mostly_choose_the_same():
    """1 - t of all draws at most, (1 - t) / (1 + t) at least, t being the distance in total variation."""
    other = torch.tensor([0.3, 0.35, 0.2, 0.05, 0.0999, 0.0001])
    noise = noise_of(range(20_000))
    ours, theirs = (noise.choose(probs.expand(20_000, 1, -1)) for probs in (PROBS, other))
    same, t = float((ours == theirs).double().mean()), float((PROBS - other).abs().sum() / 2)
    assert (1 - t) / (1 + t) - 0.01 < same < 1 - t + 0.01


def test_one_hot_is_greedy_and_keys_fit_into_doubles():
    assert noise_of([1]).choose(torch.eye(6)[None]).tolist() == [[0, 1, 2, 3, 4, 5]]
    keys = [key_of(seed) for seed in (*range(1000), 2**63 - 1)]
    assert len(set(keys)) == 1001 and all(0 <= key < 2**KEY_BITS == int(float(2**KEY_BITS)) for key in keys)
