"""Controllers against loops, and their files: nothing later matters, and every mistake in a file is named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.errors import AlignmentError
from outrider.guidance.controller import Controller, ControllerFile, load, save
from outrider.guidance.files import ModelIdentity

E, W, S, T = 10, 4, 70, 3
TARGET = ModelIdentity("big", "sha256:1")
METADATA = {
    "format": "outrider-controller",
    "version": "1",
    "target.name": "big",
    "target.digest": "sha256:1",
    "text": "book",
    "text_digest": "abc",
    "tokens": "9",
}


@pytest.fixture
def controller() -> Controller:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Controller(E, W)
        made.distance.data.normal_()
        made.position.data.normal_()
    return made.requires_grad_(False)


@pytest.fixture
def embeddings() -> torch.Tensor:
    return torch.randn(2, S, E, generator=torch.Generator().manual_seed(1))


def test_states_are_those_of_a_gru(controller, embeddings):
    gru = controller.gru
    for b in range(2):
        state = torch.zeros(W)
        for token in range(S):
            row = embeddings[b, token]
            x = controller.embed.weight @ ((row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt())
            given, kept = gru.weight_ih_l0 @ x + gru.bias_ih_l0, gru.weight_hh_l0 @ state + gru.bias_hh_l0
            reset, update = ((given[part] + kept[part]).sigmoid() for part in (slice(0, W), slice(W, 2 * W)))
            new = (given[2 * W :] + reset * kept[2 * W :]).tanh()
            state = update * state + (1 - update) * new
            torch.testing.assert_close(controller.states(embeddings)[b, token], state)


def test_scores_are_the_formula(controller, embeddings):
    states = controller.states(embeddings)
    lengths = torch.tensor([60, 41])
    asking = torch.stack([states[b, n : n + T] for b, n in enumerate(lengths.tolist())])
    logits = controller.logits(asking, states, lengths)
    for b, n in enumerate(lengths.tolist()):
        for t in range(T):
            for token in range(n):
                wanted = controller.asks(asking[b, t]) @ states[b, token]
                for table, count in ((controller.distance, n + t - token), (controller.position, token + 1)):
                    wanted = wanted + table[min(int(2 * math.log2(count)), len(table) - 1)]
                assert float(logits[b, t, token]) == pytest.approx(float(wanted), abs=1e-5)


def test_nothing_later_matters(controller, embeddings):
    changed = embeddings.clone()
    changed[:, 50:] = 7.0
    states, others = controller.states(embeddings), controller.states(changed)
    assert torch.equal(states[:, :50], others[:, :50])
    assert not torch.equal(states[:, 50:], others[:, 50:])
    on = controller.states(embeddings[:, 30:], states[:, 29])
    torch.testing.assert_close(on, states[:, 30:], msg="a state says all about what was before")


def test_a_file_comes_back(controller, tmp_path):
    path = tmp_path / "controller.safetensors"
    file = ControllerFile(target=TARGET, text="book", text_digest="abc", tokens=9, controller=controller)
    save(file, path)
    found = load(path, target=TARGET)
    assert replace(found, controller=controller) == file
    for name, weight in controller.state_dict().items():
        torch.testing.assert_close(found.controller.state_dict()[name], weight.half().float(), rtol=0, atol=0)
    assert not any(weight.requires_grad for weight in found.controller.parameters())
    assert [entry.name for entry in tmp_path.iterdir()] == ["controller.safetensors"], "nothing is left behind"
    with pytest.raises(AlignmentError, match=r"controller file .*: made for the target big .*but the target here is small"):
        load(path, target=ModelIdentity("small", "sha256:2"))
    with pytest.raises(AlignmentError, match=r"controller file .*: cannot be written"):
        save(file, tmp_path / "none" / "controller.safetensors")


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        ("format", "outrider-alignment", "format: got 'outrider-alignment'; allowed: 'outrider-controller'"),
        ("version", "2", "version: got '2'; allowed: '1'"),
        ("target.digest", None, "target.digest: missing"),
        ("text", None, "text: missing"),
        ("tokens", "many", "tokens: got 'many'; allowed: a whole number"),
    ],
)
def test_what_a_file_says_is_checked(controller, tmp_path, name, value, complaint):
    path = tmp_path / "controller.safetensors"
    said = METADATA | {name: value}
    weights = {name: weight.half() for name, weight in controller.state_dict().items()}
    save_file(weights, path, metadata={name: value for name, value in said.items() if value is not None})
    with pytest.raises(AlignmentError, match=complaint):
        load(path, target=None)


def test_weights_are_checked(controller, tmp_path):
    path = tmp_path / "controller.safetensors"
    file = ControllerFile(target=TARGET, text="book", text_digest="abc", tokens=9, controller=controller)
    save(file, path)
    weights = load_file(path)
    for change, complaint in (
        ({"embed.weight": None}, "embed.weight: missing"),
        ({"distance": torch.zeros(3)}, "weights: .*size mismatch for distance"),
        ({"asks.bias": torch.full((W,), torch.nan)}, "weights: some are no numbers"),
    ):
        changed = {name: weight for name, weight in (weights | change).items() if weight is not None}
        save_file(changed, path, metadata=METADATA)
        with pytest.raises(AlignmentError, match=f"(?s){complaint}"):
            load(path, target=None)
    path.write_bytes(b"nothing")
    with pytest.raises(AlignmentError, match=r"controller file .*: cannot be read"):
        load(path, target=None)
    with pytest.raises(AlignmentError, match=r"controller file .*: cannot be read"):
        load(tmp_path / "none.safetensors", target=None)
