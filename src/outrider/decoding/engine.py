"""The loop: propose, score, align and select, verify, accept, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.config import EngineConfig
from outrider.decoding.drafting import propose
from outrider.decoding.pair import make_selector
from outrider.decoding.sampling import distributions
from outrider.decoding.scheduler import Scheduler
from outrider.decoding.scoring import score
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import StageClock, count_reads
from outrider.errors import OptionError
from outrider.guidance.selectors.base import Selector
from outrider.models import KVCache, LanguageModel
from outrider.models.cache import aligned
from outrider.ops import token_verify
from outrider.types import Acceptance, Alignment, DraftTrace, Selection

ProgressCallback = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Tokens that one sequence has just emitted."""

    sequence: Sequence
    tokens: list[int]


class Engine:
    """Runs sequences through speculative rounds, several at once; finished ones make room for those that wait."""

    def __init__(self, target: LanguageModel, draft: LanguageModel, config: EngineConfig, alignment: Alignment | None) -> None:
        self.target = target.with_backend(config.backend)
        self.draft = draft.with_backend(config.backend)
        self.config = config
        self.selector: Selector | None = None
        if config.mode == "sparse":
            if alignment is None:
                raise OptionError(
                    "alignment", None, "a file made by `outrider calibrate` for this pair (mode dense needs none)"
                )
            self.selector = make_selector(self.target, self.draft, config.method, alignment, config.budget, config.draft_tokens)

    def run(self, sequences: list[Sequence], progress: ProgressCallback | None = None) -> Iterator[Event]:
        """Continue all sequences to their end; yields the tokens of every sequence after every round."""
        rounds = _Rounds(self, sequences, progress)
        while rounds.scheduler.unfinished:
            rounds.refill()
            yield from rounds.step()


class _Rounds:
    """The state of one `run`: the scheduler and the two caches."""

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
        self.clock = StageClock(self.target.spec.device)

    def refill(self) -> None:
        """Prefill the prompts that waited into the free slots, densely, all but the last token (it is the pending one)."""
        for slot, sequence in self.scheduler.admit():
            before = self.clock.seconds["prefill"]
            with self.clock.stage("prefill"):
                tokens = torch.tensor([sequence.prompt[:-1]])
                for model, cache in zip((self.target, self.draft), self.caches, strict=True):
                    row = cache.rows(slot, slot + 1)
                    row.truncate(0)
                    known = tokens.clamp(max=model.spec.vocabulary - 1)  # see propose
                    prefill(model, row, known, self.config.prefill_chunk, self.progress)
            sequence.statistics.seconds["prefill"] += self.clock.seconds["prefill"] - before

    def step(self) -> Iterator[Event]:
        """One round of all running sequences."""
        running = self.scheduler.running
        target_cache, draft_cache = (cache.rows(0, len(running)) for cache in self.caches)
        clock, started = self.clock, dict(self.clock.seconds)
        now = time.perf_counter()
        for sequence in running:
            sequence.started = sequence.started or now

        lengths = target_cache.lengths.clone()  # S of each sequence: cached in both models before the round
        uniforms = torch.stack([sequence.uniforms(2 * self.k + 1) for sequence in running])  # K to draft, K + 1 to verify
        params = [sequence.params for sequence in running]
        pending = torch.tensor([sequence.pending for sequence in running])
        with clock.stage("propose"):
            trace = propose(self.draft, draft_cache, pending, params, uniforms[:, : self.k], self.target.spec.vocabulary)
        selection = self._guide(trace, draft_cache, lengths)
        with clock.stage("verify"):
            tokens = torch.cat([pending.to(trace.tokens)[:, None], trace.tokens], dim=1)
            logits = self.target.forward(tokens, target_cache, selection=selection).logits
        with clock.stage("accept"):
            acceptance = self._accept(trace, distributions(logits, params), uniforms[:, self.k :])
            target_cache.advance(acceptance.accepted + 1)
            draft_cache.truncate(target_cache.lengths)

        spent = {stage: seconds - started[stage] for stage, seconds in clock.seconds.items()}
        self._record(selection, acceptance, lengths, spent)
        yield from self._commit(running, trace.tokens.cpu(), acceptance)

    def _guide(self, trace: DraftTrace, cache: KVCache, lengths: Tensor) -> Selection | None:
        """Score, align and select; None where the round is dense."""
        if self.selector is None or int(lengths.max()) < max(self.config.budget.min_context, 1):
            return None
        with self.clock.stage("score"):
            selector = self.selector
            scores = score(self.draft, cache, trace.queries, lengths, selector.draft_layers, per_query=selector.per_query)
        with self.clock.stage("select"):
            return self.selector.select(scores)

    def _accept(self, trace: DraftTrace, target_probs: Tensor, uniforms: Tensor) -> Acceptance:
        """Speculative sampling; the outcome is wanted on the host."""
        tokens, probs, uniforms = (x.to(target_probs.device) for x in (trace.tokens, trace.probs, uniforms))
        verified = token_verify(tokens, probs, target_probs, uniforms)
        return Acceptance(accepted=verified.accepted.cpu(), next_token=verified.next_token.cpu())

    def _record(self, selection: Selection | None, acceptance: Acceptance, lengths: Tensor, spent: dict[str, float]) -> None:
        running = self.scheduler.running
        scored = self.selector.draft_layers if self.selector is not None else ()
        reads = count_reads(selection, self.target.spec, self.draft.spec, scored, lengths, self.k + 1)
        for row, sequence in enumerate(running):
            statistics = sequence.statistics
            statistics.rounds += 1
            statistics.drafted += self.k
            accepted = int(acceptance.accepted[row])
            statistics.accepted += accepted
            for position in range(accepted):
                statistics.accepted_at[position] += 1
            statistics.listed += float(reads.listed[row])
            statistics.cached += int(lengths[row])
            statistics.bytes_read += int(reads.bytes_read[row])
            statistics.bytes_dense += int(reads.bytes_dense[row])
            for stage, seconds in spent.items():
                statistics.seconds[stage] += seconds / len(running)

    def _commit(self, running: list[Sequence], drafted: Tensor, acceptance: Acceptance) -> Iterator[Event]:
        """Emit the accepted tokens and the recovered or bonus one; finished sequences leave their slots."""
        events = []
        now = time.perf_counter()
        for row, sequence in enumerate(running):
            accepted = drafted[row, : int(acceptance.accepted[row])].tolist()
            events.append(Event(sequence=sequence, tokens=sequence.extend([*accepted, int(acceptance.next_token[row])])))
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
        model.forward(part, cache, last_only=True)
        cache.advance(part.shape[1])
        if progress is not None:
            progress(f"prefill {model.spec.name}", start + part.shape[1], total)
