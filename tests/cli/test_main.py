"""Help, version, exit codes, and what goes to which stream."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings

import pytest

import outrider as package
from outrider.cli import main


def test_help_is_fast_and_loads_no_torch():
    """Whoever asks for help must not wait for a deep-learning framework."""
    code = """
import sys
from outrider.cli.main import run
codes = [run(["--help"]), run(["generate", "--help"]), run(["eval", "facts", "--help"]), run(["--version"]), run(["generate"])]
heavy = sorted({"torch", "transformers", "tokenizers", "numpy"} & set(sys.modules))
print(codes, heavy)
"""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 2] []"
    assert time.perf_counter() - started < 10  # about one second where nothing else runs


def test_version(outrider):
    assert outrider("--version").out == f"outrider {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing command; see outrider --help"),
        (["eval"], "see outrider eval --help"),
        (["generat"], "generat"),
        (["generate", "--kep", "0.1"], "--kep"),
        (["generate", "--keep", "much"], "much"),
        (["generate", "extra"], "extra"),
        (["calibrate", "--out", "a.json"], "--text"),
        (["eval", "perplexity"], "--text"),
    ],
)
def test_bad_usage_is_one_line(fails, arguments, expected):
    assert expected in fails(*arguments)


def test_unexpected_errors_are_not_hidden(monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("outrider.cli.generate._prompts", broken)
    with pytest.raises(ZeroDivisionError):
        main.run(["generate"])


def test_interrupt_anywhere_is_exit_code_130(monkeypatch, outrider):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("outrider.cli.generate._prompts", interrupted)
    outcome = outrider("generate")
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "outrider: interrupted\n")


def test_warnings_are_one_line_and_the_handler_goes_away(monkeypatch, outrider):
    before = warnings.showwarning
    monkeypatch.setattr("outrider.cli.generate._prompts", lambda *_: warnings.warn("mind the gap", stacklevel=1) or {}["no"])
    with pytest.raises(KeyError):
        outrider("generate")
    assert warnings.showwarning is before


def test_main_leaves_with_the_code(capsys):
    with pytest.raises(SystemExit) as left:
        main.main(["generate", "--keep", "2"])
    assert left.value.code == 2
