"""The loop: propose, score, align and select, verify, accept, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.config import EngineConfig
from outrider.decoding.drafting import propose
from outrider.decoding.graphs import Stages
from outrider.decoding.pair import make_selector, rehearse
from outrider.decoding.rounds import InputBuffer, Outcome, RoundKind, accept, verify
from outrider.decoding.scheduler import Scheduler
from outrider.decoding.scoring import score
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import StageClock, count_reads
from outrider.errors import OptionError
from outrider.guidance.selectors.base import Selector
from outrider.models import KVCache, LanguageModel
from outrider.models.attention import ROUND
from outrider.models.cache import aligned
from outrider.types import Alignment, DraftScores, DraftTrace

ProgressCallback = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Tokens that one sequence has just emitted."""

    sequence: Sequence
    tokens: list[int]


class Engine:
    """Runs sequences through speculative rounds, several at once; finished ones make room for those that wait."""

    def __init__(self, target: LanguageModel, draft: LanguageModel, config: EngineConfig, alignment: Alignment | None) -> None:
        self.config = config
        self.target, self.draft = (model.with_backend(config.backend) for model in (target, draft))
        self.selector: Selector | None = None
        if config.mode == "sparse":
            if alignment is None:
                raise OptionError(
                    "alignment", None, "a file made by `outrider calibrate` for this pair (mode dense needs none)"
                )
            self.selector = make_selector(self.target, self.draft, config.method, alignment, config.budget, config.draft_tokens)
        else:
            rehearse(self.target, self.draft, None, config.draft_tokens + 1)
        # rounds become CUDA graphs where every op has a kernel and none waits for the device
        waits = (
            config.backend == "reference" or config.draft_tokens >= ROUND or (self.selector is not None and self.selector.waits)
        )
        self.captures = target.spec.device.type == "cuda" and not config.eager and not waits
        if self.captures:
            self.target, self.draft = self.target.compile(), self.draft.compile()

    def run(self, sequences: list[Sequence], progress: ProgressCallback | None = None) -> Iterator[Event]:
        """Continue all sequences to their end; yields the tokens of every sequence after every round."""
        rounds = _Rounds(self, sequences, progress)
        rounds.warm_up()
        while rounds.scheduler.unfinished:
            rounds.refill()
            yield from rounds.step()


