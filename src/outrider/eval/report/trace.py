"""Task "trace": the lines that eval/trace.py writes, as a page shows them."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from outrider.eval.json_lines import check_field


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
    """Rounds of one prompt."""

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
    conditions: dict[str, str | int | bool]

    def __post_init__(self) -> None:
        tokens, prompt = len(self.tokens), self.prompt_tokens
        check_field("pieces", f"{len(self.pieces)} of them", len(self.pieces) == tokens, f"one for each of {tokens} tokens")
        check_field("prompt_tokens", prompt, 1 <= prompt <= tokens, f"1 .. {tokens}")
        check_field("rounds", "none", bool(self.rounds), "at least one")
        cached = prompt - 1
        for number, one in enumerate(self.rounds, start=1):
            where = f"rounds, round {number}"
            check_field(f"{where}, cached", one.cached, one.cached == cached < tokens, f"{cached}, below {tokens} tokens")
            check_field(f"{where}, accepted", one.accepted, 0 <= one.accepted <= len(one.drafted), f"0 .. {len(one.drafted)}")
            pieces = len(one.drafted_pieces) == len(one.drafted)
            check_field(f"{where}, drafted_pieces", one.drafted_pieces, pieces, "one a token")
            self._check_lists(where, one)
            cached += one.accepted + 1

    def _check_lists(self, where: str, one: Round) -> None:
        if one.lists is None:
            return
        same = len(one.lists) == len(self.layers) and len({len(layer) for layer in one.lists}) == 1 and bool(one.lists[0])
        check_field(f"{where}, lists", f"{len(one.lists)} layers", same, f"{len(self.layers)} layers of equally many heads")
        for bits in (bits for layer in one.lists for bits in layer):
            try:
                size = len(base64.b64decode(bits, validate=True))
            except ValueError:
                size = -1
            allowed = f"base64 of {-(-one.cached // 8)} bytes, a bit for each of {one.cached} tokens"
            check_field(f"{where}, lists", bits[:20], size == -(-one.cached // 8), allowed)
