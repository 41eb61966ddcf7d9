"""One prompt on its way: its tokens, its random numbers, its text, its counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.decoding.noise import key_of
from outrider.decoding.statistics import Statistics
from outrider.decoding.text import TextStream

CONTINUED = 4  # prompt tokens decoded along with the first generated ones


class Sequence:
    """A prompt and what was generated for it. Never sees a tensor of the batch, so its result cannot depend on neighbours."""

    def __init__(
        self,
        index: int,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Any | None,
        eos: tuple[int, ...],
        statistics: Statistics,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.params = params
        self.tokens: list[int] = []  # generated
        self.tentative: list[int] = []  # behind these, brought by sparse rounds and to be confirmed by a dense forward
        self.held = 0  # that the device has of these: further ones, too, behind one that would finish the sequence
        self.share: float | None = None  # what its lists keep, where its guard has a say; None: as the budget says
        self.closing = False  # the last tentative token would finish the sequence
        self.finish_reason: str | None = None  # "length", "eos", "stop", "cancelled" or "error" once finished
        self.error: str | None = None  # what went wrong, if something did
        self.cancelled = False  # to be ended before the next round
        self.text = TextStream(tokenizer, params.stop, before=prompt[-CONTINUED:])
        self._ahead: TextStream | None = None  # the text with the tentative tokens
        self.statistics = statistics
        self._eos = () if params.ignore_eos else eos
        self.key = key_of(params.seed)  # of its noise, where tokens are chosen by that
        self._generator = torch.Generator().manual_seed(params.seed)

    @property
    def pending(self) -> int:
        """The last token: generated (or given), not yet in any cache."""
        return (self.tentative or self.tokens or self.prompt)[-1]

    @property
    def cached(self) -> int:
        """Tokens in the caches: all but the pending one."""
        return len(self.prompt) + len(self.tokens) + len(self.tentative) - 1

    @property
    def text_cached(self) -> list[int]:
        """The tokens in the caches."""
        return (self.prompt + self.tokens + self.tentative)[: self.cached]

    def uniforms(self, count: int) -> Tensor:
        """The next `count` random numbers of this sequence, [count] fp32 in [0, 1)."""
        return torch.rand(count, generator=self._generator)

    def end(self, reason: str, error: str | None = None) -> None:
        """Finish for a reason that is not in the text."""
        self.finish_reason, self.error = reason, error

    def extend(self, tokens: list[int]) -> list[int]:
        """Emit tokens until one finishes the sequence, in place of the tentative ones; returns those that were emitted."""
        self.tentative, self.held, self.closing, self._ahead = [], 0, False, None
        emitted = []
        for token in tokens:
            self.tokens.append(token)
            emitted.append(token)
            self.finish_reason = self._reason(token, self.text, len(self.tokens))
            if self.finish_reason is not None:
                break
        return emitted

    def hold(self, tokens: list[int]) -> int:
        """Keep tokens as tentative ones, up to one that would finish the sequence; returns how many."""
        before = len(self.tentative)
        self.held += len(tokens)
        if self._ahead is None:
            self._ahead = self.text.fork() if self.params.stop else TextStream(None)
        for token in tokens:
            if self.closing:
                break
            self.tentative.append(token)
            self.closing = self._reason(token, self._ahead, len(self.tokens) + len(self.tentative)) is not None
        return len(self.tentative) - before

    def _reason(self, token: int, text: TextStream, length: int) -> str | None:
        """Why the sequence ends with this token, its `length`-th, which `text` is given; None: it does not."""
        if token in self._eos:
            return "eos"
        if text.push(token):
            return "stop"
        return "length" if length >= self.params.max_new_tokens else None
