"""The recipe's model is Qwen3, Muon orthogonalises, a resumed run is the uninterrupted one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer


@pytest.fixture
def settings():
    from pair.model import CONFIGS
    from pair.schedule import Schedule
    from pair.train import Settings

    schedule = Schedule(tokens=12 * 512, batch_tokens=512, short=128, long=256, long_share=0.5, warmup=2)
    return Settings(replace(CONFIGS["tiny"], vocab=512), schedule)


def test_exported_model_is_qwen3(tokenizer_file: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from pair.export import export
    from pair.model import CONFIGS, Model

    torch.manual_seed(0)
    model = Model(replace(CONFIGS["tiny"], vocab=512))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    export(model, tokenizer, tmp_path, torch.float32)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(512, (2, 300))
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The old sea, 1905.\n\n“Never!” [Question: what is"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    assert loaded.eos_token == loaded.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("distil", [False, True])
def test_resumed_run_equals_uninterrupted_one(
    settings, distil: bool, token_file: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    from pair.train import train

    options = {"workers": 0, "log_every": 1000, "micro_tokens": 256}
    teacher = None
    if distil:
        teacher = tmp_path / "teacher.pt"
        train(settings, token_file, tokenizer_file, teacher, max_steps=2, **options)
    whole = train(settings, token_file, tokenizer_file, tmp_path / "whole.pt", teacher, **options)
    for stop in (4, 4, None):
        parts = train(settings, token_file, tokenizer_file, tmp_path / "parts.pt", teacher, max_steps=stop, **options)
    assert whole.step == parts.step == 12
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="other settings"):
        train(replace(settings, seed=9), token_file, tokenizer_file, tmp_path / "whole.pt", teacher, **options)


def test_training_lowers_the_loss(settings, token_file: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    from pair.data import Batches, Windows
    from pair.model import next_token_loss
    from pair.train import train

    options = {"workers": 0, "log_every": 1000}
    settings = replace(settings, schedule=replace(settings.schedule, tokens=40 * 512))
    run = train(settings, token_file, tokenizer_file, tmp_path / "run.pt", **options)
    windows = Windows(np.fromfile(token_file, dtype="<u2"), Tokenizer.from_file(str(tokenizer_file)), 128, seed=99)
    with torch.no_grad():
        assert next_token_loss(run.model, Batches(windows, 8)[0]) < 4.5 < torch.log(torch.tensor(512.0))


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 32, 96), (2, 96, 32)])
def test_muon_moves_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    from pair.muon import orthogonalise

    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.max() < 1.3
    assert values.flatten().quantile(0.05) > 0.5
    alone = torch.stack([orthogonalise(m[None])[0] for m in matrices])
    torch.testing.assert_close(alone, orthogonalise(matrices), rtol=1e-4, atol=1e-4)


def test_muon_refuses_vectors() -> None:
    from pair.muon import Muon

    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.ones(4))])


def test_schedule_warms_up_holds_and_decays_to_zero(settings) -> None:
    from pair.schedule import Schedule

    schedule = Schedule(tokens=1000 * 262_144)
    assert schedule.stages() == [(8192, 0, 850), (32768, 850, 1000)]
    assert schedule.rate(0) == pytest.approx(0.02)
    assert schedule.rate(49) == schedule.rate(499) == 1.0
    assert schedule.rate(750) == pytest.approx(0.5)
    assert schedule.rate(999) == pytest.approx(0.002)
    with pytest.raises(ValueError, match="whole number"):
        Schedule(tokens=1, batch_tokens=1000)
