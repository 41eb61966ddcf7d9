"""Several ranks that share a model: `scenarios.py`, run by two processes that meet on this machine's CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SCENARIOS = Path(__file__).with_name("scenarios.py")
SIZE = 2


def test_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(SCENARIOS), "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    logs, processes = [tmp_path / f"rank{rank}" for rank in range(SIZE)], []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(command, env=kept | shared | {"RANK": str(rank)}, stdout=file, stderr=subprocess.STDOUT)
                )
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * SIZE, "\n\n".join(log.read_text() for log in logs)
