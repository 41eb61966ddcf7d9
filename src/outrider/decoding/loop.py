"""The loop: refill, launch (propose, score, align and select, verify, accept), commit; confirm what is tentative."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outrider.decoding.guard import WINDOW, Audit, Guards
from outrider.decoding.pace import Confirmations
from outrider.decoding.prefill import Prefill, ProgressCallback
from outrider.decoding.rounds import RoundKind, RowOutcome
from outrider.decoding.runner import Flight, Runner
from outrider.decoding.scheduler import Scheduler
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import ReadCounter
from outrider.types import Selection

if TYPE_CHECKING:
    from outrider.decoding.engine import Engine


# told of every round of every sequence before its tokens are emitted: its lists [L, 1, Hs, M] are over `sequence.cached` tokens
# (the cache, whose lengths they may share, has gone on by then), None in a dense round
Watch = Callable[[Sequence, RowOutcome, Selection | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Tokens that one sequence has just emitted; none where it failed or was cancelled."""

    sequence: Sequence
    tokens: list[int]


class Loop:
    """The host's side of one run: who runs, who waits, and what a round means for each."""

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        sequences: list[Sequence],
        progress: ProgressCallback,
        watch: Watch | None = None,
    ) -> None:
        self.engine, self.runner, self.config = engine, runner, engine.config
        self.progress, self.watch = progress, watch
        self.scheduler = Scheduler(sequences, runner.slots)
        self.confirmations = Confirmations(sequences, engine.config)
        self.guards = Guards(sequences, engine.config)
        self.filling: Prefill | None = None
        layers, bits = (engine.guidance.layers, engine.guidance.bits) if engine.guidance is not None else ((), None)
        self.reads = ReadCounter(engine.target.spec, engine.draft.spec, layers, runner.k + 1, bits)

    def events(self) -> Iterator[Event]:
        """Rounds until all sequences have ended. On a GPU the next round begins before the last one's tokens are read."""
        self.runner.clear(slice(None))
        if first := list(self.scheduler.waiting)[: self.scheduler.slots]:
            self.runner.warm_up(self._kind(first, self._is_sparse(first, 0)), self.progress)
        flight: Flight | None = None
        while self.scheduler.unfinished or flight is not None:
            try:
                yield from self._drop_cancelled()
                if not self.scheduler.running:
                    yield from self._refill()
                landed, flight = flight, self._launch(flight)
                if flight is not None:
                    yield from self._refill()
                if landed is not None:
                    yield from self._commit(landed)
                if flight is None:
                    yield from self._confirm()
            except torch.OutOfMemoryError as error:
                flight = None
                self.runner.forget()
                yield from self._fail(self.scheduler.running, error)
            except torch.AcceleratorError as error:
                self.engine.broken, flight = _first_line(error), None
                scheduler = self.scheduler
                yield from self._fail([*scheduler.running, *filter(None, [scheduler.filling]), *scheduler.waiting], error)
                return

    def _refill(self) -> Iterator[Event]:
        """Read waiting prompts into free slots: all at once where nobody runs, else a chunk behind the round just launched.

        A chunk is a number of tokens: short prompts share one.
        """
        others_wait, room = bool(self.scheduler.running), self.config.prefill_chunk
        while True:
            if self.filling is None:
                admitted = self.scheduler.admit()
                if admitted is None:
                    return
                slot, sequence = admitted
                rows = self.runner.rows_of(slot)
                sparse = self.engine.prefill_for(sequence.params)
                self.filling = Prefill(sequence, rows, self.config.prefill_chunk, self.engine.read, self.progress, sparse)
            filling = self.filling
            try:
                if not filling.finished:
                    room -= filling.step()
            except torch.OutOfMemoryError as error:
                filling.empty()
                self.filling = None
                self.scheduler.drop(filling.sequence)
                yield from self._end(filling.sequence, "error", f"no memory for its prompt: {_first_line(error)}")
                continue
            if filling.finished:
                filling.settle()
                source, slot = self.scheduler.join()
                self.runner.move(source, slot)
                self.runner.begin(slot, filling.sequence.pending)
                self.filling = None
            if others_wait and room <= 0:
                return

    def _launch(self, ahead_of: Flight | None) -> Flight | None:
        """Start the next round; None where it depends on what the round under way, if there is one, will bring."""
        running = self.scheduler.running
        if not running:
            return None
        now = time.perf_counter()
        for sequence in running:
            sequence.statistics.began = sequence.statistics.began or now
        if ahead_of is None:
            return self.runner.launch(running, self._kind(running, self._is_sparse(running, 0)), self.guards.due(running, 0))
        most = self.runner.k + 1  # tokens that the round under way may emit
        sparse = self._is_sparse(running, 1)
        known = (
            self.runner.device.type == "cuda"
            and self.runner.rivals is None  # these look at the text, so they need its tokens
            and running == ahead_of.sequences
            and sparse == self._is_sparse(running, most)
            and all(len(s.tokens) + len(s.tentative) + most < s.params.max_new_tokens for s in running)
            and not self.confirmations.may_be_due(running, most)
            and ahead_of.audits is None  # which may change what its rows read
        )
        return self.runner.launch(running, self._kind(running, sparse), self.guards.due(running, 1)) if known else None

    def _is_sparse(self, sequences: list[Sequence], more: int) -> bool:
        """Whether a round reads lists once each sequence has so many more tokens."""
        return max(sequence.cached for sequence in sequences) + more >= max(self.config.budget.min_context, 1)

    def _kind(self, sequences: list[Sequence], sparse: bool) -> RoundKind:
        return RoundKind.of(sequences, self.runner.slots, sparse=sparse and self.engine.guidance is not None)

    def _commit(self, flight: Flight) -> Iterator[Event]:
        """Emit the accepted tokens and the recovered or bonus one, or hold them; finished sequences leave their slots."""
        (outcomes, audits), seconds, now = flight.land(), flight.clock.settle(), time.perf_counter()
        selection = flight.selection
        layers = selection.layers if selection is not None else ()
        events = []
        for row, (sequence, outcome) in enumerate(zip(flight.sequences, outcomes, strict=True)):
            if sequence.finish_reason is not None or sequence.closing:  # it ended, or may end, while this round was under way
                continue
            if not outcome.finite:
                sequence.end("error", "the target's logits are not finite numbers")
                events.append(Event(sequence=sequence, tokens=[]))
                continue
            spent = {name: x / len(outcomes) for name, x in seconds.items()}
            self._record(sequence, outcome, layers, flight.touched[row], spent)
            if self.watch is not None:
                self.watch(sequence, outcome, selection.rows(row, row + 1) if selection is not None else None)
            if self.confirmations.holds(sequence):
                held = sequence.hold(outcome.tokens)
                sequence.statistics.tentative += held
                self.confirmations.pace(sequence).brought(held)
            else:
                cached = sequence.cached
                events.append(self._emit(sequence, outcome.tokens, now))
                if (audit := audits[row]) is not None:
                    self._heed(row, sequence, audit, cached)
        self._release()
        yield from events

    def _heed(self, row: int, sequence: Sequence, audit: Audit, cached: int) -> None:
        """Record an audit of a round behind `cached` tokens, and do what the sequence's guard makes of it."""
        statistics = sequence.statistics
        statistics.bytes_read += self.reads.audit(cached, 1 / WINDOW)
        if self.guards.heed(sequence, audit) and sequence.finish_reason is None:
            seconds = self.runner.reread(row, sequence, self.config.prefill_chunk, self.engine.read)
            statistics.bytes_read += self.reads.dense(len(sequence.prompt) - 1, len(sequence.tokens))
            for stage, spent in seconds.items():
                statistics.seconds[stage] += spent

    def _confirm(self) -> Iterator[Event]:
        """Emit what a dense forward makes of the tentative tokens, once a row has enough of them or might end."""
        running = list(self.scheduler.running)
        if not self.confirmations.are_due(running):
            return
        kind = self._kind(running, self._is_sparse(running, 0))
        landed, now = self.runner.confirm(running, kind), time.perf_counter()
        events = []
        for sequence, outcome in zip(running, landed.outcomes, strict=True):
            if not outcome.finite:
                sequence.end("error", "the dense target's logits are not finite numbers")
                events.append(Event(sequence=sequence, tokens=[]))
                continue
            spent = {name: x / len(running) for name, x in landed.seconds.items()}
            self._record_confirmation(sequence, outcome, spent)
            events.append(self._emit(sequence, outcome.tokens, now))
        self._release()
        yield from events

    def _emit(self, sequence: Sequence, tokens: list[int], now: float) -> Event:
        event = Event(sequence=sequence, tokens=sequence.extend(tokens))
        sequence.statistics.generated_tokens = len(sequence.tokens)
        sequence.statistics.decode_seconds = now - (sequence.statistics.began or now)
        if sequence.finish_reason is not None and self.config.audit:
            self._audit(sequence)
        return event

    def _record_confirmation(self, sequence: Sequence, outcome: RowOutcome, spent: dict[str, float]) -> None:
        statistics, held, passed = sequence.statistics, len(sequence.tentative), len(outcome.tokens) - 1
        self.confirmations.pace(sequence).confirmed(passed, held)
        statistics.confirmations += 1
        statistics.confirmed += passed
        statistics.rolled_back += held - passed
        statistics.bytes_read += self.reads.dense(sequence.cached - held, held + 1)
        for stage, seconds in spent.items():
            statistics.seconds[stage] += seconds

    def _record(
        self, sequence: Sequence, outcome: RowOutcome, layers: tuple[int, ...], touched: float, spent: dict[str, float]
    ) -> None:
        statistics, length = sequence.statistics, sequence.cached
        reads = self.reads.of(length, layers, outcome.listed_tokens, outcome.listed_rows)
        accepted = len(outcome.tokens) - 1
        statistics.rounds += 1
        statistics.drafted += self.runner.k
        statistics.accepted += accepted
        for position in range(accepted):
            statistics.accepted_at[position] += 1
        statistics.listed += reads.listed
        statistics.cached += length
        statistics.bytes_read += reads.bytes_read + round(touched)
        statistics.bytes_dense += reads.bytes_dense
        for stage, seconds in spent.items():
            statistics.seconds[stage] += seconds

    def _release(self) -> None:
        """Finished sequences leave; those that go on stay in the first slots."""
        before = len(self.scheduler.running)
        for source, slot in self.scheduler.release():
            self.runner.move(source, slot)
        for slot in range(len(self.scheduler.running), before):
            self.runner.clear(slot)

    def _end(self, sequence: Sequence, reason: str, error: str | None = None) -> Iterator[Event]:
        sequence.end(reason, error)
        yield Event(sequence=sequence, tokens=[])

    def _fail(self, sequences: list[Sequence], error: Exception) -> Iterator[Event]:
        """End the sequences of a round that raised."""
        for sequence in [sequence for sequence in sequences if sequence.finish_reason is None]:
            yield from self._end(sequence, "error", _first_line(error))
        if self.engine.broken is None:
            self._release()

    def _drop_cancelled(self) -> Iterator[Event]:
        scheduler = self.scheduler
        for sequence in [s for s in (*scheduler.waiting, scheduler.filling) if s is not None and s.cancelled]:
            if self.filling is not None and sequence is scheduler.filling:
                self.filling.empty()
                self.filling = None
            scheduler.drop(sequence)
            yield from self._end(sequence, "cancelled")
        for sequence in [s for s in scheduler.running if s.cancelled]:
            yield from self._end(sequence, "cancelled")
        self._release()

    def _audit(self, sequence: Sequence) -> None:
        """Count the generated tokens that the dense target, given the same text, holds for the most probable."""
        _, cache = self.runner.rows_of(self.scheduler.running.index(sequence))[0]
        prompt = len(sequence.prompt) - 1
        cache.truncate(prompt)
        tokens = torch.tensor([[sequence.prompt[-1], *sequence.tokens[:-1]]])
        choices = []
        for chunk in tokens.split(self.config.prefill_chunk, dim=1):
            choices.append(self.engine.target.forward(chunk, cache).logits.argmax(-1).cpu())
            cache.advance(chunk.shape[1])
        sequence.statistics.audited = len(sequence.tokens)
        sequence.statistics.agreed = int((torch.cat(choices, dim=1)[0] == torch.tensor(sequence.tokens)).sum())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
