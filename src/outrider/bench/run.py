"""All cases, engine by engine: yields a row as soon as it is there."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from outrider.bench.cases import Case
from outrider.bench.conditions import conditions
from outrider.bench.decode import Progress, measure, new_tokens
from outrider.bench.dummy import dummy_workloads
from outrider.bench.options import OURS, DecodeOptions, Run
from outrider.bench.peers.launch import peer_rows
from outrider.bench.real import real_workload
from outrider.bench.results import Row
from outrider.bench.stream.rate import stream_rate
from outrider.bench.workload import DTYPES, Workload
from outrider.errors import OptionError, OutriderError
from outrider.models.quantized_keys import code_bits, name_of_bits
from outrider.models.ranks import ALONE, Ranks, join, own_device


def measure_all(options: DecodeOptions, text: str, command: str, progress: Progress) -> Iterator[Row]:
    """Rows of every case, engine and mode; of real models on `text`, where the options name them.

    What fails while it runs becomes a row with an error. Raises OutriderError for options that do not fit the models, and
    OptionError where there is no such device.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device", "cuda", "cpu with --case tiny or --target (no CUDA GPU is visible here)")
    ranks = join(options.tensor_parallel, options.device)
    device = torch.device(own_device(options.device, ranks))
    known: dict[str, Any] = conditions(device, command) | {
        "dtype": DTYPES[device.type],
        "draft_tokens": options.draft_tokens,
        "keep": options.keep,
        "rounds": options.rounds,
        "stream_gb_s": stream_rate(device) if device.type == "cuda" else None,
    }
    free(device)
    if options.target is not None:
        work = real_workload(options, text, new_tokens(options))
        known |= {"target": work.target.spec.name, "draft": work.draft.spec.name}
        yield from _our_rows([work], options, known, progress)
        return
    pairs = [list(group) for _, group in groupby(sorted(options.cases, key=_pair_name), key=_pair_name)]
    for cases in pairs:  # before our own engine, which leaves less memory behind for others than it found
        for run in (run for run in options.runs if run.engine != OURS):
            yield from peer_rows(run, cases, options, _named(known, cases), progress)
    for cases in pairs if OURS in options.engine else []:
        yield from _dummy_rows(cases, options, device, ranks, _named(known, cases), progress)
        free(device)


def _pair_name(case: Case) -> str:
    return case.pair.name


def _named(known: dict[str, Any], cases: list[Case]) -> dict[str, Any]:
    return known | {"pair": _pair_name(cases[0]), "weights": "dummy"}


def _dummy_rows(
    cases: list[Case],
    options: DecodeOptions,
    device: torch.device,
    ranks: Ranks,
    known: dict[str, Any],
    progress: Progress,
) -> Iterator[Row]:
    progress("make models", 0, 1)
    shared = {"ranks": ranks, "draft_ranks": ranks if options.shard_draft else ALONE}
    works = dummy_workloads(cases, options.rates, device, options.scripted_agreement, **shared)
    progress("make models", 1, 1)
    yield from _our_rows(works, options, known, progress)


def _our_rows(works: list[Workload], options: DecodeOptions, known: dict[str, Any], progress: Progress) -> Iterator[Row]:
    for work in works:
        for run in (run for run in options.runs if run.engine == OURS):
            yield _row(work, _decided(run, work, options), options, known, progress)
            free(work.target.spec.device)


def _decided(run: Run, work: Workload, options: DecodeOptions) -> Run:
    """The run with what scoring `auto` is here, so that its row takes the place of an older one."""
    if run.scoring is None:
        return run
    return replace(run, scoring=name_of_bits(code_bits(run.scoring, work.draft, options.draft_tokens + 1)))


def _row(work: Workload, run: Run, options: DecodeOptions, known: dict[str, Any], progress: Progress) -> Row:
    try:
        return measure(work, run, options, known, progress)
    except OutriderError:
        raise
    except Exception as error:  # such as a device without enough memory: the other runs go on
        if options.tensor_parallel > 1:  # but other ranks would wait
            raise
        return Row(
            case=work.name,
            engine=run.engine,
            mode=run.mode,
            drafting=run.drafting,
            scoring=run.scoring,
            kv_dtype=run.kv_dtype,
            parallel=run.parallel,
            context=work.context,
            batch=work.batch,
            error=f"{type(error).__name__}: {error}",
            conditions=known,
        )


def free(device: torch.device) -> None:
    """Give memory back to the device: the next engine, or another process, needs it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
