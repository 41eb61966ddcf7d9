"""How well the draft drafts by what it reads: given a text, how often its choice is the dense target's.

Rounds as in decoding, but with the text's own tokens in place of drafted ones, so that every budget is asked about the same
positions. In free running, texts part and repeat themselves, and acceptance compares different texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.config import EngineConfig
from outrider.decoding.drafting import DraftLists
from outrider.decoding.guidance import make_guidance
from outrider.decoding.prefill import prefill
from outrider.decoding.scoring import score
from outrider.models import LanguageModel
from outrider.models.cache import aligned

CHUNK = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the draft reads; `keep` None: all."""

    keep: float | None = None
    recent: int = 0

    @property
    def name(self) -> str:
        return "dense" if self.keep is None else f"{100 * self.keep:g}% and {self.recent} recent"


READINGS = (
    Reading(),
    *(Reading(keep=keep, recent=recent) for keep in (0.02, 0.05, 0.1) for recent in (64, 512)),
)


def compare(
    pair: tuple[LanguageModel, LanguageModel],
    tokens: list[int],
    scored: int,
    draft_tokens: int,
    note: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """A row for each reading: agreement over the last `scored` of `tokens`, and by position in the round."""
    target, draft = pair
    start = len(tokens) - scored
    given = torch.tensor([tokens])
    wanted = _choices(target, given, start)
    cache = draft.new_cache(1, aligned(len(tokens) + 2 * (draft_tokens + 1)))
    prefill(draft, cache, given[:, :start].clamp(max=draft.spec.vocabulary - 1), CHUNK)
    rows = []
    for done, reading in enumerate(READINGS):
        note("drafting", done, len(READINGS))
        cache.truncate(torch.full_like(cache.lengths, start).clamp(max=cache.lengths))
        same = _drafted(pair, cache, given[:, start:], reading, draft_tokens) == wanted
        positions = [float(same[at :: draft_tokens + 1].double().mean()) for at in range(draft_tokens)]
        rows.append({"reads": reading.name, "agreement": float(same.double().mean()), "by_position": positions})
    note("drafting", len(READINGS), len(READINGS))
    return rows


def _choices(target: LanguageModel, given: Tensor, start: int) -> Tensor:
    """The dense target's most probable token behind each of the tokens from `start` on."""
    cache = target.new_cache(1, aligned(given.shape[1]))
    prefill(target, cache, given[:, :start], CHUNK)
    found = []
    for part in given[:, start:].split(CHUNK, dim=1):
        found.append(target.forward(part, cache).logits[0].argmax(-1))
        cache.advance(part.shape[1])
    return torch.cat(found).cpu()


def _drafted(pair: tuple[LanguageModel, LanguageModel], cache, following: Tensor, reading: Reading, k: int) -> Tensor:
    """The draft's most probable token behind each of `following` [1, n]; the cache holds what comes before them."""
    target, draft = pair
    if reading.keep is None:
        logits = draft.forward(following, cache).logits[0]
        return logits[:, : target.spec.vocabulary].argmax(-1).cpu()
    config = EngineConfig(mode="dense", drafting="sparse", draft_keep=reading.keep, draft_recent=reading.recent, draft_tokens=k)
    guidance = make_guidance(target, draft, config, None)
    lists = DraftLists(draft.spec, config.draft_budget, 1, cache.capacity, k)
    lists.begin(cache.lengths)
    found = []
    for part in following.split(k + 1, dim=1):
        before, queries = cache.lengths.clone(), []
        for step in range(part.shape[1]):
            output = draft.forward(
                part[:, step : step + 1], cache, selection=lists.steps(cache.lengths, 1)[0], record_queries=True
            )
            cache.advance(1)
            queries.append(output.queries)
            found.append(output.logits[0, :, : target.spec.vocabulary].argmax(-1))
        layers = tuple(torch.cat(layer, dim=1) for layer in zip(*queries, strict=True))
        scores = score(draft, cache, layers, before, guidance.layers, per_query=False)
        lists.replace(guidance.draft.select(scores))
    return torch.cat(found).cpu()
