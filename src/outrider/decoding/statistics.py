"""What a run reports: counts per sequence, seconds per stage, and the share of the cache that was read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from outrider.models import ModelSpec
from outrider.models.quantized_keys import coded_bytes
from outrider.ops.quantized_keys.layout import BLOCK, EXACT
from outrider.types import Selection

STAGES = ("prefill", "propose", "score", "select", "verify", "accept", "confirm")


@dataclass(slots=True, kw_only=True)
class Statistics:
    """Counts of one sequence, or of a whole run when added up with `total`.

    Seconds of a stage that ran for several sequences at once are shared equally among them, so they add up to the run's.
    """

    mode: str
    method: str | None  # None where lists are not used to verify
    drafting: str | None = None  # None without a draft
    prompt_tokens: int = 0
    prefill_listed: float = 0.0  # tokens on the lists of a prompt's blocks, averaged over heads and layers, summed over blocks
    prefill_before: int = 0  # tokens before these blocks, summed
    generated_tokens: int = 0
    rounds: int = 0
    drafted: int = 0  # tokens proposed
    accepted: int = 0  # drafted tokens that were accepted; every round emits one recovered or bonus token more
    accepted_at: list[int] = field(default_factory=list)  # [K] how often the drafted token at this position was accepted
    listed: float = 0.0  # tokens the lists held, averaged over list heads and layers with full attention, summed over rounds
    cached: int = 0  # tokens the caches held, summed over rounds
    bytes_read: int = 0  # of target keys and values in verification and confirmation, and of draft keys in scoring
    bytes_dense: int = 0  # of target keys and values that dense verification would have read
    tentative: int = 0  # tokens of sparse rounds that a dense forward has to confirm
    confirmed: int = 0  # of these, how many passed; every confirmation emits one recovered or bonus token more
    rolled_back: int = 0  # of these, how many did not, or came behind one that did not
    confirmations: int = 0  # dense forwards over tentative tokens
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    decode_seconds: float = 0.0  # wall clock from the first round to the last; of a run: while some sequence decoded
    began: float | None = None  # that clock at the first round's start; tells nothing by itself and is not reported
    audited: int = 0  # tokens checked against the dense target
    agreed: int = 0  # of these, how many it would also have chosen

    @property
    def accepted_per_round(self) -> float:
        """Drafted tokens accepted a round (a round emits one token more)."""
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def kept_fraction(self) -> float:
        """Share of the cached tokens that the target's lists held (layers without a list count as 1)."""
        return self.listed / self.cached if self.cached else 1.0

    @property
    def prefill_kept_fraction(self) -> float:
        """Share of the tokens before them that those blocks of the prompt read which had lists; 1 where none had."""
        return self.prefill_listed / self.prefill_before if self.prefill_before else 1.0

    @property
    def kv_read_fraction(self) -> float:
        """Bytes read, the scoring pass over the draft's keys included, over the bytes dense verification reads."""
        return self.bytes_read / self.bytes_dense if self.bytes_dense else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the wall clock of decoding (prefill left out, everything else counted in)."""
        return self.generated_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of audited tokens that the dense target would also have chosen; None without an audit."""
        return self.agreed / self.audited if self.audited else None

    def as_dict(self) -> dict[str, Any]:
        """Fields and derived figures, ready for JSON."""
        shares = ("prefill_kept_fraction", "kept_fraction", "kv_read_fraction", "agreement")
        derived = ("accepted_per_round", "tokens_per_second", *shares)
        counted = {name: value for name, value in asdict(self).items() if name != "began"}
        return counted | {name: getattr(self, name) for name in derived}


def total(parts: list[Statistics]) -> Statistics:
    """Add up the sequences of one run. Its decoding time is that in which at least one of them decoded."""
    result = Statistics(mode=parts[0].mode, method=parts[0].method, drafting=parts[0].drafting)
    until = float("-inf")
    for began, end in sorted((part.began, part.began + part.decode_seconds) for part in parts if part.began is not None):
        result.decode_seconds += max(0.0, end - max(began, until))
        until = max(until, end)
    summed = (
        "prompt_tokens",
        "prefill_listed",
        "prefill_before",
        "generated_tokens",
        "rounds",
        "drafted",
        "accepted",
        "tentative",
        "confirmed",
        "rolled_back",
        "confirmations",
        "listed",
        "cached",
    )
    for part in parts:
        for name in (*summed, "bytes_read", "bytes_dense", "audited", "agreed"):
            setattr(result, name, getattr(result, name) + getattr(part, name))
        for stage, seconds in part.seconds.items():
            result.seconds[stage] += seconds
    result.accepted_at = [sum(column) for column in zip(*(part.accepted_at for part in parts), strict=True)]
    return result


