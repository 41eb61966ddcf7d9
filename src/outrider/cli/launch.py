"""Several GPUs: a command once for each, as processes that share a model.

    parent    starts the ranks, waits, passes signals on to rank 0; when a rank has failed it ends the others and says which
    rank 0    reads, writes and prints as a command does that runs alone
    others    the same without a word: output goes nowhere, what they complain of into a file, of which the last line counts

Nobody waits for a rank that has died: the parent sees that it has ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

LAUNCHED = "OUTRIDER_LAUNCHED"  # in the environment of ranks that have a parent here
LOST = 75  # exit code of a rank that has lost another: it is not the one to complain
POLL, GRACE = 0.05, 5.0  # seconds: between looks at the ranks; that the others have to end behind the first
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def is_rank() -> bool:
    """This process is one of several that share a model, whoever has started them."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def leads(size: int) -> bool:
    """This process is the one of `size` ranks that writes."""
    return size == 1 or os.environ.get("RANK") == "0"


def launch(size: int, device: str) -> int:
    """Run this command as `size` ranks; returns the exit code. A rank that dies ends the others within `GRACE` seconds.

    Raises OptionError, before any of them starts, where there are fewer GPUs.
    """
    from outrider.models.ranks import check_size

    check_size(size, device)
    with TemporaryDirectory(prefix="outrider-") as folder:
        complaints = [Path(folder, f"rank{rank}") for rank in range(size)]
        ranks = _start(size, complaints)
        try:
            with _passing_signals_to(ranks[0]):
                failed = _wait(ranks)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        code = ranks[failed].returncode
        if failed == 0 and code >= 0 and code != LOST:
            return code  # it has said what there is to say
        return _blame(failed, code, complaints[failed])


def _start(size: int, complaints: list[Path]) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHED: "1"}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    command = [sys.executable, "-m", "outrider.cli.main", *sys.argv[1:]]
    ranks = []
    for rank, path in enumerate(complaints):
        own = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with path.open("wb") as file:
            output, errors = (None, None) if rank == 0 else (subprocess.DEVNULL, file)
            ranks.append(
                subprocess.Popen(
                    command, env=own, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
                )
            )
    return ranks


@contextmanager
def _passing_signals_to(first: subprocess.Popen[bytes]) -> Iterator[None]:
    """Who interrupts the command interrupts rank 0, which has what there is to show: `main` takes SIGTERM for Ctrl-C."""
    before = {number: signal.signal(number, lambda *_: first.terminate()) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Until rank 0 has ended, or one has failed; returns which one is to blame, rank 0 where none is."""
    while ranks[0].poll() is None and not any(process.poll() for process in ranks):
        time.sleep(POLL)
    until = time.monotonic() + GRACE
    while time.monotonic() < until and not _has_spoken(ranks):
        time.sleep(POLL)
    return next((rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0, LOST)), 0)


def _has_spoken(ranks: list[subprocess.Popen[bytes]]) -> bool:
    """Nothing more is to be learnt: rank 0 has ended, and if only for another's sake, so has that one."""
    codes = [process.poll() for process in ranks]
    lost = codes[0] == LOST and not any(code not in (None, 0, LOST) for code in codes)
    return codes[0] is not None and (not lost or None not in codes)


def _blame(rank: int, code: int, complaint: Path) -> int:
    """Say in one line what has become of a rank; returns the exit code."""
    lines = complaint.read_text(errors="replace").strip().splitlines()
    if code < 0:
        reason = f"was ended by {signal.Signals(-code).name}"
    elif code == LOST:
        reason = "has lost the others: one has not answered in time"
    else:
        reason = f"has failed: {lines[-1].removeprefix('outrider: error: ')}" if lines else f"has failed with exit code {code}"
    print(f"outrider: error: tensor-parallel: rank {rank} {reason}; the others were ended, too", file=sys.stderr)
    return code if code > 0 and code != LOST else 1
