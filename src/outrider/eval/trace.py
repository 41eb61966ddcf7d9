"""A trace of generation: every round's drafted tokens, what became of them, and the tokens that each list kept.

One JSON line a prompt. A list is a bit set over the cached tokens: bit p % 8 of byte p // 8 is token p; the bytes are base64.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence as Tokens
from typing import Any

import torch

from outrider.config import EngineConfig
from outrider.decoding.rounds import RowOutcome
from outrider.decoding.sequence import CONTINUED, Sequence
from outrider.decoding.text import TextStream
from outrider.errors import OptionError
from outrider.types import Selection

TASK = "trace"
ROUNDS = 64  # of each prompt, unless asked otherwise
MAX_BYTES = 8 << 20  # of all lists of a run, as text: what a page can hold and a phone can show
_LONG = 4096  # characters after which text is decoded anew, so that time stays in proportion to tokens


class Recorder:
    """Watches a run (`Outrider.stream(watch=...)`) and keeps the first `rounds` rounds of every prompt, where there is room."""

    def __init__(self, rounds: int = ROUNDS, max_bytes: int = MAX_BYTES) -> None:
        self.full = False  # rounds were left out for want of room
        self._limit, self._room, self._max_bytes = rounds, max_bytes, max_bytes
        self._sequences: dict[int, Sequence] = {}
        self._rounds: dict[int, list[dict[str, Any]]] = {}
        self._layers: tuple[int, ...] = ()

    def __call__(self, sequence: Sequence, outcome: RowOutcome, selection: Selection | None) -> None:
        """A round of one sequence, before its tokens are emitted.

        Raises OptionError where not even the first round fits.
        """
        self._sequences[sequence.index] = sequence
        rounds = self._rounds.setdefault(sequence.index, [])
        if self.full or len(rounds) == self._limit:
            return
        lists = None if selection is None else bit_sets(selection, sequence.cached)
        size = sum(len(text) for layer in lists or () for text in layer)
        if size > self._room:
            if size > self._max_bytes:
                allowed = f"at most {self._max_bytes}: a shorter prompt, or a method with fewer lists"
                raise OptionError("trace", f"{size} bytes for the lists of one round", allowed)
            self.full = True
            return
        self._room -= size
        if selection is not None:
            self._layers = selection.layers
        rounds.append(
            {
                "cached": sequence.cached,
                "drafted": outcome.drafted,
                "accepted": len(outcome.tokens) - 1,
                "next": outcome.tokens[-1],  # recovered, or bonus where all were accepted
                "lists": lists,
            }
        )

    def lines(self, names: list[str], tokenizer: Any, config: EngineConfig, conditions: dict[str, Any]) -> list[dict[str, Any]]:
        """One document for each prompt that ran, `names[i]` for prompt i, ready for JSON."""
        common = {"method": config.method, "keep": config.budget.keep, "top_p": config.budget.top_p}
        return [
            {"task": TASK, "text": names[index]} | common | self._line(index, tokenizer) | {"conditions": conditions}
            for index in sorted(self._sequences)
        ]

    def _line(self, index: int, tokenizer: Any) -> dict[str, Any]:
        sequence, rounds = self._sequences[index], self._rounds[index]
        emitted = sum(entry["accepted"] + 1 for entry in rounds)
        tokens = [*sequence.prompt, *sequence.tokens[:emitted]]  # fewer where the sequence ended inside its last round

        def texts(entry: dict[str, Any]) -> dict[str, Any]:
            end = entry["cached"] + 1  # with the pending token
            before, accepted = tokens[max(end - CONTINUED, 0) : end], entry["drafted"][: entry["accepted"]]
            return {
                "drafted_pieces": pieces(tokenizer, entry["drafted"], before),
                "next_piece": pieces(tokenizer, [entry["next"]], [*before, *accepted])[0],
            }

        return {
            "prompt_tokens": len(sequence.prompt),
            "tokens": tokens,
            "pieces": pieces(tokenizer, tokens),
            "layers": list(self._layers),
            "rounds": [entry | texts(entry) for entry in rounds],
            "all_rounds": sequence.statistics.rounds,
        }


def bit_sets(selection: Selection, cached: int) -> list[list[str]]:
    """The lists of one sequence's selection, [L, 1, Hs, M], as bit sets over its `cached` tokens, by layer and list head.

    `selection.lengths` may be the cache's own, which has gone on by the time a round is watched.
    """
    layers, heads, width = selection.indices[:, 0].shape
    counted = torch.arange(width) < selection.counts[:, 0, :, None].cpu()
    places = -(-cached // 8) * 8
    kept = torch.zeros(layers, heads, places + 1, dtype=torch.bool)  # the last place takes what is not counted
    kept.scatter_(-1, torch.where(counted, selection.indices[:, 0].cpu().long(), places), True)
    bits = kept[..., :-1].unflatten(-1, (-1, 8)).to(torch.uint8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).numpy()  # [L, Hs, bytes]
    return [[base64.b64encode(own.tobytes()).decode("ascii") for own in layer] for layer in packed]


def listed(bits: str) -> list[int]:
    """The positions in a bit set, ascending."""
    data = base64.b64decode(bits, validate=True)
    return [8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte >> bit & 1]


def pieces(tokenizer: Any, tokens: Tokens[int], before: Tokens[int] = ()) -> list[str]:
    """The text of every token; put together, the text of all.

    A token that ends inside a character has none, and the one that completes the character all of it. Special tokens have their
    names. `before` are tokens that the text continues.
    """
    special = set(tokenizer.all_special_ids)
    stream, found = TextStream(tokenizer, before=before[-CONTINUED:]), []
    for at, token in enumerate(tokens):
        if token in special:
            found.append(stream.take(final=True) + str(tokenizer.convert_ids_to_tokens(token)))
            stream = TextStream(tokenizer)
            continue
        stream.push(token)
        found.append(stream.take(final=at == len(tokens) - 1))
        if found[-1] and len(stream.text) > _LONG:
            stream = TextStream(tokenizer, before=tokens[max(at + 1 - CONTINUED, 0) : at + 1])
    return found
