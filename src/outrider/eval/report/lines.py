"""What a results file may hold beside rows: diagnostics of heads and rounds, and traces. One dataclass a task."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

Conditions = dict[str, str | int | bool]
Matrix = list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """What every diagnostic names: the method and its budget, and what it was measured on, where it says so."""

    task: str
    method: str
    keep: float | None
    text: str = ""
    top_p: float | None = None
    context: int | None = None
    conditions: Conditions = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads(Diagnostic):
    """Task "heads": the share of each query head's attention mass that its list holds."""

    layers: list[int]
    recall: Matrix  # [layers][query heads], 0 .. 1

    def __post_init__(self) -> None:
        _check_matrix("recall", self.layers, self.recall)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap(Diagnostic):
    """Task "overlap": how alike lists are: Jaccard index, with the round before or with what the target would have listed."""

    between: str  # "rounds" or "draft and target"
    layers: list[int]
    overlap: Matrix  # [layers][lists], 0 .. 1

    def __post_init__(self) -> None:
        _check_matrix("overlap", self.layers, self.overlap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance(Diagnostic):
    """Task "acceptance": the share of rounds in which the drafted token at a position was accepted."""

    by_position: list[float]  # [K]

    def __post_init__(self) -> None:
        _check("by_position", self.by_position, bool(self.by_position), "a share for each of 1 .. K")
        _check_shares("by_position", self.by_position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement(Diagnostic):
    """Task "disagreement": how far the target that reads its lists disagrees with the one that reads all."""

    kept_fraction: float
    disagreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A round of a trace. Its lists are bit sets, by layer and list head; a dense round has none."""

    cached: int  # tokens before the round; behind them the pending one
    drafted: list[int]
    drafted_pieces: list[str]
    accepted: int
    next: int  # recovered, or bonus where all drafted tokens were accepted
    next_piece: str
    lists: list[list[str]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Task "trace": what eval/trace.py writes."""

    task: str
    text: str
    method: str
    keep: float | None
    top_p: float | None
    prompt_tokens: int
    tokens: list[int]
    pieces: list[str]
    layers: list[int]
    rounds: list[Round]
    all_rounds: int
    conditions: Conditions

    def __post_init__(self) -> None:
        tokens, prompt = len(self.tokens), self.prompt_tokens
        _check("pieces", f"{len(self.pieces)} of them", len(self.pieces) == tokens, f"one for each of {tokens} tokens")
        _check("prompt_tokens", prompt, 1 <= prompt <= tokens, f"1 .. {tokens}")
        _check("rounds", "none", bool(self.rounds), "at least one")
        cached = prompt - 1
        for number, one in enumerate(self.rounds, start=1):
            where = f"rounds, round {number}"
            _check(f"{where}, cached", one.cached, one.cached == cached < tokens, f"{cached}, below {tokens} tokens")
            _check(f"{where}, accepted", one.accepted, 0 <= one.accepted <= len(one.drafted), f"0 .. {len(one.drafted)}")
            _check(f"{where}, drafted_pieces", one.drafted_pieces, len(one.drafted_pieces) == len(one.drafted), "one a token")
            self._check_lists(where, one)
            cached += one.accepted + 1

    def _check_lists(self, where: str, one: Round) -> None:
        if one.lists is None:
            return
        same = len(one.lists) == len(self.layers) and len({len(layer) for layer in one.lists}) == 1 and bool(one.lists[0])
        _check(f"{where}, lists", f"{len(one.lists)} layers", same, f"{len(self.layers)} layers of equally many heads")
        for bits in (bits for layer in one.lists for bits in layer):
            try:
                size = len(base64.b64decode(bits, validate=True))
            except ValueError:
                size = -1
            allowed = f"base64 of {-(-one.cached // 8)} bytes, a bit for each of {one.cached} tokens"
            _check(f"{where}, lists", bits[:20], size == -(-one.cached // 8), allowed)


DIAGNOSTICS: dict[str, type[Diagnostic]] = {
    "heads": Heads,
    "overlap": Overlap,
    "acceptance": Acceptance,
    "disagreement": Disagreement,
}


class FieldError(ValueError):
    """A field of a line is not what it should be."""

    def __init__(self, name: str, got: Any, allowed: str) -> None:
        super().__init__(f"field {name}: got {got!r}; allowed: {allowed}")


def _check(name: str, got: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise FieldError(name, got, allowed)


def _check_shares(name: str, values: list[float]) -> None:
    for value in values:
        _check(name, value, 0 <= value <= 1, "shares in 0 .. 1")


def _check_matrix(name: str, layers: list[int], values: Matrix) -> None:
    _check(
        name, f"{len(values)} layers", len(values) == len(layers) > 0, f"one list for each of {len(layers)} layers, 1 or more"
    )
    widths = sorted({len(row) for row in values})
    _check(name, f"lists of {widths} heads", len(widths) == 1 and widths[0] > 0, "equally many heads in every layer, 1 or more")
    for row in values:
        _check_shares(name, row)
