"""Tokens to text, one token at a time: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any


class TextStream:
    """Turns the tokens of one sequence into text that can be shown at once.

    Text is held back while its last character is incomplete (a token may end inside a UTF-8 character) and while its end could
    still become a stop string. Without a tokenizer the text stays empty. `before` are tokens that the text continues, such as
    the last of the prompt: some tokenizers drop the space of whatever they decode first.
    """

    def __init__(self, tokenizer: Any | None, stop: tuple[str, ...] = (), before: Sequence[int] = ()) -> None:
        self.text = ""  # everything decided so far; ends before the stop string once one was found
        self.stopped = False
        self._tokenizer: Any = tokenizer
        self._stop = stop
        self._tokens = list(before)
        self._window = 0  # the tokens from here on are decoded together: spaces depend on the token before
        self._read = len(self._tokens)  # the tokens before this one are in `text`, or were there before it
        if tokenizer is not None and self._decode(0, self._read).endswith("\ufffd"):
            self._window = self._read  # the prompt ends inside a character: nothing to continue
        self._shown = 0  # characters of `text` that `take` has handed out

    def fork(self) -> TextStream:
        """A stream that goes on from here without this one."""
        other = copy(self)
        other._tokens = list(self._tokens)
        return other

    def push(self, token: int) -> bool:
        """Add a token; True when a stop string is now complete (the text then ends before it)."""
        self._tokens.append(token)
        if self._tokenizer is None:
            return False
        before = self._decode(self._window, self._read)
        now = self._decode(self._window, len(self._tokens))
        whole = now.rstrip("\ufffd")  # without a last character that is incomplete
        searched = max((len(s) for s in self._stop), default=0) - 1
        start = max(0, len(self.text) - searched)
        text = self.text + whole[len(before) :]
        found = [at for s in self._stop if (at := text.find(s, start)) >= 0]
        if found:
            self.text = text[: min(found)]
            self.stopped = True
        elif whole == now:
            self.text = text
            self._window, self._read = self._read, len(self._tokens)
        return self.stopped

    def take(self, *, final: bool = False) -> str:
        """The text that became certain since the last call; with `final`, all that is left."""
        if final and not self.stopped and self._tokenizer is not None and self._read < len(self._tokens):
            before = self._decode(self._window, self._read)
            self.text += self._decode(self._window, len(self._tokens))[len(before) :]
            self._read = len(self._tokens)
        end = len(self.text) if final or self.stopped else len(self.text) - self._held()
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _held(self) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        most = max((len(s) for s in self._stop), default=0) - 1
        ends = (n for n in range(min(most, len(self.text)), 0, -1) if any(s.startswith(self.text[-n:]) for s in self._stop))
        return next(ends, 0)

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)
