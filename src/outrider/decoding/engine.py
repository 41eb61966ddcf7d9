"""An engine: a pair, the guidance between them, and a runner that stays warm from run to run."""

from __future__ import annotations

from collections.abc import Iterator

from outrider.config import MODES, EngineConfig, SamplingParams, check
from outrider.decoding.acceptance import Acceptance
from outrider.decoding.choice import fixed_choice, widths
from outrider.decoding.chooser import Chooser, Fastest, Fixed
from outrider.decoding.confirmation import most_tentative, spare_rows, tail
from outrider.decoding.costs import Costs, KindOf, measure
from outrider.decoding.drafting import DraftLists
from outrider.decoding.guard import levels
from outrider.decoding.guidance import make_guidance
from outrider.decoding.loop import Event, Loop, Watch
from outrider.decoding.memory import RowDemand, free_bytes, plan_rows
from outrider.decoding.pace import Confirmations
from outrider.decoding.pair import rehearse
from outrider.decoding.prefill import ProgressCallback, ReadChunk, read_chunk
from outrider.decoding.rounds import Judge, judge
from outrider.decoding.runner import Runner
from outrider.decoding.scoring import mass_dtype
from outrider.decoding.sequence import Sequence
from outrider.decoding.sparse_prefill import SparsePrefill, make_sparse_prefill
from outrider.errors import EngineError, OptionError
from outrider.guidance.selectors import SELECTORS
from outrider.models import LanguageModel
from outrider.models.attention import ROUND
from outrider.models.cache import aligned
from outrider.models.quantized_keys import QuantizedKeys, coded_bytes
from outrider.types import Alignment


