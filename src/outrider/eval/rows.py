"""What is evaluated and what comes out: cases, texts, and result rows as JSON lines."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from outrider.config import VERSION, Budget
from outrider.errors import OptionError, ResultsError
from outrider.eval.bootstrap import Interval, change_interval, mean_interval
from outrider.eval.json_lines import FieldError, parse, records
from outrider.models import LanguageModel
from outrider.models.quantized_keys import name_of_bits

DENSE = "dense"  # the method without lists


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A method and its budget; method "dense" has none."""

    method: str
    budget: Budget | None = None
    map: str | None = None  # of the alignment; None: the one that all cases are given


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A document to evaluate on."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures of one (text, method, budget); fields that a task does not measure are None."""

    task: str
    text: str
    method: str
    keep: float | None
    top_p: float | None
    context: int
    scored_tokens: int
    ppl: float | None = None
    ppl_dense: float | None = None
    delta_percent: float | None = None  # of perplexity, against dense
    agreement: float | None = None  # share of scored tokens whose most probable token is the dense target's
    recalled: int | None = None
    asked: int | None = None
    part: str | None = None  # of the task, such as RULER's family
    f1: float | None = None  # of words, the mean over questions: see eval/scores.py
    rouge_l: float | None = None
    kept_fraction: float = 1.0
    kv_read_fraction: float = 1.0
    seconds: float = 0.0
    intervals: dict[str, Interval] = field(default_factory=dict)  # of a mean over documents, by figure: see `summarize`
    conditions: dict[str, str | int] = field(default_factory=dict)  # models, versions, device: see `conditions`

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Line(Protocol):
    """What can be appended to a file of result rows."""

    @property
    def conditions(self) -> dict[str, str | int]:
        """What its figures depend on."""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""


def check_rows_path(path: str | Path) -> None:
    """Raise OptionError unless rows can be appended to `path`; leaves no file behind that was not there."""
    path = Path(path)
    existed = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise OptionError("json", str(path), f"a file that can be written ({error.strerror})") from error
    if not existed:
        path.unlink()


def conditions(
    pair: tuple[LanguageModel, LanguageModel], draft_tokens: int, map_name: str | None, bits: int | None
) -> dict[str, str | int]:
    """What a figure depends on beside the row's own fields; `bits` are those of the keys that are scored."""
    target, draft = pair
    device = target.spec.device
    return {
        "target": f"{target.spec.name} {target.spec.digest}",
        "draft": f"{draft.spec.name} {draft.spec.digest}",
        "map": map_name or "the method's own",
        "draft_tokens": draft_tokens,
        "dtype": str(target.spec.dtype).removeprefix("torch."),
        "kv_dtype": target.spec.kv_dtype,
        "score_keys": name_of_bits(bits),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "outrider": VERSION,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def of_case(common: dict[str, str | int], case: Case) -> dict[str, str | int]:
    """The conditions of a case's rows: those of all, its own map where it has one, and how its lists share a budget and what
    stands for unlisted tokens."""
    own = {} if case.map is None else {"map": case.map}
    budget = {} if case.budget is None else {"allocation": case.budget.allocation, "unlisted": case.budget.unlisted}
    return common | own | budget


def append_rows(path: str | Path, rows: Iterable[Line], command: str | None = None) -> None:
    """Append rows as JSON lines, each in a single write, so that a line is there whole or not at all.

    `command` is recorded among the conditions.
    """
    added = {} if command is None else {"command": command}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for row in rows:
            os.write(descriptor, (json.dumps(row.as_dict() | {"conditions": row.conditions | added}) + "\n").encode())
    finally:
        os.close(descriptor)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file of JSON lines; its conditions may say more than those of a new row.

    Raises ResultsError, naming file, line and field, for a line that is no row.
    """
    rows = []
    for where, record in records(Path(path), "a file of result rows"):
        try:
            rows.append(parse(Row, record))
        except FieldError as error:
            raise ResultsError(f"{where}, {error}") from error
    return rows


def summarize(rows: list[Row]) -> list[Row]:
    """The mean over texts of every (task, part, method, budget), in the order of first appearance; counts are added up.

    `intervals` holds the 95% bootstrap interval of every quality figure, in its unit ("recall": of recalled / asked), where
    there are two documents or more. Perplexity is paired with dense, which has no interval of what compares it with itself.
    """
    order = list(dict.fromkeys(_key(row) for row in rows))
    grouped = {key: list(group) for key, group in groupby(sorted(rows, key=lambda row: order.index(_key(row))), key=_key)}
    return [_mean(group) for group in grouped.values()]


def _key(row: Row) -> tuple[str, str | None, str, float | None, float | None, int]:
    return row.task, row.part, row.method, row.keep, row.top_p, row.context


def _mean(rows: list[Row]) -> Row:
    def mean(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values) / len(values)

    def added(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values)

    first = rows[0]
    means = ("ppl", "ppl_dense", "delta_percent", "agreement", "f1", "rouge_l", "kept_fraction", "kv_read_fraction")
    counts = ("scored_tokens", "recalled", "asked", "seconds")
    return Row(
        task=first.task,
        part=first.part,
        text=f"mean of {len(rows)}",
        method=first.method,
        keep=first.keep,
        top_p=first.top_p,
        context=first.context,
        conditions=first.conditions,
        intervals=_intervals(rows),
        **{name: mean(name) for name in means},
        **{name: added(name) for name in counts},
    )


def _intervals(rows: list[Row]) -> dict[str, Interval]:
    def each(name: str) -> list[float] | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else values

    found: dict[str, Interval | None] = {}
    if rows[0].method != DENSE:
        if (ppl := each("ppl")) and (base := each("ppl_dense")):
            found["delta_percent"] = change_interval(ppl, base)
        if agreement := each("agreement"):
            found["agreement"] = mean_interval(agreement)
    if (recalled := each("recalled")) and (asked := each("asked")):
        found["recall"] = mean_interval(recalled, asked)
    for name in ("f1", "rouge_l"):
        if values := each(name):
            found[name] = mean_interval(values)
    return {name: interval for name, interval in found.items() if interval is not None}
