"""`--tensor-parallel`: one command, several processes; what goes wrong in one of them ends all, in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from outrider.cli import launch

STORY = ("--prompt", "It was a dark and stormy night", "--min-context", "8")
LONG = ("generate", *STORY, "--max-new-tokens", "3000", "--ignore-eos", "--tensor-parallel", "2")
SOON = 25  # seconds; far less than a rank waits for another one


def test_two_ranks_write_what_one_process_writes(spawn, tmp_path):
    files = [tmp_path / f"{size}.json" for size in (1, 2)]
    runs = [
        spawn("generate", *STORY, "--max-new-tokens", 24, "--mode", "sparse", "--tensor-parallel", size, "--stats-json", file)
        for size, file in zip((1, 2), files, strict=True)
    ]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert texts[0] == texts[1] and len(texts[0]) > 40
    alone, shared = (json.loads(file.read_text()) for file in files)
    assert shared["conditions"]["tensor_parallel"] == 2 and alone["conditions"]["tensor_parallel"] == 1
    for name in ("rounds", "accepted_at", "bytes_read", "kept_fraction"):
        assert shared[name] == pytest.approx(alone[name]), name


def test_a_benchmark_of_two_ranks_has_rows_of_its_own(spawn, outrider, tmp_path):
    bench = ("bench", "decode", "--case", "tiny", "--device", "cpu", "--mode", "sparse", "--drafting", "sparse", "--rounds", 4)
    assert outrider(*bench, "--output", tmp_path / "rows.jsonl").code == 0
    for size in (["--tensor-parallel", 2], ["--tensor-parallel", 2, "--shard-draft"]):
        run = spawn(*bench, *size, "--output", tmp_path / "rows.jsonl")
        out, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    alone, *shared = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert [row["parallel"] for row in (alone, *shared)] == [None, "2 ranks", "2 ranks, shared draft"]
    assert "2 ranks, shared draft" in out
    read = [{stage: floor["bytes"] for stage, floor in row["floors"].items()} for row in (alone, *shared)]
    assert 0.45 < read[1]["verify"] / read[0]["verify"] < 0.55, "a rank reads its half of weights, keys and values"
    assert read[1]["propose"] == read[0]["propose"] and 0.45 < read[2]["propose"] / read[0]["propose"] < 0.55
    assert shared[0]["kept"] == pytest.approx(alone["kept"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tensor-parallel", "0"], "tensor-parallel: got 0; allowed: a whole number >= 1"),
        (["--shard-draft"], "shard-draft: got True; allowed: False with tensor-parallel 1"),
        (["--tensor-parallel", "2", "--trace", "x.jsonl"], "tensor-parallel: got 2; allowed: 1 for a trace"),
        (["--tensor-parallel", "2", "--shard-draft"], "tensor-parallel: got 2; allowed: 1 for draft '"),
        (
            ["--tensor-parallel", "2", "--device", "cuda"],
            "tensor-parallel: got 2; allowed: at most 1, the GPUs that are visible",
        ),
        (["--tensor-parallel", "3"], "tensor-parallel: got 3; allowed: 1, 2 for target '"),
    ],
)
def test_bad_input_is_told_once(spawn, arguments, expected):
    """What a rank alone finds out, too; more of that: tests/parallel."""
    run = spawn("generate", *STORY, *arguments)
    out, errors = run.communicate(timeout=120)
    assert (run.returncode, out) == (2, "")
    assert errors.startswith(f"outrider: error: {expected}") and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shard-draft"], "shard-draft: got True; allowed: False with tensor-parallel 1"),
        (["--tensor-parallel", 0], "tensor-parallel: got 0; allowed: a whole number >= 1"),
        (["--tensor-parallel", 2, "--mode", "auto"], "mode: got 'auto'; allowed: all but auto with tensor-parallel above 1"),
        (["--tensor-parallel", 2, "--engine", "transformers"], "engine: got 'transformers'; allowed: outrider with tensor-"),
    ],
)
def test_a_benchmark_refuses(outrider, arguments, expected):
    done = outrider("bench", "decode", "--case", "tiny", "--device", "cpu", *arguments)
    assert done.code == 2 and f"outrider: error: {expected}" in done.err


def test_a_rank_that_dies_ends_the_run_with_one_error(spawn):
    run = spawn(*LONG)
    assert run.stdout.read(20), "it generates"
    ranks = children(run.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    _, errors = run.communicate(timeout=SOON)
    assert time.monotonic() - began < SOON
    assert run.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last == "outrider: error: tensor-parallel: rank 1 was ended by SIGKILL; the others were ended, too"
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_gets_what_there_is(spawn, number):
    run = spawn(*LONG)
    assert run.stdout.read(20)
    ranks = children(run.pid)
    run.send_signal(number)
    _, errors = run.communicate(timeout=SOON)
    assert run.returncode == 130
    assert "generated tokens" in errors and errors.strip().endswith("outrider: interrupted")
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def children(pid: int) -> list[int]:
    """Of the process, in the order of their ranks."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("programs", "code", "expected"),
    [
        (("pass", "pass"), 0, ""),
        (("raise SystemExit(130)", "import time; time.sleep(60)"), 130, ""),
        (("raise SystemExit(2)", "raise SystemExit(2)"), 2, ""),
        (("raise SystemExit(75)", "import sys, time; time.sleep(1); sys.exit('no room')"), 1, "rank 1 has failed: no room"),
        (("raise SystemExit(75)", "raise SystemExit(9)"), 9, "rank 1 has failed with exit code 9"),
        (("raise SystemExit(75)", "raise SystemExit(75)"), 1, "rank 0 has lost the others: one has not answered in time"),
        (("raise SystemExit(75)", "import os; os.kill(os.getpid(), 11)"), 1, "rank 1 was ended by SIGSEGV"),
        (("import os; os.kill(os.getpid(), 9)", "raise SystemExit(75)"), 1, "rank 0 was ended by SIGKILL"),
        (("import time; time.sleep(60)", "raise SystemExit(9)"), 9, "rank 1 has failed with exit code 9"),
    ],
)  # fmt: skip
def test_who_is_to_blame(programs, code, expected, monkeypatch, capfd):
    def start(size: int, complaints: list[Path]) -> list[subprocess.Popen]:
        return [
            subprocess.Popen([sys.executable, "-c", program], stderr=path.open("wb"))
            for program, path in zip(programs, complaints, strict=True)
        ]

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "GRACE", 3.0)
    assert launch.launch(2, "cpu") == code
    said = capfd.readouterr().err
    assert said == (f"outrider: error: tensor-parallel: {expected}; the others were ended, too\n" if expected else "")


def test_a_rank_that_does_not_answer_is_not_waited_for(tmp_path):
    """It is alive, but takes no part: the other one says so when its time is up."""
    program = """
import sys, time
from datetime import timedelta
import torch
from outrider.errors import RankError
from outrider.models import ranks
ranks.TIMEOUT = timedelta(seconds=2)
own = ranks.join(2, "cpu")
own.sum(torch.ones(1))
if own.rank == 1:
    time.sleep(4)
else:
    try:
        own.sum(torch.ones(1))
    except RankError as error:
        print(error)
sys.stdout.flush()
__import__("os")._exit(0)
"""
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    began = time.monotonic()
    runs = [
        subprocess.Popen([sys.executable, "-c", program], env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = runs[0].communicate(timeout=60)[0]
    assert said.startswith("tensor-parallel: a rank has ended or does not answer")
    runs[1].communicate(timeout=60)
    assert time.monotonic() - began < 60
