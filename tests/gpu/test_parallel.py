"""Two GPUs that share the built-in target, by NCCL: the text of one GPU. Run by hand where there are two."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

BOOK = "examples/books/persuasion.txt"
PROMPTS = (
    "It was a dark and stormy night",
    "The old house stood",
    "She had never before",
    "In the year of",
)


def outrider(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outrider.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("mode", ["plain", "dense", "sparse", "exact"])
def test_greedy_text_is_that_of_one_gpu(mode, eager, tmp_path):
    about = ("--mode", mode, "--device", "cuda", "--dtype", "float32", *["--eager"] * eager, "--ignore-eos")
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    texts, figures = [], []
    for size in (1, 2):
        path = tmp_path / f"{size}.json"
        done = outrider(
            "generate", *prompts, *about, "--max-new-tokens", 250, "--min-context", 64, "--tensor-parallel", size,
            "--stats-json", path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
        figures.append(json.loads(path.read_text()))
    assert texts[0] == texts[1] and len(texts[0]) > 2000
    assert figures[1]["conditions"]["tensor_parallel"] == 2
    assert figures[1]["conditions"]["graphs"] is not eager
    assert figures[1]["accepted_at"] == figures[0]["accepted_at"]


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_a_long_prompt_in_bfloat16_is_continued(prefill, tmp_path):
    """Words differ where 16 bits round otherwise; it is no worse than one GPU in what the dense target says of it."""
    path = tmp_path / "s.json"
    done = outrider(
        "generate", "--prompt-file", BOOK, "--prompt-tokens", 16000, "--device", "cuda", "--dtype", "bfloat16",
        "--tensor-parallel", 2, "--mode", "sparse", "--prefill", prefill, "--audit",
        "--max-new-tokens", 128, "--stats-json", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert figures["agreement"] > 0.9 and 0.09 < figures["kept_fraction"] < 0.12


def test_more_gpus_than_there_are():
    done = outrider("generate", "--prompt", "x", "--device", "cuda", "--tensor-parallel", 64)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"tensor-parallel: got 64; allowed: at most {torch.cuda.device_count()}" in done.stderr
