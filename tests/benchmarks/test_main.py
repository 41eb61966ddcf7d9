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


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom benchmarks.__main__ import run\nassert run(['kernels', '-h']) == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--peer-flashinfer" in done.stdout
