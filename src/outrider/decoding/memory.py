"""Memory: what the rows of a run hold on the device, and how many of them fit.

    row = keys and values of target and draft, for every token of its capacity
        + masses of the draft's attention, twice: a round first runs as it is, then as a graph, in memory of its own
        + token lists
        + the draft's keys in few bits, where scoring reads these

Weights are loaded by then. What else comes and goes (activations, a prefill's masks, graphs) has a reserve.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from outrider.errors import PromptError
from outrider.models import ModelSpec

RESERVE = 0.1  # share of the free memory that rows leave to everything else
INDEX_BYTES = 4  # of a list entry, int32
GB = 1e9
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowDemand:
    """What one row of a run needs. All rows have the capacity of the longest one."""

    target: ModelSpec
    draft: ModelSpec | None  # None: the target decodes alone
    capacity: int  # tokens a row's caches hold
    score_rows: int = 0  # R: scored draft layers x draft query heads, times T where queries are kept apart; 0 without scoring
    score_bytes: int = 0  # of one mass: 2 in bf16, 4 in fp32
    list_entries: int = 0  # Lt x Hs x M
    code_bytes: int = 0  # of one token's keys in few bits, in all scored layers

    @property
    def target_bytes(self) -> int:
        """Bytes of the target's keys and values."""
        return self.capacity * token_bytes(self.target)

    @property
    def draft_bytes(self) -> int:
        """Bytes of the draft's keys and values."""
        return self.capacity * token_bytes(self.draft) if self.draft is not None else 0

    @property
    def guidance_bytes(self) -> int:
        """Bytes of masses and lists."""
        return 2 * self.capacity * self.score_rows * self.score_bytes + self.list_entries * INDEX_BYTES

    @property
    def coded_bytes(self) -> int:
        """Bytes of keys in few bits."""
        return self.capacity * self.code_bytes

    @property
    def bytes(self) -> int:
        return self.target_bytes + self.draft_bytes + self.guidance_bytes + self.coded_bytes


def token_bytes(model: ModelSpec) -> int:
    """Bytes of one cached token: its keys and values in all layers. Layers with a window store every token, too."""
    return sum(2 * layer.kv_heads * layer.head_dim for layer in model.layers) * model.cache_dtype.itemsize


def rows_that_fit(demand: RowDemand, free: int) -> int:
    """How many rows fit into `free` bytes, the reserve left alone."""
    return _usable(free) // demand.bytes


def tokens_that_fit(demand: RowDemand, free: int) -> int:
    """The largest capacity of a single row in `free` bytes, the reserve left alone, with lists as long as the demand's."""
    lists = demand.list_entries * INDEX_BYTES
    per_token = (demand.bytes - lists) // demand.capacity
    return max(0, (_usable(free) - lists) // per_token)


def plan_rows(demand: RowDemand, wanted: int, free: int | None, *, prompt: int, tokens: int, reading: int = 0) -> int:
    """How many of the `wanted` rows run at the same time: as many as fit into `free` bytes (all where None: not known), less
    those that `reading` a prompt takes beside its row.

    `prompt` is the number of the longest prompt, `tokens` what it comes to with all that it may generate, at most the
    demand's capacity. Warns when fewer fit than are wanted. Raises PromptError when not even one does.
    """
    if free is None:
        return wanted
    free = max(0, free - reading)
    rows = rows_that_fit(demand, free)
    if rows >= wanted:
        return wanted
    held = demand.target_bytes, demand.draft_bytes, demand.guidance_bytes, demand.coded_bytes
    target, draft, guidance, coded = (n / GB for n in held)
    if rows == 0:
        most = max(0, tokens_that_fit(demand, free) - (demand.capacity - tokens))
        codes = f", {coded:.1f} GB of keys in few bits" if coded else ""
        raise PromptError(
            f"prompt {prompt}: {tokens:,} tokens need {target + draft:.1f} GB of keys and values (target {target:.1f}, draft "
            f"{draft:.1f}){codes} and {guidance:.1f} GB of scores and lists; allowed: at most {most:,} tokens in the "
            f"{free / GB:.1f} GB that are free" + (f" beside {reading / GB:.1f} GB to read it from lists" if reading else "")
        )
    warnings.warn(
        f"batch-size: {wanted} rows of {tokens:,} tokens need {wanted * demand.bytes / GB:.1f} GB, but {free / GB:.1f} GB are "
        f"free; {rows} run at the same time",
        stacklevel=2,
    )
    return rows


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on `device` now; None where the system does not tell.

    On a GPU what PyTorch's allocator holds without using it counts as free; on a CPU what the system could take back from its
    file caches does.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if MEMINFO.exists():
        found = dict(line.split(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
        if "MemAvailable" in found:
            return int(found["MemAvailable"].split()[0]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _usable(free: int) -> int:
    return int(free * (1 - RESERVE))
