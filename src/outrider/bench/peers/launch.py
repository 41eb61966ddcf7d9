"""Run a peer's program in a process of its own, which gives all its memory back, and make rows of what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from outrider.bench.cases import Case
from outrider.bench.decode import Progress
from outrider.bench.options import VLLM, DecodeOptions, Run
from outrider.bench.peers.job import Job, read_results
from outrider.bench.peers.vllm import ENVIRONMENT
from outrider.bench.results import Row

SOURCES = Path(__file__).parents[3]  # the folder that our own package lies in
TOKENS_PER_ROUND = 8  # decoded by a peer for every round of ours that is measured: enough to outweigh rows that end apart
KEPT = 500  # last characters of what a peer complained about


def peer_rows(
    run: Run, cases: list[Case], options: DecodeOptions, conditions: Mapping[str, Any], progress: Progress
) -> list[Row]:
    """One row for every case, all of the same pair, of one engine in one mode."""
    what = f"{run.engine} {run.mode}, {cases[0].pair.name}"
    progress(what, 0, 1)
    results, complaint = run_program(run.engine, _job(run, cases, options), options.peer_vllm, options.peer_timeout)
    progress(what, 1, 1)
    return [_row(run, case, results.get(case.name, {"error": complaint}), options.rates, conditions) for case in cases]


def run_program(engine: str, job: Job, folder: Path | None, timeout: float) -> tuple[dict[str, dict[str, Any]], str]:
    """Results by case, and why there are no others; `folder` holds the engine where it is not installed."""
    command = [sys.executable, "-P", "-m", f"{__package__}.{engine}"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ending = _finish(command, job.dumps(), _environment(engine, folder), out, err, timeout)
        out.seek(0)
        err.seek(0)
        said = err.read().strip()[-KEPT:]
        return read_results(out), f"{ending}; stderr ends: {said}" if said else ending


def _finish(command: list[str], text: str, environment: dict[str, str], out: IO[str], err: IO[str], timeout: float) -> str:
    """Run to the end, or to the time limit; says how it ended. Whatever the process has started ends with it."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment, text=True, start_new_session=True
    )
    try:
        process.communicate(text, timeout=timeout)
        return f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        return f"not done after {timeout} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(engine: str, folder: Path | None) -> dict[str, str]:
    """With the engine's folder and our own package before all others."""
    paths = [*([str(folder.resolve())] if engine == VLLM and folder else []), str(SOURCES), os.environ.get("PYTHONPATH", "")]
    own = ENVIRONMENT if engine == VLLM else {}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _job(run: Run, cases: list[Case], options: DecodeOptions) -> Job:
    pair = cases[0].pair
    return Job(
        target=pair.target,
        draft=None if run.mode == "plain" else pair.draft,
        cases=[{"name": case.name, "context": case.context, "batch": case.batch} for case in cases],
        tokens=TOKENS_PER_ROUND * options.rounds,
        rates=list(options.rates),
        device=options.device,
    )


def _row(run: Run, case: Case, result: dict[str, Any], rates: tuple[float, ...], conditions: Mapping[str, Any]) -> Row:
    plain = run.mode == "plain"
    return Row(
        case=case.name,
        engine=run.engine,
        mode=run.mode,
        drafting=run.drafting,
        context=case.context,
        batch=case.batch,
        tokens_per_second=result.get("tokens_per_second"),
        acceptance={
            "kind": "none" if plain else "scripted",
            "rates": [] if plain else list(rates),
            "tokens_per_round": result.get("tokens_per_round"),
        },
        error=result.get("error"),
        conditions={**conditions, **result.get("versions", {})},
    )
