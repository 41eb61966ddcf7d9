"""One prompt on its way: its tokens, its random numbers, its text, its counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from outrider.config import SamplingParams
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
        self.finish_reason: str | None = None  # "length", "eos", "stop", "cancelled" or "error" once finished
        self.error: str | None = None  # what went wrong, if something did
        self.cancelled = False  # to be ended before the next round
        self.text = TextStream(tokenizer, params.stop, before=prompt[-CONTINUED:])
        self.statistics = statistics
        self._eos = () if params.ignore_eos else eos
        self._generator = torch.Generator().manual_seed(params.seed)

    @property
    def pending(self) -> int:
        """The last token: emitted (or given), not yet in any cache."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def cached(self) -> int:
        """Tokens in the caches: all but the pending one."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def text_cached(self) -> list[int]:
        """The tokens in the caches."""
        return (self.prompt + self.tokens)[: self.cached]

    def uniforms(self, count: int) -> Tensor:
        """The next `count` random numbers of this sequence, [count] fp32 in [0, 1)."""
        return torch.rand(count, generator=self._generator)

    def end(self, reason: str, error: str | None = None) -> None:
        """Finish for a reason that is not in the text."""
        self.finish_reason, self.error = reason, error

    def extend(self, tokens: list[int]) -> list[int]:
        """Emit tokens until one finishes the sequence; returns those that were emitted."""
        emitted = []
        for token in tokens:
            self.tokens.append(token)
            emitted.append(token)
            if token in self._eos:
                self.finish_reason = "eos"
            elif self.text.push(token):
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.params.max_new_tokens:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                break
        return emitted
