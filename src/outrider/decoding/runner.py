"""The device's side of a run: caches, lists and inputs by slot, and the stages of a round over them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from outrider.decoding.audits import Audits
from outrider.decoding.confirmation import ConfirmationKind, TentativeTokens, confirm, tail
from outrider.decoding.drafting import DraftLists, propose
from outrider.decoding.flight import Flight, Landings
from outrider.decoding.graphs import Stages
from outrider.decoding.guidance import Guidance
from outrider.decoding.guides import ByRow
from outrider.decoding.prefill import ReadChunk, read_late, read_on
from outrider.decoding.rounds import InputBuffer, Inputs, Judge, Outcome, RoundKind, accept, propose_nothing, verify
from outrider.decoding.scoring import score
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import StageClock
from outrider.models import KVCache, LanguageModel
from outrider.models.quantized_keys import QuantizedKeys
from outrider.types import DraftScores, DraftTrace, Lists, Selection, Shares


class Runner:
    """Runs rounds of up to `slots` sequences of up to `capacity` tokens. Knows rows, not what becomes of their tokens.

    Everything lies where it is from round to round, and from run to run, so that captured stages stay valid.
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: LanguageModel | None,  # None: the target decodes alone
        guidance: Guidance | None,
        drafting: DraftLists | None,
        quantized: QuantizedKeys | None,  # None: scoring reads the draft's cache
        judge: Judge,
        confirming: Judge,  # of tentative tokens
        *,
        draft_tokens: int,
        most_tentative: int,  # tokens of a row that are confirmed at a time; 0: none are tentative
        tentative_from: int,  # cached tokens from which on they are
        common_noise: bool,  # draft and target choose by the same noise
        share: float,  # what the budget lets lists keep
        audits_from: int | None,  # cached tokens from which on rows may be audited; None: no round ever is
        chunk: int,  # tokens that are read at a time where some are read anew
        slots: int,
        capacity: int,
        capture: bool,
    ) -> None:
        self.target, self.draft = target, draft
        self.guidance, self.drafting, self.quantized = guidance, drafting, quantized
        self.judge, self.confirming = judge, confirming
        self.k = draft_tokens if draft is not None else 0
        self._chunk = chunk
        self.slots, self.capacity = slots, capacity
        self.device = target.spec.device
        self.launches_ahead = self.device.type == "cuda"  # a round may begin before the last one's tokens are read
        self.models = [model for model in (target, draft) if model is not None]
        self.caches = [model.new_cache(slots, capacity) for model in self.models]
        self.confirms = most_tentative > 0
        # the draft spares a step, unless every round takes it for the sake of its scores
        lags = draft is not None and (self.confirms or guidance is None or not guidance.scores)
        self.inputs = InputBuffer(slots, self.k, self.device, common_noise=common_noise, share=share, lags=lags)
        self.tentative = TentativeTokens(slots, most_tentative, tail(self.k), tentative_from, self.device)
        self.audits = None if audits_from is None else Audits(target, audits_from)
        self.stages = Stages(capture=capture)
        rival = guidance.rival if guidance is not None else None
        self.rivals = None if rival is None else ByRow(rival, target, self.caches[0])
        self._parts: dict[int, tuple[list[KVCache], DraftLists | None, QuantizedKeys | None]] = {}  # by rows
        self._begun: set[int] = set()  # rows whose draft lists, records and rivals follow their rounds
        self._behind: set[int] = set()  # rows of which the draft's cache lacks tokens
        self._landings = Landings(slots, self.k, self.tentative.width, pinned=self.device.type == "cuda")

    def rows_of(self, slot: int) -> list[tuple[LanguageModel, KVCache]]:
        """The models, the target first, each with its cache of one slot."""
        return [(model, cache.rows(slot, slot + 1)) for model, cache in zip(self.models, self.caches, strict=True)]

    def _first(self, rows: int) -> tuple[list[KVCache], DraftLists | None, QuantizedKeys | None]:
        """The caches, draft lists and records of the first rows. Made once: views of so many tensors take the host long."""
        if rows not in self._parts:
            self._parts[rows] = (
                [cache.rows(0, rows) for cache in self.caches],
                self.drafting.rows(0, rows) if self.drafting is not None else None,
                self.quantized.rows(0, rows) if self.quantized is not None else None,
            )
        return self._parts[rows]

    def steps(self, kind: RoundKind) -> int:
        """Steps that the draft takes in such a round."""
        scored = self.inputs.previous is None or (kind.sparse and self.guidance is not None and self.guidance.scores)
        return kind.k + scored if kind.k else 0

    def begin(self, slot: int, sequence: Sequence, *, drafted: bool) -> None:
        """A sequence whose prompt is cached runs from now on; the draft's cache has it where it was `drafted`."""
        self.inputs.begin(slot, sequence)
        self._begun.discard(slot)
        self._behind.discard(slot)
        if not drafted:
            self._behind.add(slot)

    def move(self, source: int, slot: int) -> None:
        """A sequence changes its slot."""
        if source == slot:
            return
        for cache in self.caches:
            cache.move(source, slot)
        self.tentative.move(source, slot)
        self.inputs.move(source, slot)
        self._begun.discard(slot)
        self._behind.discard(slot)
        if source in self._behind:
            self._behind.symmetric_difference_update({source, slot})
        if source in self._begun:
            for followed in (self.drafting, self.quantized, self.rivals):
                if followed is not None:
                    followed.move(source, slot)
            self._begun.symmetric_difference_update({source, slot})

    def clear(self, slots: int | slice) -> None:
        """Nothing runs there any more. An idle row may take part in rounds: what it writes is behind its 0 tokens."""
        for cache in self.caches:
            cache.lengths[slots] = 0
        self.tentative.clear(slots)

    def forget(self) -> None:
        """What was captured counts no more."""
        self.stages = Stages(capture=self.stages.capture)

    def launch(self, running: list[Sequence], kind: RoundKind, audited: list[bool]) -> Flight:
        """Start a round of the sequences in rows 0 .. n - 1, of which some are to be audited, without waiting for it."""
        clock = StageClock(self.device)
        if kind.k:
            self._catch_up(running, clock)
        else:
            self._behind |= set(range(len(running)))
        self._follow(kind, running)
        self.inputs.load(running, kind.rows, audited)
        before, fresh = self._touched(kind, running), self._is_fresh(kind)
        outcome, figures = self.run_stages(kind, clock, audited=kind.sparse and any(audited))
        touched = [after - x for x, after in zip(before, self._touched(kind, running), strict=True)]
        return Flight.of(running, outcome, self._landings, clock, fresh=fresh, touched=touched, figures=figures)

    def confirm(self, running: list[Sequence], kind: RoundKind, under_way: int) -> Flight:
        """Start to confirm what the sequences in rows 0 .. n - 1 hold, and up to so many tokens that a round under way brings,
        without waiting for it."""
        clock = StageClock(self.device)
        self._catch_up(running, clock)
        self.inputs.load(running, kind.rows, audited=[False] * len(running))
        listed = kind.sparse and self._begun.issuperset(range(len(running)))
        width = self.tentative.width_of(max(sequence.held for sequence in running) + under_way)
        stop = max(sequence.cached - len(sequence.tentative) for sequence in running) + under_way + width
        # as many tokens are drafted behind rounds of any width: kinds that are captured are few
        confirmation = ConfirmationKind(round=replace(kind, k=self.k), width=width, listed=listed)
        fresh = self._is_fresh(confirmation)
        outcome = self.run_confirmation(confirmation, stop, clock)
        if self.rivals is not None:  # what they keep is of tokens that may be gone, and of keys that were written anew
            self._begun.clear()
        return Flight.of(running, outcome, self._landings, clock, fresh=fresh, confirms=True)

    def _is_fresh(self, kind: Hashable) -> bool:
        return self.stages.capture and not self.stages.knows(kind)

    def run_confirmation(self, kind: ConfirmationKind, stop: int, clock: StageClock) -> Outcome:
        """Confirm what `tentative` holds, without waiting for the device; no row has more than `stop` tokens then."""
        rows = kind.round.rows
        caches, lists, _ = self._first(rows)

        def confirmed() -> Outcome:
            counts, tokens = self.tentative.take(rows, kind.width, self.inputs.pending[:rows])
            inputs = self.inputs.unpack(kind.round, caches[0].lengths - counts)
            room = caches[0].capacity if self.stages.capture else stop  # a graph is replayed with other lengths
            models = [model.uncompiled() for model in self.models]  # of widths that are not worth a compilation
            given = models, caches, counts, tokens, inputs, lists, room, self.confirming
            return confirm(*given, drafts=self.tentative.tail, listed=kind.listed)

        self.stages.begin(kind)
        with clock.stage("confirm"):
            return self.stages.run("confirm", confirmed)

    def reread(self, slot: int, sequence: Sequence, read: ReadChunk) -> dict[str, float]:
        """Write what the target's cache holds of the generated tokens anew, densely; seconds by stage.

        No round is under way.
        """
        clock, start = StageClock(self.device), len(sequence.prompt) - 1
        cache = self.caches[0].rows(slot, slot + 1)
        tokens = torch.tensor([sequence.text_cached[start:]], dtype=torch.int64)
        with clock.stage("audit"):
            cache.truncate(start)
            read_on(self.target, cache, tokens, start, self._chunk, read)
        return clock.settle()

    def _touched(self, kind: RoundKind, running: list[Sequence]) -> list[float]:
        if self.rivals is None or not kind.sparse:
            return [0.0] * len(running)
        return self.rivals.touched(len(running))

    def _catch_up(self, running: list[Sequence], clock: StageClock) -> None:
        """The draft reads what its cache lacks of these: tokens of rounds in which the target decoded alone, or all of them.
        Where there are any, no round is under way.
        """
        late = self._behind & set(range(len(running)))
        self._behind -= late
        if late and self.draft is not None:
            cache = self.caches[1].rows(0, len(running))
            starts = cache.lengths.tolist()
            missing = [
                one.text_cached[start:] if row in late else []
                for row, (one, start) in enumerate(zip(running, starts, strict=True))
            ]
            with clock.stage("propose"):
                read_late(self.draft.uncompiled(), cache, missing, self._chunk, fills_up=self.stages.capture)

    def _follow(self, kind: RoundKind, running: list[Sequence]) -> None:
        """Give rows that come from a prefill or a dense round draft lists, records and rivals to begin with."""
        if not kind.sparse:
            self._begun.clear()
            return
        for row in set(range(len(running))) - self._begun:
            if self.drafting is not None:
                self.drafting.rows(row, row + 1).begin(self.caches[1].lengths[row : row + 1])
            if self.quantized is not None:
                self.quantized.rows(row, row + 1).fill(self.caches[1].rows(row, row + 1))
            if self.rivals is not None:
                self.rivals.begin(row, running[row].text_cached)
        self._begun.update(range(len(running)))

    def run_stages(self, kind: RoundKind, clock: StageClock, *, audited: bool = False) -> tuple[Outcome, Tensor | None]:
        """Propose, score, select, verify and accept over the first `kind.rows` rows, without waiting for the device. In an
        `audited` round the dense target reads it, too: the second result are the figures of audits."""
        run, spec = self.stages.run, self.target.spec
        caches, lists, quantized = self._first(kind.rows)
        guidance = self.guidance if kind.sparse else None
        lists = lists if kind.sparse else None
        self.stages.begin(kind)

        def proposed() -> tuple[Inputs, DraftTrace]:
            inputs = self.inputs.unpack(kind, caches[0].lengths)
            if self.draft is None or not kind.k:
                return inputs, propose_nothing(inputs, spec.vocabulary)
            drafting = inputs.pending, inputs.sampling, inputs.draft_uniforms, spec.vocabulary, lists, inputs.noise
            scored = self.steps(kind) > kind.k
            trace = propose(self.draft, caches[1], *drafting, behind=inputs.behind(caches[0]), scored=scored)
            self.target.ranks.same(trace.tokens)  # drafts that differ by rounding would part the ranks' targets
            return inputs, trace

        def scored(draft: LanguageModel, guidance: Guidance) -> DraftScores:
            given = draft, caches[1], trace.queries, caches[0].lengths, guidance.layers
            return score(*given, per_query=guidance.per_query, quantized=quantized)

        def selected(guidance: Guidance) -> Selection | None:
            if guidance.draft is not None and lists is not None:
                lists.replace(guidance.draft.select(scores))
            if guidance.target is None or kind.reads_all:
                return None
            shares = None
            if kind.widest is not None and inputs.shares is not None:
                shares = Shares(kept=inputs.shares, most=kind.widest)
            return guidance.target.select(scores, shares)

        def accepted() -> Outcome:
            selection = chosen.made if chosen is not None else None
            moved = caches if kind.k else caches[:1]  # without drafted tokens the draft's cache stays behind
            if not kind.holds:
                return accept(trace, logits, inputs, selection, self.target, moved, self.judge)
            pending, lengths = inputs.pending.clone(), caches[0].lengths.clone()
            outcome = accept(trace, logits, inputs, selection, self.target, moved, self.judge)
            self.tentative.hold(pending, lengths, outcome, inputs.active)
            return outcome

        chosen: Lists | None = None
        figures = None
        with clock.stage("propose"):
            inputs, trace = run("propose", proposed)
        if guidance is not None and guidance.scores and (draft := self.draft) is not None:
            with clock.stage("score"):
                scores = run("score", lambda: scored(draft, guidance))
            with clock.stage("select"):
                chosen = run("select", lambda: selected(guidance))
        if self.rivals is not None and kind.sparse:
            chosen = self.rivals.lists(torch.cat([inputs.pending[:, None], trace.tokens], dim=1), len(self._begun))
        audits, lists_made = self.audits if audited else None, chosen.made if chosen is not None else None
        if audits is not None and lists_made is not None:
            with clock.stage("audit"):
                logits, figures = run("audit", lambda: audits.verify(caches[0], trace.tokens, inputs, lists_made))
        else:
            with clock.stage("verify"):
                logits = run("verify", lambda: verify(self.target, caches[0], inputs.pending, trace.tokens, chosen))
        with clock.stage("accept"):  # a captured one goes on from the logits that it was captured with
            return run("accept" if figures is None else "accept audited", accepted), figures
