"""Sparse prefill: the draft reads a chunk of the prompt first, and its queries choose what the target's blocks read.

    draft    the chunk, densely or from blocks of its own choice; its queries are kept
    score    all queries of a block vote: mean softmax mass on every token before the block that the draft has read
    select   lists for each block, target layer and KV head
    target   the chunk: a block attends to its lists and, causally, to itself

Scores take memory in proportion to the prompt: as many blocks are scored at a time as `SCORE_BYTES` hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from outrider.config import EngineConfig, check
from outrider.decoding.draft_blocks import EVERYTHING, WIDTHS, DraftReading
from outrider.decoding.memory import INDEX_BYTES
from outrider.decoding.pair import build_pair_selector
from outrider.decoding.scoring import mass_dtype, score_blocks
from outrider.errors import OptionError
from outrider.guidance.selectors.base import Selector
from outrider.models import KVCache, LanguageModel, ModelSpec, Output
from outrider.models.cache import aligned
from outrider.types import Alignment, BlockSelection, KeptShare, Selection, Stage

PREFILL_METHOD = "outrider"  # makes the lists, whatever makes those of rounds
SCORE_BYTES = 2**30  # of masses at a time; never fewer than one block's


def no_clock(name: str) -> AbstractContextManager[None]:
    """Takes no time of stage `name`."""
    return nullcontext()


class SparsePrefill:
    """Reads chunks of prompts through a draft and a target; keeps nothing between calls. A `PromptReader`."""

    whole, drafts, ahead = False, True, 0

    def __init__(self, selector: Selector, block: int, min_context: int, reading: DraftReading = EVERYTHING) -> None:
        """`selector` makes the lists of a block as it does those of a round. Up to `min_context` tokens are read densely.

        `reading` says what the draft's own blocks read of what lies before them.
        """
        self.selector, self.block, self.min_context, self.reading = selector, block, min_context, reading

    def bytes(self, draft: ModelSpec, capacity: int, chunk: int) -> int:
        """What reading chunks of one prompt of up to `capacity` tokens needs beside the caches: masses, lists and queries."""
        heads = len(self.selector.draft_layers) * draft.whole.full_shape.query_heads
        masses = max(SCORE_BYTES, heads * aligned(capacity) * mass_dtype(draft).itemsize)
        lists = self.selector.entries(capacity) * -(-chunk // self.block) * INDEX_BYTES
        queries = sum(x.query_heads * x.head_dim for x in draft.layers) * chunk * draft.dtype.itemsize
        return masses + 2 * lists + queries + self.reading.bytes(draft, capacity, chunk, self.block)  # of lists parts and whole

    def read(
        self,
        rows: list[tuple[LanguageModel, KVCache]],
        tokens: Tensor,
        stop: int,
        *,
        logits: bool = False,
        last: int | None = None,
        stage: Stage = no_clock,
    ) -> tuple[Tensor, BlockSelection]:
        """Run `tokens` [B, T] through both models, the target first in `rows`, whose caches hold `stop` tokens afterwards.

        The chunk begins with a block. Returns the target's logits [B, T, V], or of the `last` tokens (where asked for, else
        [B, 0, V]), and the lists.
        """
        (target, cache), (draft, draft_cache) = rows
        known = tokens.clamp(max=draft.spec.vocabulary - 1)  # a draft narrower than the target's vocabulary: see propose
        with stage("draft"):
            recorded: dict[str, Any] = {"record_queries": True, "record_logsumexp": True}
            blocks = self.reading.lists(draft, draft_cache, stop - tokens.shape[1], stop, self.block)
            drafted = draft.forward(known, draft_cache, stop=stop, selection=blocks, logits=False, **recorded)
        listed = None if blocks is None else blocks.listed
        lists = self._lists(draft, draft_cache, drafted, listed, stop, stage)
        with stage("target"):
            output = target.forward(tokens, cache, stop=stop, selection=lists, logits=logits, last=last)
        for held in (cache, draft_cache):
            held.advance(tokens.shape[1])
        return output.logits, lists

    def _lists(
        self,
        draft: LanguageModel,
        cache: KVCache,
        drafted: Output,
        listed: dict[int, Tensor] | None,
        stop: int,
        stage: Stage,
    ) -> BlockSelection:
        """The lists of a chunk whose keys lie behind the cached ones, as many blocks at a time as there is room for.

        `listed` is what the draft itself has read, by layer; None: all.
        """
        b, t = drafted.queries[0].shape[:2]
        start, parts = stop - t, []
        for begin, end in self._groups(draft, b, t, stop):
            queries = tuple(one[:, begin:end] for one in drafted.queries)
            logsumexp = tuple(one[:, :, begin:end] for one in drafted.logsumexp)
            given = draft, cache, queries, logsumexp, self.selector.draft_layers
            blocks = slice(begin // self.block, -(-end // self.block))
            marks = None if listed is None else {layer: marks[:, blocks] for layer, marks in listed.items()}
            with stage("score"):
                scores = score_blocks(*given, block=self.block, start=start + begin, stop=start + end, listed=marks)
            with stage("select"):
                parts.append(self.selector.select(scores))
            del scores
        return joined(parts, b, self.block, min(aligned(stop), cache.capacity))

    def _groups(self, draft: LanguageModel, b: int, t: int, stop: int) -> Iterator[tuple[int, int]]:
        """Tokens begin .. end - 1 of a chunk, whole blocks, that are scored together."""
        heads = len(self.selector.draft_layers) * draft.spec.whole.full_shape.query_heads
        each = b * heads * aligned(stop) * mass_dtype(draft.spec).itemsize
        step = max(1, SCORE_BYTES // each) * self.block
        return ((begin, min(begin + step, t)) for begin in range(0, t, step))


class Kept:
    """Adds up what blocks with lists read of the tokens before them, without waiting for the device."""

    def __init__(self) -> None:
        self.listed: Tensor | float = 0.0  # tokens on lists, averaged over layers and heads, summed over blocks
        self.before = 0  # tokens before these blocks, summed

    def add(self, lists: KeptShare, start: int, stop: int) -> None:
        """A chunk of one sequence, tokens start .. stop - 1."""
        self.listed = self.listed + lists.listed.sum()
        self.before += lists.before(start, stop)

    @property
    def fraction(self) -> float | None:
        """None where no block had lists. Waits for the device."""
        return float(self.listed) / self.before if self.before else None


def joined(parts: list[Selection], b: int, block: int, size: int) -> BlockSelection:
    """The lists of a chunk of `b` sequences, up to `size` long, from those of its blocks, some of every sequence at a time."""
    width = max(part.indices.shape[-1] for part in parts)
    width = min(-(-width // WIDTHS) * WIDTHS, size)
    counts = torch.cat([part.counts.unflatten(1, (b, -1)) for part in parts], 2)
    indices = counts.new_empty(*counts.shape, width)
    done = 0
    for part in parts:  # into their place one by one: lists of a long prompt are gigabytes
        lists = part.indices.unflatten(1, (b, -1))
        place = indices[:, :, done : done + lists.shape[2]]
        place[..., : lists.shape[-1]] = lists
        place[..., lists.shape[-1] :] = -1
        done += lists.shape[2]
    return BlockSelection(layers=parts[0].layers, indices=indices, counts=counts, block=block)


def make_sparse_prefill(
    target: LanguageModel, draft: LanguageModel, config: EngineConfig, keep: float, alignment: Alignment | None
) -> SparsePrefill:
    """Reads prompts so that each block of the target reads `keep` of what lies before it, by lists of method outrider.

    Raises OptionError without an alignment, and where a chunk is not a number of whole blocks; PairError for a misfit.
    """
    if alignment is None:
        raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair (prefill dense needs none)")
    chunk, block = config.prefill_chunk, config.prefill_block
    check("prefill-chunk", chunk, chunk % block == 0, f"a multiple of prefill-block = {block} with sparse prefill")
    if config.prefill_draft_keep < 1:
        check("prefill-block", block, block & (block - 1) == 0, "a power of 2 with prefill-draft-keep below 1")
    selector = build_pair_selector(PREFILL_METHOD, target, draft, alignment, config.prefill_budget(keep))
    reading = DraftReading(keep=config.prefill_draft_keep, least=config.prefill_draft_least)
    return SparsePrefill(selector, block, config.prefill_min_context, reading)
