"""Decode-like evaluation: a dense prefix, then given tokens in rounds, through the same stages as generation.

Every round feeds K + 1 given tokens to the draft, scores and selects as the engine does, and runs the target over the same
tokens with the lists. What the sparse target writes into its cache stays there for the next rounds, as in generation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.config import Budget, check
from outrider.decoding.pair import make_selector as pair_selector
from outrider.decoding.prefill import ProgressCallback, prefill
from outrider.decoding.scoring import score
from outrider.decoding.statistics import Listed, ReadCounter
from outrider.errors import OptionError, PromptError
from outrider.eval.rows import DENSE, Case
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.selectors import SELECTORS
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel
from outrider.models.cache import aligned
from outrider.models.quantized_keys import QuantizedKeys


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
        for model, cache in zip((self.target, self.draft), self.caches, strict=True):
            cache.truncate(0)
            prefill(model, cache, torch.tensor([tokens]), chunk, progress)

    def run(self, tokens: list[int], selector: Selector | None, min_context: int = 0) -> Run:
        """Predict behind each of `tokens`, which follow the cached document; the caches come back as they were."""
        target_cache, draft_cache = self.caches
        prefix = target_cache.lengths.clone()
        layers = selector.draft_layers if selector is not None else ()
        specs = self.target.spec, self.draft.spec
        counters = {t: ReadCounter(*specs, layers, t, self.bits) for t in {self.t, len(tokens) % self.t}}
        quantized: QuantizedKeys | None = None
        started = time.perf_counter()
        logits, kept, cached, read, dense = [], 0.0, 0, 0, 0
        for part in torch.tensor([tokens]).split(self.t, dim=1):
            lengths = target_cache.lengths.clone()
            selection = None
            if selector is not None:
                queries = self.draft.forward(part, draft_cache, record_queries=True, logits=False).queries
                if int(lengths) >= max(min_context, 1):
                    if self.bits is not None and quantized is None:
                        quantized = QuantizedKeys(self.draft, layers, self.bits, 1, draft_cache.capacity)
                        quantized.fill(draft_cache)
                    given = self.draft, draft_cache, queries, lengths, layers
                    selection = selector.select(score(*given, per_query=selector.per_query, quantized=quantized))
            logits.append(self.target.forward(part, target_cache, selection=selection).logits[0].float())
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
        return Run(
            logits=torch.cat(logits),
            kept_fraction=kept / max(cached, 1),
            kv_read_fraction=read / max(dense, 1),
            seconds=time.perf_counter() - started,
        )


def make_selector(
    case: Case,
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    map_name: str | None,
    draft_tokens: int,
    bits: int | None = None,
) -> Selector | None:
    """The selector of a case, None for "dense".

    Raises OptionError for an unknown method or a missing alignment, and where keys in `bits` cannot be scored.
    """
    if case.method == DENSE:
        return None
    check_method(case)
    if alignments is None:
        raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair")
    alignment = alignments.map(map_name or SELECTORS[case.method].default_map).alignment
    return pair_selector(*pair, case.method, alignment, budget_of(case), draft_tokens, bits)


def check_method(case: Case) -> None:
    """Raise OptionError for a method that nobody knows."""
    check("method", case.method, case.method in (DENSE, *SELECTORS), ", ".join((DENSE, *SELECTORS)))


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
