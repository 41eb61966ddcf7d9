"""Prompts read as others have published it, whole: the models run here, what is computed is in `guidance/prefill_rivals`.

    token-sparse     in the layers that change hidden states least, every head attends among tokens of its own
    vertical-slash   every head reads columns and slashes, as the prompt's last queries show them
    spec-prefill     the draft chooses tokens, and the target reads these alone

A new method is a reader here and one line in `READERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.config import EngineConfig, check, check_share
from outrider.decoding.guides import cached_keys, cached_values
from outrider.decoding.sparse_prefill import no_clock
from outrider.errors import OptionError
from outrider.guidance.prefill_rivals import Prompt, TokenSparse, VerticalSlash, sparse_layers
from outrider.guidance.prefill_rivals.spec_prefill import LOOKAHEAD, kept_chunks, token_importance
from outrider.models import KVCache, LanguageModel
from outrider.models.drift import hidden_drift
from outrider.ops import attention_mass
from outrider.types import KeptShare, Stage

CALIBRATED = 131072  # tokens of a prompt that sparse layers are found on, at most, as published


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTokens:
    """What was kept of whole prompts. A `KeptShare`."""

    listed: Tensor  # [B] fp64: tokens kept, averaged over layers and heads
    tokens: int  # of a prompt

    def before(self, start: int, stop: int) -> int:
        """All tokens of the prompt."""
        return self.tokens


class WholePrompt(ABC):
    """A `PromptReader` that reads a prompt at once."""

    whole, drafts, ahead = True, False, 0

    def __init__(self, target: LanguageModel, draft: LanguageModel, config: EngineConfig, keep: float) -> None:
        """Keeps the share `keep`. Raises OptionError for one that is none, and for models that a method cannot serve."""
        check_share("keep", keep)
        self.keep, self.block, self.min_context = keep, config.prefill_block, config.prefill_min_context
        self.chunk = config.prefill_chunk  # of what is read densely
        self.check(draft if self.drafts else target)

    def check(self, model: LanguageModel) -> None:
        """Raise OptionError unless the model whose attention chooses can look at all of a prompt somewhere."""
        if not model.spec.full_layers:
            raise OptionError("model", model.spec.name, "one with layers of full attention, for a method that chooses by it")

    def read(
        self,
        rows: list[tuple[LanguageModel, KVCache]],
        tokens: Tensor,
        stop: int,
        *,
        logits: bool = False,
        last: int | None = None,
        stage: Stage = no_clock,
    ) -> tuple[Tensor, KeptShare]:
        """See `PromptReader.read`. Raises OptionError for tokens that are a part of a prompt."""
        check("prefill-chunk", tokens.shape[1], tokens.shape[1] == stop, f"the whole prompt at once, {stop} tokens")
        return self._read(rows, tokens, logits, last, stage)

    @abstractmethod
    def _read(
        self, rows: list[tuple[LanguageModel, KVCache]], tokens: Tensor, logits: bool, last: int | None, stage: Stage
    ) -> tuple[Tensor, KeptShare]:
        """`read` of whole prompts `tokens` [B, T]."""


def prompt_of(target: LanguageModel, cache: KVCache, tokens: int, stage: Stage) -> Prompt:
    """The target's forward over `tokens` tokens as far as a method inside it knows it."""
    return Prompt(
        layers=target.spec.full_layers,
        scales=tuple(layer.scale for layer in target.spec.layers),
        keys=cached_keys(target, cache, tokens),
        values=cached_values(target, cache, tokens),
        stage=stage,
        backend="auto" if target.backend == "cuda" else target.backend,  # the ops over prompts have no kernel in CUDA C++
    )


class TokenSparseReader(WholePrompt):
    """Method `token-sparse`, see `TokenSparse`. Its sparse layers are found once, on the first prompt it reads, up to 131,072
    tokens: the paper takes a prompt of that length. That is a dense reading more, outside of all stages."""

    def __init__(self, target: LanguageModel, draft: LanguageModel, config: EngineConfig, keep: float) -> None:
        super().__init__(target, draft, config, keep)
        self.layers: tuple[int, ...] | None = None  # sparse ones; None: not known yet

    def _read(
        self, rows: list[tuple[LanguageModel, KVCache]], tokens: Tensor, logits: bool, last: int | None, stage: Stage
    ) -> tuple[Tensor, KeptShare]:
        target, cache = rows[0]
        (b, t), spec = tokens.shape, target.spec
        if self.layers is None:
            self.layers = sparse_layers(hidden_drift(target, cache, tokens[:, :CALIBRATED], self.chunk), spec.full_layers)
        method = TokenSparse(prompt_of(target, cache, t, stage), self.layers, self.keep)
        with stage("target"):
            output = target.forward(tokens, cache, stop=t, selection=method, logits=logits, last=last)
        cache.advance(t)
        kept = torch.full((b,), method.mean_count(t), dtype=torch.float64, device=spec.device)
        return output.logits, KeptTokens(listed=kept, tokens=t)


