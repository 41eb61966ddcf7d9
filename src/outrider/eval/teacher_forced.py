"""Decode-like evaluation: a dense prefix, then given tokens in rounds, through the same stages as generation.

Every round feeds K + 1 given tokens to the draft, scores and selects as the engine does, and runs the target over the same
tokens with the lists; a rival chooses inside that forward instead, without the draft. What the sparse target writes into its
cache stays there for the next rounds, as in generation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from outrider.config import Budget
from outrider.decoding.pair import make_selector as pair_selector
from outrider.decoding.prefill import ProgressCallback, prefill
from outrider.decoding.scoring import score
from outrider.decoding.statistics import Listed, ReadCounter
from outrider.errors import OptionError, PromptError
from outrider.eval.rows import Case
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.rivals import RIVALS, InForward, Rival, Target, build_rival
from outrider.guidance.selectors import SELECTORS
from outrider.guidance.selectors.base import Selector
from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.models.cache import aligned
from outrider.models.quantization import dequantize
from outrider.models.quantized_keys import QuantizedKeys
from outrider.types import Selection

DENSE = "dense"
OBSERVED = 256  # tokens of a document whose queries a rival sees at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The target's predictions behind a prefix, and what it read for them."""

    logits: Tensor  # [n, V] fp32: row i predicts the token behind the i-th given one
    kept_fraction: float
    kv_read_fraction: float
    seconds: float


class TeacherForced:
    """A pair with one document cached in both models; `bits` are those of the keys that are scored (None: as cached)."""

    def __init__(
        self, pair: tuple[LanguageModel, LanguageModel], capacity: int, draft_tokens: int, bits: int | None = None
    ) -> None:
        self.target, self.draft = pair
        self.t, self.bits = draft_tokens + 1, bits
        self.caches = tuple(model.new_cache(1, aligned(capacity + self.t)) for model in pair)

    def read(self, tokens: list[int], chunk: int, progress: ProgressCallback | None = None) -> None:
        """Cache `tokens` densely in both models, in place of what was there."""
        self._document = tokens
        self._begun: dict[int, Rival] = {}  # rivals that have seen it, by identity
        for model, cache in zip((self.target, self.draft), self.caches, strict=True):
            cache.truncate(0)
            prefill(model, cache, torch.tensor([tokens]), chunk, progress)

    def run(self, tokens: list[int], selector: Selector | Rival | None, min_context: int = 0) -> Run:
        """Predict behind each of `tokens`, which follow the cached document; the caches come back as they were."""
        target_cache = self.caches[0]
        prefix = target_cache.lengths.clone()
        layers = selector.draft_layers if selector is not None and not isinstance(selector, Rival) else ()
        specs = self.target.spec, self.draft.spec
        counters = {t: ReadCounter(*specs, layers, t, self.bits) for t in {self.t, len(tokens) % self.t}}
        started = time.perf_counter()
        guide = self._guide(selector)
        logits, kept, cached, read, dense = [], 0.0, 0, 0.0, 0
        for part in torch.tensor([tokens]).split(self.t, dim=1):
            lengths = target_cache.lengths.clone()
            lists = guide.lists(part, lengths, sparse=int(lengths) >= max(min_context, 1)) if guide is not None else None
            logits.append(self.target.forward(part, target_cache, selection=lists).logits[0].float())
            selection = lists.made if isinstance(lists, InForward) else lists
            found: tuple[Any, ...] = ()
            if selection is not None:
                listed = Listed.of(selection, self.target.spec, target_cache.capacity)
                found = listed.layers, float(listed.tokens), float(listed.rows)
            reads = counters[part.shape[1]].of(int(lengths), *found)
            kept, cached = kept + reads.listed, cached + int(lengths)
            read, dense = read + reads.bytes_read, dense + reads.bytes_dense
            for cache in self.caches:
                cache.advance(part.shape[1])
        for cache in self.caches:
            cache.truncate(prefix)
        read += guide.touched if guide is not None else 0
        return Run(
            logits=torch.cat(logits),
            kept_fraction=kept / max(cached, 1),
            kv_read_fraction=read / max(dense, 1),
            seconds=time.perf_counter() - started,
        )

    def _guide(self, selector: Selector | Rival | None) -> FromDraft | InTarget | None:
        if selector is None:
            return None
        if isinstance(selector, Rival):
            if id(selector) not in self._begun:
                self._begun[id(selector)] = begin(selector, self.target, self.caches[0], self._document)
            return InTarget(copy.deepcopy(self._begun[id(selector)]), self.target, self.caches[0])
        return FromDraft(selector, self.draft, self.caches[1], self.bits)


