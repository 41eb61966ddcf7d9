"""The public face: load a pair, generate, stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from outrider.config import Budget, EngineConfig, SamplingParams, check, engine_config
from outrider.decoding.engine import Engine
from outrider.decoding.loop import Event, Watch
from outrider.decoding.pair import BUILTIN, METHODS, find_alignment, load_pair
from outrider.decoding.prefill import ProgressCallback, ReadChunk, read_chunk
from outrider.decoding.sequence import Sequence
from outrider.decoding.sparse_prefill import PREFILL_METHOD
from outrider.decoding.statistics import Statistics
from outrider.errors import OptionError, PromptError
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.selectors import SELECTORS
from outrider.models import LanguageModel
from outrider.types import Alignment

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One continued prompt."""

    text: str  # the continuation alone, ending before a stop string
    token_ids: list[int]
    finish_reason: str  # "length", "eos" or "stop"; "cancelled"; "error"
    error: str | None  # what went wrong, where something did: the text ends there
    statistics: Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one prompt has gained since its last chunk."""

    index: int  # of the prompt
    text: str
    token_ids: list[int]
    statistics: Statistics  # of the prompt so far
    result: Result | None  # set in the prompt's last chunk


class Stream(Iterator[Chunk]):
    """The chunks of a run as they come; any prompt can be cancelled on the way."""

    def __init__(self, sequences: list[Sequence], events: Iterator[Event]) -> None:
        self._sequences = sequences
        self._events = events

    def __next__(self) -> Chunk:
        event = next(self._events)
        sequence, reason = event.sequence, event.sequence.finish_reason
        text = sequence.text.take(final=reason is not None)
        result = None
        if reason is not None:
            result = Result(
                text=sequence.text.text,
                token_ids=list(sequence.tokens),
                finish_reason=reason,
                error=sequence.error,
                statistics=sequence.statistics,
            )
        return Chunk(index=sequence.index, text=text, token_ids=event.tokens, statistics=sequence.statistics, result=result)

    def cancel(self, index: int) -> None:
        """End prompt `index` before its next round, with finish reason "cancelled"; nothing if it has ended already."""
        self._sequences[index].cancelled = True


class Outrider:
    """A target and a draft model with the alignment that lets the draft guide the target.

    Examples:
        >>> from outrider import Outrider, SamplingParams
        >>> engine = Outrider.load(mode="dense")
        >>> [result] = engine.generate(["It was a dark and stormy"], SamplingParams(max_new_tokens=4))
        >>> len(result.token_ids), result.finish_reason
        (4, 'length')
    """

    def __init__(
        self,
        target: LanguageModel,
        draft: LanguageModel,
        config: EngineConfig,
        alignments: AlignmentFile | None = None,
        map_name: str | None = None,
        *,
        read: ReadChunk = read_chunk,
    ) -> None:
        """`read` puts a chunk of a prompt into a cache: another one serves measurements."""
        self.target = target
        self.draft = draft
        self.config = config
        self.alignments = alignments
        self.map_name = map_name
        self._read = read
        guides = self._alignment(), self._prefill_alignment()
        self._engine = Engine(target, draft, config, guides[0], prefill_alignment=guides[1], read=read)

    @classmethod
    def load(
        cls,
        target: str = BUILTIN,
        draft: str | None = None,
        *,
        alignment: str | Path | AlignmentFile | None = None,
        map: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        tensor_parallel: int = 1,
        shard_draft: bool = False,
        **options: Any,
    ) -> Outrider:
        """Load a pair from folders or hub ids; "builtin" is the pair that ships with Outrider.

        `alignment` is a file made by `outrider calibrate` for this pair (the built-in pair has its own); `map` picks one of its
        maps, such as "joint+divergence", in place of the method's own. `options` are fields of `EngineConfig` and `Budget`.

        With `tensor_parallel` above 1 as many processes share the target's heads, and the draft's with `shard_draft`. Each of
        them, started by `torchrun`, makes the same calls with the same arguments, and gets the same results (docs/parallel.md).

        Raises OptionError, ModelError, PairError or AlignmentError before any work starts, RankError where a process does not
        come.
        """
        config = engine_config(**options)
        check("method", config.method, config.method in METHODS, ", ".join(METHODS))
        models = load_pair(
            target,
            draft,
            dtype=dtype,
            device=device,
            backend=config.backend,
            kv_dtype=config.kv_dtype,
            tensor_parallel=tensor_parallel,
            shard_draft=shard_draft,
        )
        return cls(*models, config, find_alignment(alignment, *models), map)

    def with_options(self, **options: Any) -> Outrider:
        """The same models under other options; what is not named stays as it is."""
        named = {f.name: getattr(self.config, f.name) for f in fields(EngineConfig) if f.name != "budget"}
        budget = {f.name: getattr(self.config.budget, f.name) for f in fields(Budget)}
        if {"keep", "top_p"} & options.keys():
            budget |= {"keep": None, "top_p": None}
        config = engine_config(**(named | budget | options))
        return Outrider(self.target, self.draft, config, self.alignments, self.map_name, read=self._read)

    def generate(
        self,
        prompts: list[Prompt] | Prompt,
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: ProgressCallback | None = None,
    ) -> list[Result]:
        """Continue prompts (texts, or lists of token ids) and return one result a prompt, in order."""
        chunks = self.stream(prompts, params, progress=progress)
        finished = {chunk.index: chunk.result for chunk in chunks if chunk.result is not None}
        return [finished[index] for index in sorted(finished)]

    def stream(
        self,
        prompts: list[Prompt] | Prompt,
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: ProgressCallback | None = None,
        watch: Watch | None = None,
    ) -> Stream:
        """Like `generate`, but yields the new text of every prompt after every round. All prompts are checked first.

        `watch` is told of every round: its drafted and emitted tokens, and its lists (on a GPU with `eager` alone).
        """
        sequences = self._sequences(prompts, params)
        return Stream(sequences, self._engine.run(sequences, progress, watch))

    def release(self) -> None:
        """Give back the memory that the last run's caches and graphs hold for the next one."""
        self._engine.release()

    @property
    def execution(self) -> dict[str, int | bool]:
        """How rounds run here: as CUDA graphs or not, and how many layers of target and draft in fused launches.

        A layer that is not fused runs as transformers has it: compiled in graphs, else as it is.
        """
        engine = self._engine
        fused = {
            f"fused_{role}_layers": len(model.fused_layers)
            for role, model in (("target", engine.target), ("draft", engine.draft))
        }
        return {"graphs": engine.captures, "tensor_parallel": self.target.ranks.size} | fused

    @property
    def score_bits(self) -> int | None:
        """Bits of the codes that scoring reads; None where it reads the keys themselves, or where nothing is scored."""
        return None if self._engine.guidance is None else self._engine.guidance.bits

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt as the target sees it. Raises PromptError when it is empty or no tokenizer is at hand."""
        if isinstance(prompt, str):
            if self.target.tokenizer is None:
                raise PromptError(
                    f"prompt: got text, but {self.target.spec.name!r} has no tokenizer; allowed: lists of token ids"
                )
            tokens = self.target.tokenizer(prompt, verbose=False)["input_ids"]
        elif isinstance(prompt, (list, tuple)):
            tokens = list(prompt)
        else:
            raise PromptError(f"prompt: got {prompt!r}; allowed: a text or a list of token ids")
        if not tokens or (isinstance(prompt, str) and not prompt):
            raise PromptError("prompt: got an empty one; allowed: at least one token")
        vocabulary = range(self.target.spec.vocabulary)
        wrong = [t for t in tokens if isinstance(t, bool) or not isinstance(t, int) or t not in vocabulary]
        if wrong:
            raise PromptError(
                f"prompt: got token {wrong[0]!r}; allowed: whole numbers in 0 .. {self.target.spec.vocabulary - 1}"
            )
        return tokens

    def _sequences(
        self, prompts: list[Prompt] | Prompt, params: SamplingParams | list[SamplingParams] | None
    ) -> list[Sequence]:
        many = _as_prompts(prompts)
        each = params if isinstance(params, list) else [params or SamplingParams()] * len(many)
        if len(each) != len(many):
            raise OptionError("params", f"{len(each)} SamplingParams", f"one, or one for each of the {len(many)} prompts")
        context = min(self.target.spec.context, self.draft.spec.context)
        sequences = []
        for index, (prompt, p) in enumerate(zip(many, each, strict=True)):
            tokens = self.tokenize(prompt)
            if len(tokens) + p.max_new_tokens > context:
                raise PromptError(
                    f"prompt {index}: {len(tokens)} tokens + max-new-tokens {p.max_new_tokens}; "
                    f"allowed: at most {context} together, the context of the pair"
                )
            statistics = Statistics(
                mode=self.config.mode,
                method=self.config.method if self.config.verifies_sparsely else None,
                drafting=None if self.config.mode == "plain" else "sparse" if self.config.drafts_sparsely else "dense",
                prompt_tokens=len(tokens),
                accepted_at=[0] * self.config.draft_tokens,
            )
            sequences.append(Sequence(index, tokens, p, self.target.tokenizer, self.target.spec.eos_tokens, statistics))
        return sequences

    def _prefill_alignment(self) -> Alignment | None:
        """None where the file has no map for sparse prefill."""
        found = None if self.alignments is None else self.alignments.maps.get(SELECTORS[PREFILL_METHOD].default_map)
        return None if found is None else found.alignment

    def _alignment(self) -> Alignment | None:
        check("method", self.config.method, self.config.method in METHODS, ", ".join(METHODS))
        if not self.config.verifies_sparsely or self.config.method not in SELECTORS or self.alignments is None:
            return None
        return self.alignments.map(self.map_name or SELECTORS[self.config.method].default_map).alignment


def _as_prompts(prompts: list[Prompt] | Prompt) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, list) and prompts and all(isinstance(t, int) for t in prompts):
        return [cast(list[int], prompts)]  # one prompt of token ids
    if not isinstance(prompts, list) or not prompts:
        raise PromptError("prompts: got none; allowed: a text, a list of token ids, or a list of these")
    return cast(list[Prompt], prompts)