class VerticalSlashReader(WholePrompt):
    """Method `vertical-slash`, see `VerticalSlash`."""

    def _read(
        self, rows: list[tuple[LanguageModel, KVCache]], tokens: Tensor, logits: bool, last: int | None, stage: Stage
    ) -> tuple[Tensor, KeptShare]:
        target, cache = rows[0]
        t = tokens.shape[1]
        method = VerticalSlash(prompt_of(target, cache, t, stage), self.block, self.keep)
        with stage("target"):
            output = target.forward(tokens, cache, stop=t, selection=method, logits=logits, last=last)
        cache.advance(t)
        return output.logits, method


class SpecPrefillReader(WholePrompt):
    """Method `spec-prefill`: the draft reads the prompt and writes 8 tokens behind it; what these look at, in chunks of 32
    tokens, is all that the target reads, at its own place in the text (`kept_chunks`).

    The target's cache holds the kept tokens alone afterwards, and only the last token has a prediction. Windows of layers that
    have some count kept tokens. Both models read densely, a chunk at a time, which changes nothing.
    """

    drafts, ahead = True, LOOKAHEAD

    def _read(
        self, rows: list[tuple[LanguageModel, KVCache]], tokens: Tensor, logits: bool, last: int | None, stage: Stage
    ) -> tuple[Tensor, KeptShare]:
        (target, cache), (draft, draft_cache) = rows
        t = tokens.shape[1]
        with stage("draft"):
            queries = self._look_ahead(draft, draft_cache, tokens)
        with stage("score"):
            importance = token_importance(_masses(draft, draft_cache, queries, t))
        with stage("select"):
            kept = kept_chunks(importance, self.keep)  # [B, n]
        n = kept.shape[1]
        with stage("target"):
            parts, starts = tokens.to(kept.device).gather(1, kept).split(self.chunk, 1), range(0, n, self.chunk)
            for start, part, positions in zip(starts, parts, kept.split(self.chunk, 1), strict=True):
                stop = start + part.shape[1]
                wanted = logits and stop == n
                output = target.forward(part, cache, stop=stop, positions=positions, logits=wanted, last=1 if wanted else None)
                cache.advance(part.shape[1])
        listed = torch.full((len(kept),), n, dtype=torch.float64, device=kept.device)
        return output.logits, KeptTokens(listed=listed, tokens=t)

    def _look_ahead(self, draft: LanguageModel, cache: KVCache, tokens: Tensor) -> tuple[Tensor, ...]:
        """Read the prompt [B, T] and write `LOOKAHEAD` tokens behind it, greedily; their queries by layer [B, Q, Hq, D]. Their
        keys lie behind the T that the cache holds."""
        known = tokens.clamp(max=draft.spec.vocabulary - 1)  # a draft narrower than the target's vocabulary: see propose
        t = tokens.shape[1]
        for start in range(0, t, self.chunk):
            part = known[:, start : start + self.chunk]
            stop = start + part.shape[1]
            output = draft.forward(part, cache, stop=stop, logits=stop == t, last=1 if stop == t else None)
            cache.advance(part.shape[1])
        found = []
        for step in range(self.ahead):
            token = output.logits[:, -1:].argmax(-1)
            output = draft.forward(token, cache, stop=t + step + 1, record_queries=True)
            cache.advance(1)
            found.append(output.queries)
        cache.truncate(t)
        return tuple(torch.cat(steps, 1) for steps in zip(*found, strict=True))


def _masses(draft: LanguageModel, cache: KVCache, queries: tuple[Tensor, ...], t: int) -> Iterator[Tensor]:
    """Of each layer with full attention the mass [B, Q, Hq, T] of the lookahead's queries, by layer [B, Q, Hq, D]."""
    for layer in draft.spec.full_layers:
        yield attention_mass(
            queries[layer],
            cache.keys(layer, t + queries[layer].shape[1]),
            cache.lengths,
            scale=draft.spec.layers[layer].scale,
            reduce="none",
            key_scale=cache.key_scales[layer],
            backend=draft.backend,
        )[..., :t]


READERS: dict[str, type[WholePrompt]] = {
    "token-sparse": TokenSparseReader,
    "vertical-slash": VerticalSlashReader,
    "spec-prefill": SpecPrefillReader,
}
