"""The loop: refill, choose, launch (propose, score, align and select, verify, accept), commit; confirm what is tentative."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outrider.decoding.audits import count_agreed
from outrider.decoding.choice import PLAIN, Choice, fixed_choice
from outrider.decoding.chooser import Chooser, Fixed, Gain
from outrider.decoding.flight import Flight
from outrider.decoding.guard import Audit, Guards
from outrider.decoding.pace import Confirmations
from outrider.decoding.prefill import Prefill, ProgressCallback
from outrider.decoding.records import Records
from outrider.decoding.rehearsal import warm_up
from outrider.decoding.rounds import RoundKind, RowOutcome
from outrider.decoding.runner import Runner
from outrider.decoding.scheduler import Scheduler
from outrider.decoding.sequence import Sequence
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
        self.chooser: Chooser = Fixed(PLAIN, None)  # nobody is asked before costs are known
        self.filling: Prefill | None = None
        # where ranks share the target, one that lacks memory cannot go on without the others
        self.recoverable = (torch.OutOfMemoryError,) if engine.target.ranks.size == 1 else ()
        self.records = Records(engine.target.spec.whole, engine.draft.spec.whole, engine.guidance)

    def events(self) -> Iterator[Event]:
        """Rounds until all sequences have ended. On a GPU the next round begins before the last one's tokens are read."""
        self.runner.clear(slice(None))
        if self.scheduler.waiting:
            self._begin()
        flight: Flight | None = None
        while self.scheduler.unfinished or flight is not None:
            try:
                yield from self._drop_cancelled()
                if not self.scheduler.running:
                    yield from self._refill()
                landed, flight = flight, self._launch_behind(flight) if flight is not None else self._launch()
                if flight is not None:
                    yield from self._refill()
                if landed is not None:
                    yield from self._commit_confirmation(landed) if landed.confirms else self._commit(landed)
            except self.recoverable as error:
                flight = None
                self.runner.forget()
                yield from self._fail(self.scheduler.running, error)
            except torch.AcceleratorError as error:
                self.engine.broken, flight = _first_line(error), None
                scheduler = self.scheduler
                yield from self._fail([*scheduler.running, *filter(None, [scheduler.filling]), *scheduler.waiting], error)
                return

    def _begin(self) -> None:
        """Build and capture what the first rounds need, and measure what rounds cost where somebody asks."""
        waiting = list(self.scheduler.waiting)
        first = waiting[: self.scheduler.slots]
        if self.config.mode != "auto":
            kind = self._kind(fixed_choice(self.config), first, self._is_sparse(first, 0))
            warm_up(self.runner, kind, self.progress)
        longest = max(len(sequence.prompt) + sequence.params.max_new_tokens for sequence in waiting)
        costs = self.engine.costs(
            self.runner, lambda choice, rows, listed: self._kind(choice, first[:1] * rows, listed), longest, self.progress
        )
        self.chooser = self.engine.chooser(self.confirmations, costs, self.scheduler.slots)

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
                if sparse is None and not self.chooser.wants_draft(sequence, self.scheduler.together):
                    rows = rows[:1]  # the draft is spared this prompt
                self.filling = Prefill(sequence, rows, self.config.prefill_chunk, self.engine.read, self.progress, sparse)
            filling = self.filling
            try:
                if not filling.finished:
                    room -= filling.step()
            except self.recoverable as error:
                filling.empty()
                self.filling = None
                self.scheduler.drop(filling.sequence)
                yield from self._end(filling.sequence, "error", f"no memory for its prompt: {_first_line(error)}")
                continue
            if filling.finished:
                filling.settle()
                source, slot = self.scheduler.join()
                self.runner.move(source, slot)
                self.runner.begin(slot, filling.sequence, drafted=filling.drafted)
                self.filling = None
            if others_wait and room <= 0:
                return

    def _launch(self) -> Flight | None:
        """Start what is next while nothing is under way: a confirmation, once a row has enough tentative tokens or might end,
        else a round; None where nobody runs."""
        running, now = self.scheduler.running, time.perf_counter()
        if not running:
            return None
        for sequence in running:
            sequence.statistics.began = sequence.statistics.began or now
        listed = self._is_sparse(running, 0)
        if any(sequence.tentative for sequence in running):
            choice = self.chooser.current
            if self.confirmations.are_due(running) or self.chooser.settles(running):
                return self.runner.confirm(running, self._kind(choice, running, listed), 0)
        else:
            choice = self.chooser.choose(running, listed=listed)
        return self.runner.launch(running, self._kind(choice, running, listed), self.guards.due(running, 0))

    def _launch_behind(self, flight: Flight) -> Flight | None:
        """Start what follows the round or confirmation under way; None where it depends on what that will bring."""
        running, choice = self.scheduler.running, self.chooser.current
        if not self.runner.launches_ahead or running != flight.sequences:
            return None
        most = 1 + (self.runner.tentative.tail if flight.confirms else choice.k)  # tokens that a sequence may get by then
        grown = 0 if flight.confirms else 1  # at least; who holds tokens is long enough without them
        sparse = self._is_sparse(running, grown)
        known = (
            self.runner.rivals is None  # these look at the text, so they need its tokens
            and sparse == self._is_sparse(running, most)
            and all(len(s.tokens) + len(s.tentative) + most < s.params.max_new_tokens and not s.closing for s in running)
            and self.chooser.stays(running)
            and flight.audits is None  # which may change what its rows read
        )
        holds = choice.mode == "exact" and not flight.confirms
        due = self.confirmations.are_due_behind(running, most) if holds else False
        if not known or due is None:
            return None
        kind = self._kind(choice, running, sparse)
        return (
            self.runner.confirm(running, kind, most)
            if due
            else self.runner.launch(running, kind, self.guards.due(running, grown))
        )

    def _is_sparse(self, sequences: list[Sequence], more: int) -> bool:
        """Whether a round reads lists once each sequence has so many more tokens."""
        return max(sequence.cached for sequence in sequences) + more >= max(self.config.budget.min_context, 1)

    def _kind(self, choice: Choice, sequences: list[Sequence], listed: bool) -> RoundKind:
        guidance, dense = self.engine.guidance, choice.mode == "dense"
        sparse = listed and choice.k > 0 and guidance is not None and not (dense and guidance.draft is None)
        holds = sparse and choice.mode == "exact"
        return RoundKind.of(sequences, self.runner.slots, k=choice.k, sparse=sparse, dense_target=dense, holds=holds)

    def _commit(self, flight: Flight) -> Iterator[Event]:
        """Emit the accepted tokens and the recovered or bonus one, or hold them; finished sequences leave their slots."""
        (outcomes, audits), seconds, now = flight.land(), flight.clock.settle(), time.perf_counter()
        selection = flight.selection
        layers = selection.layers if selection is not None else ()
        events = []
        gains: list[Gain] = []
        for row, (sequence, outcome) in enumerate(zip(flight.sequences, outcomes, strict=True)):
            if sequence.finish_reason is not None:  # it ended while this round was under way
                continue
            if sequence.closing:  # or may end
                sequence.hold(outcome.tokens)
                continue
            if not outcome.finite:
                sequence.end("error", "the target's logits are not finite numbers")
                events.append(Event(sequence=sequence, tokens=[]))
                continue
            spent = {name: x / len(outcomes) for name, x in seconds.items()}
            self.records.round(sequence, outcome, self.chooser.current, layers, flight.touched[row], spent)
            if self.watch is not None:
                self.watch(sequence, outcome, selection.rows(row, row + 1) if selection is not None else None)
            if self.chooser.current.mode == "exact" and self.confirmations.holds(sequence):
                held = sequence.hold(outcome.tokens)
                sequence.statistics.tentative += held
                self.confirmations.pace(sequence).brought(held)
                gains.append(Gain(sequence, len(outcome.tokens) - 1, 0))
            else:
                cached = sequence.cached
                events.append(self._emit(sequence, outcome.tokens, now))
                gains.append(Gain(sequence, len(outcome.tokens) - 1, len(events[-1].tokens)))
                if (audit := audits[row]) is not None:
                    self._heed(row, sequence, audit, cached)
        self.chooser.brought(flight.rows, gains, None if flight.fresh else sum(seconds.values()))
        self._release()
        yield from events

    def _heed(self, row: int, sequence: Sequence, audit: Audit, cached: int) -> None:
        """Record an audit of a round behind `cached` tokens, and do what the sequence's guard makes of it."""
        self.records.audit(sequence, audit, cached)
        if self.guards.heed(sequence, audit) and sequence.finish_reason is None:
            self.records.reread(sequence, self.runner.reread(row, sequence, self.engine.read))

    def _commit_confirmation(self, flight: Flight) -> Iterator[Event]:
        """Emit what the dense target has made of the tentative tokens; finished sequences leave their slots."""
        (outcomes, _), seconds, now = flight.land(), flight.clock.settle(), time.perf_counter()
        tail = self.runner.tentative.tail
        tokens = 1 + max(len(sequence.tentative) for sequence in flight.sequences) + tail
        events, gains = [], []
        for sequence, outcome in zip(flight.sequences, outcomes, strict=True):
            if sequence.finish_reason is not None:
                continue
            if not outcome.finite:
                sequence.end("error", "the dense target's logits are not finite numbers")
                events.append(Event(sequence=sequence, tokens=[]))
                continue
            spent = {name: x / len(outcomes) for name, x in seconds.items()}
            self.confirmations.pace(sequence).confirmed(len(outcome.tokens) - 1, len(sequence.tentative))
            self.records.confirmation(sequence, outcome, tail, spent)
            events.append(self._emit(sequence, outcome.tokens, now))
            gains.append(Gain(sequence, len(outcome.tokens) - 1, len(events[-1].tokens)))
        self.chooser.confirmed(flight.rows, tokens, gains, None if flight.fresh else sum(seconds.values()))
        self._release()
        yield from events

    def _emit(self, sequence: Sequence, tokens: list[int], now: float) -> Event:
        event = Event(sequence=sequence, tokens=sequence.extend(tokens))
        sequence.statistics.generated_tokens = len(sequence.tokens)
        sequence.statistics.decode_seconds = now - (sequence.statistics.began or now)
        if sequence.finish_reason is not None and self.config.audit:
            _, cache = self.runner.rows_of(self.scheduler.running.index(sequence))[0]
            count_agreed(self.engine.target, cache, sequence, self.config.prefill_chunk)
        return event

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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
