"""The table of cases, and what is refused before any work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from outrider.bench.cases import CASES, DEFAULT_CASES, LLAMA, QWEN3
from outrider.bench.options import DecodeOptions, Run
from outrider.errors import OptionError


def parameters(config: dict) -> int:
    """Of a Llama or Qwen3, by hand; norms left out."""
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner
    return layers * layer + config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)


def test_cases_are_those_that_are_documented():
    assert [(case.name, case.context, case.batch) for case in DEFAULT_CASES] == [
        ("llama-128k-b1", 131072, 1),
        ("llama-128k-b4", 131072, 4),
        ("llama-32k-b1", 32768, 1),
        ("llama-8k-b1", 8192, 1),
        ("qwen3-128k-b1", 131072, 1),
    ]
    assert {name: CASES[name].context for name in CASES.keys() - {case.name for case in DEFAULT_CASES}} == {
        "llama-512k-b1": 2**19,
        "llama-1m-b1": 2**20,
        "tiny": 2048,
    }


@pytest.mark.parametrize(
    "config, billions", [(LLAMA.target, 8.03), (LLAMA.draft, 1.24), (QWEN3.target, 8.19), (QWEN3.draft, 0.60)]
)
def test_shapes_are_those_of_the_models(config, billions):
    assert parameters(config) / 1e9 == pytest.approx(billions, abs=0.01)


def test_by_default_every_case_runs_in_every_mode_on_our_engine():
    options = DecodeOptions()
    assert options.cases == DEFAULT_CASES
    assert options.rates == (0.9, 0.8, 0.7, 0.6)
    assert [(run.mode, run.drafting) for run in options.runs] == [
        ("plain", None),
        ("dense", "dense"),
        ("dense", "sparse"),
        ("sparse", "dense"),
        ("sparse", "sparse"),
    ]


def test_peers_come_first_and_run_what_they_can(options):
    runs = options(engine=("outrider", "transformers", "outrider"), mode=("sparse", "plain"), drafting=("dense",)).runs
    assert runs == (
        Run(engine="transformers", mode="plain", drafting=None),
        Run(engine="outrider", mode="sparse", drafting="dense", scoring="auto"),
        Run(engine="outrider", mode="plain", drafting=None),
    )


def test_what_is_scored_runs_with_every_choice_of_keys(options):
    runs = options(mode=("plain", "dense", "sparse"), score_keys=("exact", "2bit")).runs
    assert [(run.mode, run.drafting, run.scoring) for run in runs] == [
        ("plain", None, None),
        ("dense", "dense", None),
        ("dense", "sparse", "exact"),
        ("dense", "sparse", "2bit"),
        ("sparse", "dense", "exact"),
        ("sparse", "dense", "2bit"),
        ("sparse", "sparse", "exact"),
        ("sparse", "sparse", "2bit"),
    ]


def test_our_engine_runs_with_every_cache(options):
    engines, modes = ("outrider", "transformers"), ("plain", "sparse")
    runs = options(engine=engines, mode=modes, drafting=("sparse",), kv_dtype=("auto", "fp8")).runs
    assert [(run.engine, run.mode, run.kv_dtype) for run in runs] == [
        ("transformers", "plain", None),
        ("outrider", "plain", None),
        ("outrider", "sparse", None),
        ("outrider", "plain", "fp8"),
        ("outrider", "sparse", "fp8"),
    ]


def test_vllm_runs_plain_and_dense(vllm):
    options = DecodeOptions(engine=("vllm",), drafting=("sparse",), peer_vllm=vllm)
    assert [(run.mode, run.drafting) for run in options.runs] == [("plain", None), ("dense", "dense")]


REAL = {"case": (), "target": "builtin", "prompt_file": "book.txt", "context": 512}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"case": ("llama",)}, "case: got 'llama'; allowed: llama-128k-b1, "),
        ({"engine": ("sglang",)}, "engine: got 'sglang'; allowed: outrider, vllm, transformers"),
        ({"mode": ("none",)}, "mode: got 'none'; allowed: plain, dense, sparse, exact"),
        ({"agreement": 1.5}, "agreement: got 1.5; allowed: a number in [0, 1]"),
        ({"exact_every": 65}, "exact-every: got 65; allowed: a whole number in 1 .. 64, or None"),
        ({"guard_every": 0}, "guard-every: got 0; allowed: a whole number >= 1, or None"),
        ({"drafting": ("none",)}, "drafting: got 'none'; allowed: dense, sparse"),
        ({"score_keys": ("8bit",)}, "score-keys: got '8bit'; allowed: auto, exact, 4bit, 2bit"),
        ({"kv_dtype": ("int8",)}, "kv-dtype: got 'int8'; allowed: auto, fp8"),
        ({"engine": ("transformers",), "mode": ("dense",)}, "mode: got 'dense'; allowed: plain for engine transformers"),
        ({"keep": 0.0}, "keep: got 0.0; allowed: a number in (0, 1]"),
        ({"draft_tokens": 0}, "draft-tokens: got 0; allowed: a whole number >= 1"),
        ({"rounds": 0}, "rounds: got 0; allowed: a whole number >= 1"),
        ({"peer_timeout": 0}, "peer-timeout: got 0; allowed: a whole number >= 1"),
        ({"acceptance": ".9,.8"}, "acceptance: got '.9,.8'; allowed: 4 numbers in [0, 1] by commas"),
        ({"acceptance": ".6,.7,.8,.9"}, "none larger than the one before"),
        ({"acceptance": "1.1,.8,.7,.6"}, "acceptance: got '1.1,.8,.7,.6'"),
        ({"acceptance": "nan,.8,.7,.6"}, "acceptance: got 'nan,.8,.7,.6'"),
        ({"acceptance": "much"}, "acceptance: got 'much'"),
        ({"draft_tokens": 3}, "acceptance: got '0.9,0.8,0.7,0.6'; allowed: 3 numbers"),
        ({"device": "tpu"}, "device: got 'tpu'; allowed: cuda, cpu"),
        ({"case": ()}, "device: got 'cpu'; allowed: cuda; cpu with --case tiny or --target"),
        ({"case": ("tiny", "llama-8k-b1")}, "device: got 'cpu'; allowed: cuda; cpu with --case tiny or --target"),
        ({"draft": "small"}, "draft: got 'small'; allowed: nothing without --target"),
        ({"context": 100}, "context: got 100; allowed: nothing without --target"),
        ({"peer_vllm": "folder"}, "peer-vllm: got 'folder'; allowed: nothing without --engine vllm"),
        ({"engine": ("vllm",)}, "device: got 'cpu'; allowed: cuda with --engine vllm"),
        (REAL | {"case": ("tiny",)}, "case: got ('tiny',); allowed: nothing with --target"),
        (REAL | {"acceptance": "1,1,1,1"}, "acceptance: got '1,1,1,1'; allowed: nothing with --target"),
        (REAL | {"agreement": 0.0}, "agreement: got 0.0; allowed: nothing with --target"),
        (REAL | {"engine": ("transformers",)}, "engine: got 'transformers'; allowed: outrider with --target"),
        (REAL | {"prompt_file": None}, "prompt-file: got None; allowed: a file of UTF-8 text with --target"),
        (REAL | {"context": None}, "context: got None; allowed: a whole number >= 2 with --target"),
        (REAL | {"batch": 0}, "batch: got 0; allowed: a whole number >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, changes, message):
    with pytest.raises(OptionError) as caught:
        options(**changes)
    assert message in str(caught.value)


def test_the_folder_of_vllm_is_checked(tmp_path):
    with pytest.raises(OptionError, match="a folder that holds the package vllm"):
        DecodeOptions(engine=("vllm",), peer_vllm=tmp_path)
    with pytest.raises(OptionError, match="it is not installed here"):
        DecodeOptions(engine=("vllm",))


def test_other_numbers_of_drafted_tokens_bring_their_rates(options):
    assert options(draft_tokens=2, acceptance="0.5, 0.25").rates == (0.5, 0.25)


def test_a_machine_without_a_gpu_is_refused(decode, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = decode("--case", "tiny")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "outrider: error: device: got 'cuda'; allowed: cpu with --case tiny or --target (no CUDA GPU is visible here)\n"
    )
    assert not list(tmp_path.iterdir())


def test_files_are_checked_before_any_work(decode):
    assert "output: got '/nowhere/decode.jsonl'" in decode("--case", "tiny", "--output", "/nowhere/decode.jsonl").err
    arguments = ["--target", "builtin", "--device", "cpu", "--context", 64]
    assert "--prompt-file none.txt: cannot be read" in decode(*arguments, "--prompt-file", "none.txt").err


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom outrider.cli.main import run\n"
        "assert run(['bench', 'decode', '-h']) == 0 and run(['bench', 'decode', '--keep', '2']) == 2\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--peer-vllm" in done.stdout
