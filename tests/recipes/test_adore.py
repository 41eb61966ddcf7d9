"""The recipe of controllers: labels are what the target's own attention puts first, and a short training learns them."""

from __future__ import annotations

import random

import pytest
import torch

from outrider.decoding.pair import find_controller
from outrider.guidance.controller import Controller

adore = pytest.importorskip("adore.train")
SIZE = 2 * adore.CHUNK


@pytest.fixture(scope="module")
def window(builtin_pair, book):
    """Two chunks of a book, as the built-in target looks at them."""
    tokens = torch.tensor(builtin_pair[0].tokenizer(book)["input_ids"][:SIZE])
    return adore.label(builtin_pair[0], tokens, 24, 64, random.Random(0))


def test_labels_are_the_target_s_attention(builtin_pair, book, window, independent):
    tokens = torch.tensor([builtin_pair[0].tokenizer(book)["input_ids"][:SIZE]])
    with torch.inference_mode():
        every = independent(builtin_pair[0])(input_ids=tokens, use_cache=False, output_attentions=True).attentions
    attention = torch.stack(every).mean((0, 1, 2))  # [S, S], over layers and heads
    labels = window.labels(torch.arange(24))
    assert len(set(window.starts.tolist())) == 24 and int(window.starts.min()) >= 64
    for row, start in enumerate(window.starts.tolist()):
        mass = attention[start : start + adore.ROUND, :start].mean(0)
        torch.testing.assert_close(window.mass[row, :start].float() / 1000, mass, rtol=0.01, atol=1e-5)
        assert (window.mass[row, start:] == 0).all()
        tenth = mass.topk(int(0.1 * start)).indices
        assert float((labels[row, tenth] > 0).float().mean()) > 0.95, "but for rounding of the last ones"
        sizes = [int((labels[row] > least).sum()) for least in (0.1, 0.4, 0.7)]
        assert sizes == [-int(-share * start // 1) for share in (0.1, 0.05, 0.02)]


def test_the_built_in_controller_beats_recent_tokens(builtin_pair, window):
    """On a book that it was not trained on: against the first four tokens and the last ones, which hold most of the mass."""
    controller = find_controller(None, builtin_pair[0]).controller
    for share, held in adore.held(window, controller).items():
        ends = []
        for row, start in enumerate(window.starts.tolist()):
            mass, count = window.mass[row, :start].float(), max(1, round(float(share) * start))
            listed = range(start - count, start) if count < 8 else [*range(4), *range(start - count + 4, start)]
            ends.append(float(mass[list(listed)].sum() / mass.sum()))
        assert held > sum(ends) / len(ends), share


def test_a_short_training_learns(window):
    def trained(steps: int) -> tuple[Controller, list[float]]:
        torch.manual_seed(0)
        controller = Controller(window.embeddings.shape[-1], width=16)
        return controller, list(adore.train(controller, [window], steps, 4, seed=0))

    torch.manual_seed(0)
    untrained = adore.held(window, Controller(window.embeddings.shape[-1], width=16))
    controller, losses = trained(24)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    found, best = adore.held(window, controller), adore.held(window)
    for share, held in found.items():
        assert 1.5 * max(float(share), untrained[share]) < held <= best[share]
    (one, losses), (other, same) = trained(2), trained(2)
    assert losses == same and all(map(torch.equal, one.parameters(), other.parameters())), "it follows from the seed"
