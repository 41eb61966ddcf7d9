"""Several processes of this machine on one folder: each runs what `run.py` does, with its share of the threads."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch

from outrider.errors import OutriderError, SweepError
from outrider.eval.sweep.plan import Plan
from outrider.eval.sweep.run import Event, Notice, run_here
from outrider.eval.sweep.store import Store


def run_in_processes(plan: Plan, store: Store, jobs: int) -> Iterator[Event]:
    """`run_here` in `jobs` new processes; their events as they come, a cell perhaps settled more than once.

    A process that is killed is reported, and the others take over its cell; without any left the rest stays missing. What a
    process refuses ends all, as SweepError. All have ended when the iterator ends, or is closed.
    """
    context = get_context("spawn")  # a fork would share CUDA's state, and locks
    running: dict[Any, Any] = {}
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(plan, store.path, store.forgiven, jobs, theirs))
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for pipe in cast(list[Connection], wait(list(running))):
                try:
                    event = pipe.recv()
                except (EOFError, OSError):
                    process = running.pop(pipe)
                    process.join()
                    if process.exitcode:
                        yield Notice(text=f"a process ended early ({_reason(process.exitcode)}), {len(running)} left")
                    continue
                if isinstance(event, str):
                    raise SweepError(event)
                yield event
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _serve(plan: Plan, path: Path, forgiven: frozenset[str], jobs: int, pipe: Connection) -> None:
    """Runs in the new process: sends events, or the text of what it refuses."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    warnings.showwarning = lambda message, *_: pipe.send(Notice(text=f"warning: {message}"))
    try:
        for event in run_here(plan, Store(path, forgiven)):
            pipe.send(event)
    except OutriderError as error:
        pipe.send(str(error))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _reason(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name