class FromDraft:
    """Lists from the draft's scores of a round."""

    touched = 0.0  # bytes read in order to choose, beside the keys that are scored

    def __init__(self, selector: Selector, draft: LanguageModel, cache: KVCache, bits: int | None) -> None:
        self._selector, self._draft, self._cache, self._bits = selector, draft, cache, bits
        self._quantized: QuantizedKeys | None = None

    def lists(self, part: Tensor, lengths: Tensor, *, sparse: bool) -> Selection | None:
        """Run the draft over the round's tokens [1, T]; its lists, unless the round is dense."""
        queries = self._draft.forward(part, self._cache, record_queries=True, logits=False).queries
        if not sparse:
            return None
        layers = self._selector.draft_layers
        if self._bits is not None and self._quantized is None:
            self._quantized = QuantizedKeys(self._draft, layers, self._bits, 1, self._cache.capacity)
            self._quantized.fill(self._cache)
        given = self._draft, self._cache, queries, lengths, layers
        return self._selector.select(score(*given, per_query=self._selector.per_query, quantized=self._quantized))


class InTarget:
    """Lists that a rival makes inside the target's forward."""

    def __init__(self, rival: Rival, target: LanguageModel, cache: KVCache) -> None:
        self._rival, self._keys = rival, partial(_keys, target, cache)

    @property
    def touched(self) -> float:
        return self._rival.touched

    def lists(self, part: Tensor, lengths: Tensor, *, sparse: bool) -> InForward | None:
        """For a round of tokens [1, T]."""
        return InForward(self._rival, self._keys(int(lengths) + part.shape[1]), lengths) if sparse else None


def begin(rival: Rival, target: LanguageModel, cache: KVCache, document: list[int]) -> Rival:
    """A copy of `rival` that has seen the document, which is cached; its state is that document's."""
    begun = replace(rival, touched=0.0)
    end = int(cache.lengths)
    begun.begin(_keys(target, cache, end), cache.lengths.clone())
    start = 0 if rival.window is None else max(end - rival.window, 0)
    cache.truncate(start)
    for part in torch.tensor([document[start:]]).split(OBSERVED, dim=1) if start < end else ():  # once more, for its queries
        queries = target.forward(part, cache, record_queries=True, logits=False).queries
        begun.observe(queries, _keys(target, cache, start + part.shape[1]), start)
        cache.advance(part.shape[1])
        start += part.shape[1]
    return begun


def _keys(target: LanguageModel, cache: KVCache, stop: int) -> Callable[[int], Tensor]:
    """keys(layer) [B, stop, Hkv, D], as attention reads them."""
    return lambda layer: dequantize(cache.keys(layer, stop), cache.key_scales[layer], target.spec.dtype)


def make_selector(
    case: Case,
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    map_name: str | None,
    draft_tokens: int,
    bits: int | None = None,
) -> Selector | Rival | None:
    """The selector of a case, or a rival; None for "dense".

    Raises OptionError for an unknown method or a missing alignment, and where keys in `bits` cannot be scored.
    """
    if case.method == DENSE:
        return None
    if case.method in RIVALS:
        return build_rival(case.method, _target(pair[0].spec), budget_of(case))
    if case.method not in SELECTORS:
        raise OptionError("method", case.method, ", ".join((DENSE, *SELECTORS, *RIVALS)))
    if alignments is None:
        raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair")
    alignment = alignments.map(map_name or SELECTORS[case.method].default_map).alignment
    return pair_selector(*pair, case.method, alignment, budget_of(case), draft_tokens, bits)


def _target(spec: ModelSpec) -> Target:
    shape = spec.full_shape
    return Target(
        layers=spec.full_layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scales=tuple(layer.scale for layer in spec.layers),
        value_bytes=spec.cache_dtype.itemsize,
    )


def budget_of(case: Case) -> Budget:
    """The case's budget, the default one when it names none."""
    return case.budget or Budget()


def tokenize(model: LanguageModel, name: str, text: str, least: int) -> list[int]:
    """The first `least` tokens of a text. Raises PromptError when it has fewer or the model has no tokenizer."""
    if model.tokenizer is None:
        raise PromptError(f"text {name}: {model.spec.name!r} has no tokenizer to read it with")
    tokens = model.tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < least:
        raise PromptError(f"text {name}: got {len(tokens)} tokens; allowed: at least {least} (the context asked for)")
    return tokens[:least]


def check_context(context: int, pair: tuple[LanguageModel, LanguageModel], least: int) -> None:
    """Raise OptionError unless `context` lies between `least` and what both models were made for."""
    limit = min(model.spec.context for model in pair)
    if not least <= context <= limit:
        raise OptionError("context", context, f"{least} .. {limit} tokens")