class StageClock:
    """Seconds by stage. On a GPU they are measured by events, and counted once the work is known to be done."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._running: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: tuple[str, Any] | None = None  # the stage that time is added to now, and since when

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`. A stage around it stands still meanwhile."""
        around = None if self._open is None else self._open[0]
        self._switch(name)
        try:
            yield
        except BaseException:
            self._open = None  # what has failed is not counted
            raise
        self._switch(around)

    def _switch(self, name: str | None) -> None:
        """From now on it is the time of stage `name`; None: of none."""
        now: Any
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self._open is not None:
            self._count(*self._open, now)
        self._open = None if name is None else (name, now)

    def _count(self, name: str, began: Any, ended: Any) -> None:
        if self._device.type == "cuda":
            self._running.append((name, began, ended))
        else:
            self._add(name, ended - began)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def settle(self) -> dict[str, float]:
        """The seconds so far, every stage finished; waits for those that run."""
        for name, start, end in self._running:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1e3)
        self._running.clear()
        return dict(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """How many tokens the lists of a round hold, summed over the layers that have lists."""

    layers: tuple[int, ...]  # target layers that have lists
    tokens: Tensor  # [B] fp64, averaged over list heads
    # [B] fp64: cached rows that are read, a row of a KV head once, and what stands for unlisted ones (fp32), as rows of as many
    # bytes; summed over KV heads
    rows: Tensor

    @classmethod
    def of(cls, selection: Selection, target: ModelSpec, size: int) -> Listed:
        """Counts the lists on their device; `size` bounds the positions in them."""
        layers, b, heads, m = selection.indices.shape
        counts = selection.counts.double()  # [layers, B, Hs]
        kv_heads = target.layers[selection.layers[0]].kv_heads
        if heads <= kv_heads:
            rows = counts.sum(-1) * (kv_heads // heads)
        else:  # query heads with lists of their own: those of a group may name the same rows
            listed = torch.arange(m, device=counts.device) < selection.counts.unsqueeze(-1)
            places = torch.where(listed, selection.indices, size).reshape(layers, b, kv_heads, -1).long()
            marks = torch.zeros(layers, b, kv_heads, size + 1, dtype=torch.bool, device=counts.device)
            rows = marks.scatter_(-1, places, True)[..., :size].sum((-1, -2)).double()
        total = rows.sum(0)
        if selection.unlisted is not None:
            total = total + layers * kv_heads * 2 / target.cache_dtype.itemsize
        return cls(layers=selection.layers, tokens=counts.mean(-1).sum(0), rows=total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What one verification reads for one sequence."""

    listed: float  # tokens, averaged over list heads and full-attention layers
    bytes_read: int
    bytes_dense: int


class ReadCounter:
    """Counts what verifying `t` tokens reads, on the host.

    Query heads that share a KV head and own lists of their own are charged the union of their lists. Window layers are charged
    their window in both columns. Scoring is charged the keys of the scored draft layers, once; with `bits` the older
    ones as codes.
    """

    def __init__(
        self, target: ModelSpec, draft: ModelSpec, scored_layers: tuple[int, ...], t: int, bits: int | None = None
    ) -> None:
        self._target, self._t = target, t
        shapes = [draft.layers[layer] for layer in scored_layers]
        # of a cached token
        self._score_bytes = sum(x.kv_heads * x.head_dim for x in shapes) * draft.cache_dtype.itemsize
        self._code_bytes = None if bits is None else coded_bytes(shapes, bits)
        self._dense = self._row_bytes(range(len(target.layers)))

    def of(self, length: int, layers: tuple[int, ...] = (), tokens: float = 0.0, rows: float = 0.0) -> Reads:
        """Of a sequence with `length` cached tokens; `layers` have lists, of which `tokens` and `rows` are its `Listed`."""
        full = self._target.full_layers
        if not layers:
            dense = self._bytes(self._dense, length)
            return Reads(listed=float(length), bytes_read=dense, bytes_dense=dense)
        shape = self._target.layers[layers[0]]
        listed_rows = int(rows) + self._t * shape.kv_heads * len(layers)
        read = listed_rows * 2 * shape.head_dim * self._target.cache_dtype.itemsize
        read += self._bytes(self._row_bytes(set(range(len(self._target.layers))) - set(layers)), length)
        return Reads(
            listed=(tokens + length * (len(full) - len(layers))) / len(full),
            bytes_read=read + self._scoring(length),
            bytes_dense=self._bytes(self._dense, length),
        )

    def dense(self, length: int, t: int) -> int:
        """Bytes that a dense forward of `t` tokens reads behind `length` cached ones."""
        return self._bytes(self._dense, length, t)

    def _scoring(self, length: int) -> int:
        if self._code_bytes is None:
            return (length + self._t) * self._score_bytes
        coded = max(length - EXACT, 0) // BLOCK * BLOCK
        return coded * self._code_bytes + (length - coded + self._t) * self._score_bytes

    def _row_bytes(self, layers: Iterable[int]) -> dict[int | None, int]:
        """Bytes of keys and values of one cached token in these layers, by window."""
        found: dict[int | None, int] = {}
        for shape in (self._target.layers[layer] for layer in layers):
            size = 2 * shape.kv_heads * shape.head_dim * self._target.cache_dtype.itemsize
            found[shape.window] = found.get(shape.window, 0) + size
        return found

    def _bytes(self, row_bytes: dict[int | None, int], length: int, t: int | None = None) -> int:
        """A window's first query sees itself and the tokens before it, window - 1 at most."""
        t = self._t if t is None else t
        return sum(((length if window is None else min(length, window - 1)) + t) * size for window, size in row_bytes.items())
