"""Shared by the tests of the benchmarks: the tiny case on dummy weights, options, and the command in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from outrider.bench.cases import TINY_CASE, Case
from outrider.bench.dummy import dummy_workloads
from outrider.bench.options import DecodeOptions
from outrider.bench.workload import Workload
from outrider.cli.main import run

SHORT = replace(TINY_CASE, name="short", context=160)
RATES = (0.9, 0.8, 0.7, 0.6)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def short() -> Case:
    """The tiny models behind 160 tokens, two sequences."""
    return SHORT


@pytest.fixture(scope="session")
def work() -> Workload:
    """The tiny case, ready to run on a CPU."""
    return dummy_workloads([TINY_CASE], RATES, torch.device("cpu"))[0]


@pytest.fixture
def options() -> Callable[..., DecodeOptions]:
    """`options(**changes)`: those of the tiny case on a CPU."""

    def make(**changes) -> DecodeOptions:
        return DecodeOptions(**({"case": ("tiny",), "device": "cpu"} | changes))

    return make


@pytest.fixture
def bench_command(capfd, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """Run `outrider bench` with these arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run(["bench", *map(str, arguments)])
        return Outcome(code, *capfd.readouterr())

    return call


@pytest.fixture
def decode(bench_command) -> Callable[..., Outcome]:
    """Run `outrider bench decode` with these arguments, in an empty folder."""
    return partial(bench_command, "decode")


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A folder with a package `vllm` that records what it is asked for in folder/log.jsonl and generates nothing."""
    folder = tmp_path / "peer"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(FAKE_VLLM, encoding="utf-8")
    (folder / "vllm-0.26.0.dist-info").mkdir()
    (folder / "vllm-0.26.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.26.0\n")
    monkeypatch.setenv("FAKE_VLLM_LOG", str(folder / "log.jsonl"))
    return folder


FAKE_VLLM = """
import json, os, time
from pathlib import Path

def log(**entry):
    with open(os.environ["FAKE_VLLM_LOG"], "a") as file:
        file.write(json.dumps(entry) + "\\n")

class SamplingParams:
    def __init__(self, **given):
        self.given = given

class Engine:
    def step(self):
        time.sleep(0.002)

class LLM:
    def __init__(self, **given):
        print("INFO: starting, no end of line", end="")
        self.llm_engine, self.given = Engine(), given
        models = [given["model"], *([given["speculative_config"]["model"]] if "speculative_config" in given else [])]
        configs = [json.loads(Path(model, "config.json").read_text()) for model in models]
        hidden, sampler = [config["hidden_size"] for config in configs], os.environ["VLLM_USE_FLASHINFER_SAMPLER"]
        log(given=given, hidden=hidden, sampler=sampler)
        if os.environ.get("FAKE_VLLM_FAILS"):
            raise RuntimeError("no kernel image")

    def generate(self, prompts, params, use_tqdm):
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        if len(rows[0]) == 77:
            raise RuntimeError("out of memory")
        log(rows=len(rows), length=len(rows[0]), distinct=rows[0] != rows[-1], params=params.given)
        tokens, per_step = params.given["max_tokens"], 4 if "speculative_config" in self.given else 1
        for _ in range(-(-tokens // per_step)):
            self.llm_engine.step()
"""
