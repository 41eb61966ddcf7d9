"""Prefill: a prompt into the caches, chunk by chunk, so that running sequences need not wait for all of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from outrider.decoding.sequence import Sequence
from outrider.decoding.sparse_prefill import Kept, SparsePrefill
from outrider.decoding.statistics import StageClock
from outrider.models import KVCache, LanguageModel

ProgressCallback = Callable[[str, int, int], None]  # (what, done, of how many)
LATE = 64  # tokens that a model which catches up reads at least
ReadChunk = Callable[[LanguageModel, KVCache, Tensor, int], None]


def read_chunk(model: LanguageModel, cache: KVCache, tokens: Tensor, stop: int) -> None:
    """Run `tokens` [B, T] densely through `model` into `cache`, which holds `stop` tokens a row afterwards."""
    model.forward(tokens, cache, stop=stop, logits=False)
    cache.advance(tokens.shape[1])


def read_on(model: LanguageModel, cache: KVCache, tokens: Tensor, start: int, chunk: int, read: ReadChunk = read_chunk) -> None:
    """Run `tokens` [B, S] through `model` behind the `start` ones that every row of `cache` holds, `chunk` at a time."""
    for part in tokens.split(chunk, dim=1):
        start += part.shape[1]
        read(model, cache, part, start)


def late_widths(chunk: int) -> list[int]:
    """How many tokens at a time a model reads that catches up: few numbers, since what runs for the first time in a width takes
    twice as long, and some dozen tokens as long as one."""
    widths = [LATE << at for at in range(chunk.bit_length()) if LATE << at < chunk]
    return [*widths, chunk]


def read_late(model: LanguageModel, cache: KVCache, missing: list[list[int]], chunk: int, *, fills_up: bool) -> None:
    """Run what each row of `cache` lacks through `model`, of all rows at once where none lacks more than a `chunk`.

    Where this `fills_up`, it is in these widths: what is behind a row's last token is written over.
    """
    starts, counts = cache.lengths.tolist(), [len(row) for row in missing]
    width = max(counts)
    if not width:
        return
    if fills_up and width <= chunk:
        width = next(one for one in late_widths(chunk) if width <= one)
    if width <= chunk and max(starts) + width <= cache.capacity:
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in missing], dtype=torch.int64)
        tokens = tokens.clamp(max=model.spec.vocabulary - 1)
        model.forward(tokens, cache, stop=max(starts) + width, logits=False)
        cache.advance(torch.tensor(counts))
        return
    for row in (row for row, count in enumerate(counts) if count):
        tokens = torch.tensor([missing[row]], dtype=torch.int64).clamp(max=model.spec.vocabulary - 1)
        read_on(model, cache.rows(row, row + 1), tokens, starts[row], chunk)


def prefill(model: LanguageModel, cache: KVCache, tokens: Tensor, chunk: int, progress: ProgressCallback | None = None) -> None:
    """Run `tokens` [B, S] densely through `model` into an empty `cache`, `chunk` tokens at a time."""
    total = tokens.shape[1]
    for start in range(0, total, chunk):
        part = tokens[:, start : start + chunk]
        read_chunk(model, cache, part, start + part.shape[1])
        if progress is not None:
            progress(f"prefill {model.spec.name}", start + part.shape[1], total)


class Prefill:
    """One prompt on its way into the rows of its slot: all but the last token, which is the pending one."""

    def __init__(
        self,
        sequence: Sequence,
        rows: list[tuple[LanguageModel, KVCache]],
        chunk: int,
        read: ReadChunk,
        progress: ProgressCallback,
        sparse: SparsePrefill | None = None,
    ) -> None:
        """With `sparse` the target's blocks read lists; else `read` puts each chunk into every model's cache."""
        self.sequence = sequence
        self.done = 0  # tokens in the caches
        self.total = len(sequence.prompt) - 1
        self._tokens = torch.tensor([sequence.prompt[:-1]], dtype=torch.int64)
        self._rows, self._chunk, self._read, self._progress, self._sparse = rows, chunk, read, progress, sparse
        self._kept = Kept()
        self._clock = StageClock(rows[0][0].spec.device)
        self.empty()

    @property
    def finished(self) -> bool:
        return self.done == self.total

    @property
    def drafted(self) -> bool:
        """The draft reads the prompt, too."""
        return len(self._rows) > 1

    def empty(self) -> None:
        """Nothing is in the rows: rounds that take them along read nothing there."""
        for _, cache in self._rows:
            cache.truncate(0)

    def step(self) -> int:
        """The next chunk, through every model; returns its tokens."""
        stop = min(self.done + self._chunk, self.total)
        with self._clock.stage("prefill"):
            if self._sparse is not None and stop > self._sparse.min_context:
                self._read_sparsely(self._sparse, stop)
            else:
                for model, cache in self._rows:
                    # a draft narrower than the target's vocabulary does not have all its tokens: see propose
                    part = self._tokens[:, self.done : stop].clamp(max=model.spec.vocabulary - 1)
                    self._read(model, cache, part, stop)
        read, self.done = stop - self.done, stop
        self._progress("prefill", stop, self.total)
        return read

    def _read_sparsely(self, sparse: SparsePrefill, stop: int) -> None:
        _, lists = sparse.read(self._rows, self._tokens[:, self.done : stop], stop)
        self._kept.add(lists, self.done, stop)

    def settle(self) -> None:
        """Write what it took, and what its blocks read, into the sequence's statistics; waits for the device."""
        statistics = self.sequence.statistics
        statistics.seconds["prefill"] += self._clock.settle()["prefill"]
        if self._sparse is not None:  # each rank has seen its own heads' lists
            target = self._rows[0][0]
            listed = torch.as_tensor(self._kept.listed, dtype=torch.float64, device=target.spec.device)
            statistics.prefill_listed, statistics.prefill_before = float(target.ranks.mean(listed)), self._kept.before
