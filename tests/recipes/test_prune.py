"""Pruning keeps the channels that matter, refits the rest, and hands over weights that training can start from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer


def tiny(hidden: int = 96, seed: int = 0):
    from pair.model import CONFIGS, Model

    torch.manual_seed(seed)
    model = Model(replace(CONFIGS["tiny"], vocab=512, hidden=hidden))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return model


WINDOWS = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(1))


def test_keeping_every_channel_changes_nothing() -> None:
    from pair.prune import prune, second_moments

    model = tiny()
    same = prune(model, second_moments(model, WINDOWS), 96)
    with torch.no_grad():
        torch.testing.assert_close(same(WINDOWS), model(WINDOWS), rtol=2e-2, atol=2e-2)


def test_silent_channels_go_first() -> None:
    """A model whose last 40 channels do nothing loses nothing with them."""
    from pair.prune import prune, second_moments

    model = tiny()
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp.down_proj.weight[:, 56:] = 0
        narrow = prune(model, second_moments(model, WINDOWS), 56)
        assert narrow.config.hidden == 56
        torch.testing.assert_close(narrow(WINDOWS), model(WINDOWS), rtol=2e-2, atol=2e-2)
        for layer, wide in zip(narrow.layers, model.layers, strict=True):
            assert torch.equal(layer.mlp.gate_proj.weight, wide.mlp.gate_proj.weight[:56])


def test_the_refitted_projection_is_closer_than_the_cut_one() -> None:
    from pair.prune import prune, second_moments

    model = tiny()
    moments = second_moments(model, WINDOWS)
    refitted = prune(model, moments, 48)
    cut = prune(model, [torch.diag(m.diagonal()) for m in moments], 48)  # uncorrelated channels: nothing to refit
    with torch.no_grad():
        wanted = model(WINDOWS)
        assert (refitted(WINDOWS) - wanted).norm() < 0.9 * (cut(WINDOWS) - wanted).norm()


@pytest.mark.parametrize("hidden", [0, 97])
def test_width_out_of_range(hidden: int) -> None:
    from pair.prune import prune

    with pytest.raises(ValueError, match=f"between 1 and 96, got {hidden}"):
        prune(tiny(), [torch.eye(96, dtype=torch.float64)] * 2, hidden)


def test_training_starts_from_given_weights_and_refuses_others(tokenizer_file: Path, token_file: Path, tmp_path: Path) -> None:
    from pair.export import export
    from pair.schedule import Schedule
    from pair.train import Settings, load_model, train

    model = tiny()
    export(model, Tokenizer.from_file(str(tokenizer_file)), tmp_path / "folder", torch.float32)
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in load_model(tmp_path / "folder").state_dict().items())
    schedule = Schedule(tokens=4 * 512, batch_tokens=512, short=128, long=256, long_share=0.5, warmup=2)
    frozen = Settings(model.config, schedule, rate=0.0)
    options = {"workers": 0, "log_every": 1000, "micro_tokens": 256, "max_steps": 1}
    run = train(frozen, token_file, tokenizer_file, tmp_path / "run.pt", None, tmp_path / "folder", **options)
    assert run.step == 1
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in run.model.state_dict().items())
    other = Settings(replace(model.config, hidden=64), schedule)
    with pytest.raises(ValueError, match="initial weights are of another model"):
        train(other, token_file, tokenizer_file, tmp_path / "other.pt", None, tmp_path / "folder", **options)