class _Rounds:
    """The state of one `run`: the scheduler, the two caches, and what a round needs on the device."""

    def __init__(self, engine: Engine, sequences: list[Sequence], progress: ProgressCallback | None) -> None:
        config = engine.config
        self.target, self.draft, self.selector = engine.target, engine.draft, engine.selector
        self.config = config
        self.k = config.draft_tokens
        self.progress = progress or (lambda what, done, of: None)
        self.scheduler = Scheduler(sequences, min(config.batch_size, len(sequences)))
        longest = max((len(s.prompt) + s.params.max_new_tokens for s in sequences), default=0)
        capacity = aligned(longest + self.k + 1)  # the last round may run past what is wanted
        self.caches = tuple(model.new_cache(self.scheduler.slots, capacity) for model in (self.target, self.draft))
        self.device = self.target.spec.device
        self.inputs = InputBuffer(self.scheduler.slots, self.k, self.device)
        self.stages = Stages(capture=engine.captures)
        self.clock = StageClock(self.device)

    def refill(self) -> None:
        """Prefill the prompts that waited into the free slots, densely, all but the last token (it is the pending one)."""
        for slot, sequence in self.scheduler.admit():
            before = self.clock.settle()["prefill"]
            with self.clock.stage("prefill"):
                tokens = torch.tensor([sequence.prompt[:-1]])
                for model, cache in zip((self.target, self.draft), self.caches, strict=True):
                    row = cache.rows(slot, slot + 1)
                    row.truncate(0)
                    known = tokens.clamp(max=model.spec.vocabulary - 1)  # see propose
                    prefill(model, row, known, self.config.prefill_chunk, self.progress)
            sequence.statistics.seconds["prefill"] += self.clock.settle()["prefill"] - before

    def warm_up(self) -> None:
        """Two rounds over nothing, of the kind that the first sequences will have: builds, compiles and captures."""
        first = list(self.scheduler.waiting)[: self.scheduler.slots]
        if not (self.stages.capture and first):
            return
        for done in range(2):
            self.progress("compile rounds", done, 2)
            for cache in self.caches:
                cache.lengths.fill_(1)
            self._run_stages(*self._kind(first))
        self.progress("compile rounds", 2, 2)
        self.clock = StageClock(self.device)

    def step(self) -> Iterator[Event]:
        """One round of all running sequences."""
        running = self.scheduler.running
        now, before = time.perf_counter(), self.clock.settle()
        for sequence in running:
            sequence.started = sequence.started or now
        lengths = [sequence.cached for sequence in running]  # S of each sequence: cached in both models before the round
        self.inputs.load(running)
        outcome = self._run_stages(*self._kind(running)).cpu()
        after = self.clock.settle()
        self._record(outcome, lengths, {stage: after[stage] - before[stage] for stage in after})
        yield from self._commit(running, outcome)

    def _kind(self, sequences: list[Sequence]) -> tuple[RoundKind, Selector | None]:
        """The kind of the sequences' next round, and who selects in it."""
        sparse = max(sequence.cached for sequence in sequences) >= max(self.config.budget.min_context, 1)
        selector = self.selector if sparse else None
        return RoundKind.of(sequences, guided=selector is not None), selector

    def _run_stages(self, kind: RoundKind, selector: Selector | None) -> Outcome:
        """Propose, score, select, verify and accept over the first `kind.rows` rows, without waiting for the device."""
        target_cache, draft_cache = (cache.rows(0, kind.rows) for cache in self.caches)
        run, clock = self.stages.run, self.clock
        self.stages.begin(kind)

        def proposed() -> DraftTrace:
            drafting = inputs.pending, inputs.sampling, inputs.draft_uniforms
            return propose(self.draft, draft_cache, *drafting, self.target.spec.vocabulary)

        def scored(selector: Selector) -> DraftScores:
            layers, per_query = selector.draft_layers, selector.per_query
            return score(self.draft, draft_cache, trace.queries, target_cache.lengths, layers, per_query=per_query)

        selection = None
        with clock.stage("propose"):
            inputs = run("inputs", lambda: self.inputs.unpack(kind))
            trace = run("propose", proposed)
        if selector is not None:
            with clock.stage("score"):
                scores = run("score", lambda: scored(selector))
            with clock.stage("select"):
                selection = run("select", lambda: selector.select(scores))
        with clock.stage("verify"):
            logits = run("verify", lambda: verify(self.target, target_cache, inputs.pending, trace.tokens, selection))
        with clock.stage("accept"):
            return run("accept", lambda: accept(trace, logits, inputs, selection, self.target.spec, target_cache, draft_cache))

    def _record(self, outcome: Outcome, lengths: list[int], spent: dict[str, float]) -> None:
        running = self.scheduler.running
        scored = self.selector.draft_layers if self.selector is not None else ()
        reads = count_reads(outcome.listed, self.target.spec, self.draft.spec, scored, torch.tensor(lengths), self.k + 1)
        for row, sequence in enumerate(running):
            statistics = sequence.statistics
            statistics.rounds += 1
            statistics.drafted += self.k
            accepted = int(outcome.accepted[row])
            statistics.accepted += accepted
            for position in range(accepted):
                statistics.accepted_at[position] += 1
            statistics.listed += float(reads.listed[row])
            statistics.cached += lengths[row]
            statistics.bytes_read += int(reads.bytes_read[row])
            statistics.bytes_dense += int(reads.bytes_dense[row])
            for stage, seconds in spent.items():
                statistics.seconds[stage] += seconds / len(running)

    def _commit(self, running: list[Sequence], outcome: Outcome) -> Iterator[Event]:
        """Emit the accepted tokens and the recovered or bonus one; finished sequences leave their slots."""
        events = []
        now = time.perf_counter()
        for row, sequence in enumerate(running):
            accepted = outcome.drafted[row, : int(outcome.accepted[row])].tolist()
            events.append(Event(sequence=sequence, tokens=sequence.extend([*accepted, int(outcome.next_token[row])])))
            sequence.statistics.generated_tokens = len(sequence.tokens)
            sequence.statistics.decode_seconds = now - (sequence.started or now)
            if sequence.finish_reason is not None and self.config.audit:
                self._audit(sequence, self.caches[0].rows(row, row + 1))
        for source, slot in self.scheduler.release():
            for cache in self.caches:
                cache.move(source, slot)
        yield from events

    def _audit(self, sequence: Sequence, cache: KVCache) -> None:
        """Count the generated tokens that the dense target, given the same text, holds for the most probable."""
        prompt = len(sequence.prompt) - 1
        cache.truncate(prompt)
        tokens = torch.tensor([[sequence.prompt[-1], *sequence.tokens[:-1]]])
        choices = []
        for chunk in tokens.split(self.config.prefill_chunk, dim=1):
            choices.append(self.target.forward(chunk, cache).logits.argmax(-1).cpu())
            cache.advance(chunk.shape[1])
        sequence.statistics.audited = len(sequence.tokens)
        sequence.statistics.agreed = int((torch.cat(choices, dim=1)[0] == torch.tensor(sequence.tokens)).sum())


def prefill(model: LanguageModel, cache: KVCache, tokens: Tensor, chunk: int, progress: ProgressCallback | None = None) -> None:
    """Run `tokens` [B, S] densely through `model` into `cache`, `chunk` tokens at a time."""
    total = tokens.shape[1]
    for start in range(0, total, chunk):
        part = tokens[:, start : start + chunk]
        model.forward(part, cache, logits=False)
        cache.advance(part.shape[1])
        if progress is not None:
            progress(f"prefill {model.spec.name}", start + part.shape[1], total)
