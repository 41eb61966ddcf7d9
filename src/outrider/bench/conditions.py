"""What a measured figure depends on beside its case: machine, versions, code, date, command."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
UNKNOWN = "unknown"


def conditions(device: torch.device, command: str) -> dict[str, str | float]:
    """Conditions known before anything is measured."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "none",
        "transformers": _version("transformers"),
        "commit": _commit(),
        "ops": _digest(sorted((PACKAGE / "ops").rglob("*"))),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    """The commit checked out; "+" behind it where tracked files differ. An installed package has none."""
    if PACKAGE.parent.name != "src":
        return UNKNOWN
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    changed = commit != UNKNOWN and _output(["git", "status", "--porcelain", "--untracked-files=no"]) not in ("", UNKNOWN)
    return commit + "+" * changed


def _digest(files: Sequence[Path]) -> str:
    """Of the kernels' sources: the same wherever they lie, with or without git."""
    code = [file for file in files if file.suffix in (".py", ".cu", ".cuh")]
    return hashlib.sha256(b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in code)).hexdigest()[:12]


def _output(command: Sequence[str]) -> str:
    """The first line a command prints; UNKNOWN if it cannot run."""
    try:
        done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