class Engine:
    """Runs sequences through speculative rounds, several at once; finished ones make room for those that wait."""

    def __init__(
        self,
        target: LanguageModel,
        draft: LanguageModel,
        config: EngineConfig,
        alignment: Alignment | None,
        *,
        prefill_alignment: Alignment | None = None,
        read: ReadChunk = read_chunk,
        judge: Judge = judge,
        confirming: Judge = judge,
        predicts: bool = False,
    ) -> None:
        """`alignment` guides rounds, `prefill_alignment` sparse prefill. `read` puts a chunk of a prompt into a cache, `judge`
        accepts drafted tokens, `confirming` tentative ones: other ones serve measurements. With `predicts` the costs of rounds
        are measured in every mode, as in mode auto, but not where ranks share the target.

        Raises OptionError for what the models do not take.
        """
        self.config = config
        self.target, self.draft = (
            model.with_backend(config.backend).with_kv_dtype(config.kv_dtype) for model in (target, draft)
        )
        if self.target.ranks.size > 1:
            _check_shared(config)
        self.read, self.judge, self.confirming = read, judge, confirming
        self._prefill_alignment = prefill_alignment
        self._prefills: dict[float, SparsePrefill] = {}  # by the share that blocks keep
        self.prefill_for(SamplingParams())  # what is wrong with it shows before any work
        self.guidance = None
        if config.mode == "plain":
            rehearse(self.target, self.draft, None, 1)
        else:
            self.guidance = make_guidance(self.target, self.draft, config, alignment)
        if config.guards and self.guidance is not None and self.guidance.rival is not None:
            raise OptionError("guard-every", config.guard_every, f"None with method {config.method}, which makes its own lists")
        # rounds become CUDA graphs where every op has a kernel and none waits for the device
        waits = config.backend == "reference" or config.draft_tokens >= ROUND
        waits |= self.guidance is not None and self.guidance.waits
        self.captures = target.spec.device.type == "cuda" and not config.eager and not waits
        if self.captures:
            self.target, self.draft = self.target.compile(), self.draft.compile()
        elif config.backend != "reference":
            self.target, self.draft = self.target.fuse(), self.draft.fuse()
        self._predicts = (predicts and self.target.ranks.size == 1) or config.mode == "auto"
        self._costs: Costs | None = None  # once measured
        self._experience = Acceptance(config.draft_tokens)
        self.broken: str | None = None  # what made it unusable
        self._idle: Runner | None = None  # of the last run, with all that it has captured

    def prefill_for(self, params: SamplingParams) -> SparsePrefill | None:
        """How a prompt with these parameters is read; None: densely.

        Raises OptionError where sparse prefill is asked for and there is no draft, no alignment, or chunks are no whole blocks.
        """
        config = self.config
        if (params.prefill or config.prefill) == "dense":
            return None
        keep = config.prefill_keep if params.prefill_keep is None else params.prefill_keep
        if keep not in self._prefills:
            check("prefill", "sparse", config.mode != "plain", "dense with mode plain, which has no draft")
            self._prefills[keep] = make_sparse_prefill(self.target, self.draft, config, keep, self._prefill_alignment)
        return self._prefills[keep]

    def run(
        self, sequences: list[Sequence], progress: ProgressCallback | None = None, watch: Watch | None = None
    ) -> Iterator[Event]:
        """Continue all sequences to their end; yields the tokens of every sequence after every round.

        A sequence that fails, for want of memory or because the target's logits are not finite, ends with `error` set and the
        others go on. An error of the device ends all of them; then the engine cannot be used again.

        `watch` is told of every round. Raises, before any work, EngineError when it cannot be used, OptionError when captured
        rounds are to be watched (the next one overwrites their lists) and PromptError when a sequence does not fit into the
        memory that is free; warns when fewer fit at the same time than the batch size says.
        """
        if self.broken is not None:
            raise EngineError(
                f"engine: stopped by an error of the device ({self.broken}); it cannot be used again, start a new process"
            )
        if watch is not None and self.target.ranks.size > 1:
            raise OptionError(
                "tensor-parallel", self.target.ranks.size, "1 for rounds that are watched: a rank has its own lists"
            )
        if watch is not None and self.captures:
            raise OptionError("eager", False, "True (--eager) for rounds that are watched: CUDA graphs overwrite their lists")
        progress = progress or (lambda what, done, of: None)
        loop = Loop(self, self._runner(sequences), sequences, progress, watch)
        return self._run(loop)

    def _run(self, loop: Loop) -> Iterator[Event]:
        try:
            yield from loop.events()
        finally:
            if self.captures:  # after an error of the device, too: to free graphs then would end the process
                self._idle = loop.runner

    def costs(self, runner: Runner, kind_of: KindOf, longest: int, progress: ProgressCallback) -> Costs | None:
        """What rounds cost, for sequences of up to `longest` tokens; measured when first asked for, and again for larger
        batches and contexts twice as long. None where nobody asks.
        """
        known, config = self._costs, self.config
        if not self._predicts or (known is not None and known.rows >= runner.slots and 2 * known.cached >= longest):
            return known
        least = max(config.budget.min_context, 1)
        listed = longest >= least and self.guidance is not None and self.guidance.target is not None
        modes = {
            "auto": ("plain", "dense", *(["sparse"] if listed else [])),
            "exact": ("plain", "sparse"),
        }.get(config.mode, (config.mode,))
        batches = {runner.slots, 1} if config.mode == "auto" else {runner.slots}
        narrower = tuple(widths(config.draft_tokens)[:-1]) if config.mode == "auto" else ()
        measured = modes, batches, least, longest, config.prefill_chunk
        self._costs = measure(runner, kind_of, *measured, progress, narrower=narrower)
        return self._costs

    def chooser(self, confirmations: Confirmations, costs: Costs | None, slots: int) -> Chooser:
        """Who decides how the rounds of a run are run."""
        if self.config.mode != "auto":
            return Fixed(fixed_choice(self.config), costs)
        assert costs is not None
        return Fastest(costs, self.config, confirmations, self._experience, slots)

    def release(self) -> None:
        """Give back the memory that is kept for the next run: the caches, and what rounds were captured over them."""
        self._idle = None

    def _runner(self, sequences: list[Sequence]) -> Runner:
        """The last run's, if it is idle and large enough, else a new one."""
        readers = {reader for s in sequences if (reader := self.prefill_for(s.params)) is not None}
        lengths = [len(s.prompt) + s.params.max_new_tokens for s in sequences] or [0]
        slots = max(min(self.config.batch_size, len(sequences)), 1)
        k = self.config.draft_tokens
        # the last round, and one begun before its outcome was known, may run past
        capacity = aligned(max(lengths) + 2 * (k + 1) + spare_rows(self.config))
        runner, self._idle = self._idle, None
        if runner is not None and runner.slots >= slots and runner.capacity >= capacity:
            return runner
        del runner  # its memory is needed
        drafts, guidance, draft = self.config.mode != "plain", self.guidance, self.draft.spec
        bits, layers = (None, ()) if guidance is None else (guidance.bits, guidance.layers)
        demand = RowDemand(
            target=self.target.spec,
            draft=draft if drafts else None,
            capacity=capacity,
            score_rows=0 if guidance is None else guidance.score_rows(draft.whole, k + 1),
            score_bytes=mass_dtype(draft).itemsize,
            list_entries=0 if guidance is None else guidance.entries(capacity, 1.0 if self.config.guards else None),
            code_bytes=0 if bits is None else coded_bytes((draft.layers[layer] for layer in layers), bits),
        )
        longest, device = lengths.index(max(lengths)), self.target.spec.device
        if (free := free_bytes(device)) is not None:
            free = int(self.target.ranks.least(free, device))  # all ranks run as many rows
        reading = max((reader.bytes(draft, capacity, self.config.prefill_chunk) for reader in readers), default=0)
        slots = plan_rows(demand, slots, free, prompt=longest, tokens=lengths[longest], reading=reading)
        lists = None
        if guidance is not None and guidance.draft is not None:
            lists = DraftLists(draft, self.config.draft_budget, slots, capacity, k, tail(k) if self.config.confirms else 0)
        return Runner(
            self.target,
            self.draft if drafts else None,
            guidance,
            lists,
            None if bits is None else QuantizedKeys(self.draft, layers, bits, slots, capacity),
            self.judge,
            self.confirming,
            draft_tokens=k,
            most_tentative=most_tentative(self.config) if self.config.confirms else 0,
            tentative_from=max(self.config.budget.min_context, 1),
            common_noise=self.config.shares_noise,
            share=levels(self.config.budget)[0],
            audits_from=self.config.budget.min_context if self.config.guards else None,
            chunk=self.config.prefill_chunk,
            slots=slots,
            capacity=capacity,
            capture=self.captures,
        )


def _check_shared(config: EngineConfig) -> None:
    """Raise OptionError for what a target that ranks share does not do."""
    modes = [mode for mode in MODES if mode != "auto"]  # which decides by times, and every rank has its own
    check("mode", config.mode, config.mode in modes, f"{', '.join(modes)} with tensor-parallel above 1")
    allowed = f"{', '.join(SELECTORS)} with tensor-parallel above 1: rivals look at all heads of the target"
    check("method", config.method, config.method in SELECTORS, allowed)
