"""The command line: bad input is refused, by name, before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.__main__ import run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "prefill"], "--only: got 'prefill'; allowed: a part of sparse_attention-128k-b1-keep10, "),
        (["--backend", "cpu"], "--backend: got 'cpu'; allowed: auto, triton, cuda, reference"),
        (["--peer-fa3", "/nowhere/fa3.so"], "--peer-fa3: got '/nowhere/fa3.so'; allowed: a path that exists"),
        (["--peer-flashinfer", "/nowhere"], "--peer-flashinfer: got '/nowhere'; allowed: a path that exists"),
        (["--output", "/nowhere/kernels.jsonl"], "--output: got '/nowhere/kernels.jsonl'; allowed: a file in a folder"),
        (["--fast"], "No such option: --fast"),
        (["--only"], "requires an argument"),
        ([], "allowed: a machine with one"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if "--output" not in arguments:
        arguments = ["--output", str(tmp_path / "kernels.jsonl"), *arguments]
    assert run(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--correction", "magic"], "--correction: got 'magic'; allowed: none, uniform 10%, "),
        (["--keep", "1"], "--keep: got 1.0; allowed: a number in (0, 1)"),
        (
            ["--keep", "0.005"],
            "--keep: got 0.005; allowed: enough for 68 tokens beside what correction 'covariance, offset' reads",
        ),
        (["--lists", "quest"], "--lists: got 'quest'; allowed: draft, oracle"),
        (["--scored", "1"], "--scored: got 1; allowed: a whole number >= 2"),
        (["--facts", "-1"], "--facts: got -1; allowed: a whole number >= 0"),
        (["--draft-tokens", "0"], "-K: got 0; allowed: a whole number >= 1"),
        (["--context", "2000"], "--keep: got 0.1; allowed: enough for 68 tokens"),
        (["--context", "20000"], "--context: got 20000; allowed: more than --scored, at most the 9 tokens"),
        (["--text", "calibration.txt"], "--calibrate: got 'calibration.txt'; allowed: a text that is not among those"),
        (["--output", "/nowhere/rows.jsonl"], "--output: got '/nowhere/rows.jsonl'; allowed: a file in a folder"),
    ],
)
def test_bad_input_of_tail_corrections_is_refused(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "calibration.txt"):
        (tmp_path / name).write_text("It was a dark and stormy night.")
    defaults = ["--text", "book.txt", "--calibrate", "calibration.txt", "--correction", "covariance, offset"]
    if "--output" not in arguments:
        defaults += ["--output", "rows.jsonl"]
    assert run(["tail-correction", *defaults, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "calibration.txt"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variant", "magic"], "--variant: got 'magic'; allowed: flat, top-p, "),
        (["--keep", "1"], "--keep: got 1.0; allowed: a number in (0.005, 1)"),
        (["--calibrated", "0"], "--calibrated: got 0; allowed: a whole number >= 1"),
        (["--facts", "-1"], "--facts: got -1; allowed: a whole number >= 0"),
        (["--context", "20000"], "--context: got 20000; allowed: more than --scored, at most the 9 tokens"),
        (["--text", "calibration.txt"], "--calibrate: got 'calibration.txt'; allowed: a text that is not among those"),
        (["--output", "/nowhere/rows.jsonl"], "--output: got '/nowhere/rows.jsonl'; allowed: a file in a folder"),
    ],
)
def test_bad_input_of_budgets_is_refused(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "calibration.txt"):
        (tmp_path / name).write_text("It was a dark and stormy night.")
    defaults = ["--text", "book.txt", "--calibrate", "calibration.txt"]
    if "--output" not in arguments:
        defaults += ["--output", "rows.jsonl"]
    assert run(["budgets", *defaults, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "calibration.txt"]


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom benchmarks.__main__ import run\nassert run(['kernels', '-h']) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--peer-flashinfer" in done.stdout
