"""All cases of `outrider bench prefill`, engine by engine: yields a row as soon as it is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import torch

from outrider.bench.conditions import conditions
from outrider.bench.decode import Progress
from outrider.bench.dummy import dummy_models
from outrider.bench.options import OURS
from outrider.bench.peers.job import Job
from outrider.bench.peers.launch import run_program
from outrider.bench.prefill import PrefillRow, measure
from outrider.bench.prefill_options import PrefillCase, PrefillOptions, PrefillRun
from outrider.bench.run import free
from outrider.bench.stream.rate import matmul_rate, stream_rate
from outrider.bench.workload import DTYPES
from outrider.errors import OptionError, OutriderError

K = 4  # tokens a peer drafts behind its prompt: none is waited for


def measure_all(options: PrefillOptions, command: str, progress: Progress) -> Iterator[PrefillRow]:
    """Rows of every case, engine and mode. What fails while it runs becomes a row with an error.

    Raises OptionError where there is no such device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device", "cuda", "cpu with --case tiny (no CUDA GPU is visible here)")
    device = torch.device(options.device)
    known: dict[str, Any] = conditions(device, command) | {
        "dtype": DTYPES[device.type],
        "weights": "dummy",
        "keep": options.keep,
        "block": options.block,
        "draft_keep": options.draft_keep,
        "draft_least": options.draft_least,
        "chunk": options.chunk,
        "stream_gb_s": stream_rate(device) if device.type == "cuda" else None,
        "matmul_tflops": matmul_rate(device) if device.type == "cuda" else None,
    }
    free(device)
    pairs = [list(group) for _, group in groupby(sorted(options.cases, key=_pair_name), key=_pair_name)]
    for cases in pairs:  # before our own engine, which leaves less memory behind for others than it found
        for run in (run for run in options.runs if run.engine != OURS):
            yield from _peer_rows(run, cases, options, known | {"pair": _pair_name(cases[0])}, progress)
    for cases in pairs if OURS in options.engine else []:
        progress("make models", 0, 1)
        target, draft = dummy_models(cases[0].pair, device)
        models = target.fuse(), draft.fuse()  # as engines run them
        progress("make models", 1, 1)
        for case in cases:
            for run in (run for run in options.runs if run.engine == OURS):
                yield _row(models, case, run, options, known | {"pair": _pair_name(case)}, progress)
                free(device)
        del models
        free(device)


def _pair_name(case: PrefillCase) -> str:
    return case.pair.name


def _row(
    models: Any, case: PrefillCase, run: PrefillRun, options: PrefillOptions, known: Mapping[str, Any], progress: Progress
) -> PrefillRow:
    try:
        return measure(models, case, run, options, known, progress)
    except OutriderError:
        raise
    except Exception as error:  # such as a device without enough memory: the other runs go on
        return _failed(case, run, f"{type(error).__name__}: {error}", known)


def _failed(case: PrefillCase, run: PrefillRun, error: str, known: Mapping[str, Any]) -> PrefillRow:
    return PrefillRow(
        case=case.name,
        engine=run.engine,
        mode=run.mode,
        method=run.method,
        kv_dtype=run.kv_dtype,
        context=case.context,
        error=error,
        conditions=dict(known),
    )


def _peer_rows(
    run: PrefillRun, cases: list[PrefillCase], options: PrefillOptions, known: dict[str, Any], progress: Progress
) -> Iterator[PrefillRow]:
    """One row for every case, all of the same pair, of one engine in one mode."""
    pair, what = cases[0].pair, f"{run.engine} {run.mode}, {cases[0].pair.name}"
    job = Job(
        target=pair.target,
        draft=None if run.mode == "plain" else pair.draft,
        cases=[{"name": case.name, "context": case.context, "batch": 1} for case in cases],
        tokens=1,
        rates=[1.0] * K,
        device=options.device,
        what="prefill",
    )
    progress(what, 0, 1)
    results, complaint = run_program(run.engine, job, options.peer_vllm, options.peer_timeout)
    progress(what, 1, 1)
    for case in cases:
        result = results.get(case.name, {"error": complaint})
        if "error" in result:
            yield _failed(case, run, result["error"], known)
            continue
        yield PrefillRow(
            case=case.name,
            engine=run.engine,
            mode=run.mode,
            context=case.context,
            seconds=result["seconds"],
            tokens_per_second=case.context / result["seconds"],
            conditions=known | result["versions"],
        )
