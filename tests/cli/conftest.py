"""A tiny random pair in folders, a text both can read, and the command line run in this process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from outrider.cli.main import run

CONTEXT = 2048
PROSE = "the a river house storm night captain letter walked spoke toward under quiet grey old and then of with, said."
WORDS = PROSE.split()


@dataclass(frozen=True)
class Outcome:
    """What one call of the command line did."""

    code: int
    out: str
    err: str


def prose(words: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def train_tokenizer(text: str, vocabulary: int = 320) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.4,
        eos_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """target/, draft/, stranger/ (another vocabulary), text.txt, other.txt, short.txt"""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = train_tokenizer(prose(2000))
    save_model(root / "target", tokenizer, layers=3, seed=1)
    save_model(root / "draft", tokenizer, layers=2, seed=2)
    save_model(root / "stranger", train_tokenizer("zebra xylophone quartz " * 500), layers=2, seed=3)
    (root / "text.txt").write_text(prose(1500, seed=4), encoding="utf-8")
    (root / "other.txt").write_text(prose(1500, seed=5), encoding="utf-8")
    (root / "short.txt").write_text(prose(5), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def pair(folder) -> list[str]:
    """The flags that name the tiny pair."""
    return ["--target", str(folder / "target"), "--draft", str(folder / "draft")]


@pytest.fixture(scope="session")
def alignment(folder, pair) -> str:
    """An alignment file of the tiny pair, made by the command itself."""
    path = folder / "alignment.json"
    small = ["--tokens", "256", "--rounds", "8", "--keep", "0.25"]
    assert run(["calibrate", *pair, "--text", str(folder / "text.txt"), "--out", str(path), *small]) == 0
    return str(path)


@pytest.fixture
def outrider(capfd) -> Callable[..., Outcome]:
    """Run `outrider` with these arguments in this process."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def fails(outrider) -> Callable[..., str]:
    """Run `outrider`, expect it to refuse its input; returns the one line it says."""

    def call(*arguments: object) -> str:
        outcome = outrider(*arguments)
        assert (outcome.code, outcome.out) == (2, ""), outcome
        [line] = outcome.err.splitlines()
        assert line.startswith("outrider: error: "), line
        return line.removeprefix("outrider: error: ")

    return call


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """Start `outrider` as a process of its own, stdout and stderr piped."""
    processes = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "outrider.cli.main", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, env=environment, bufsize=1, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
