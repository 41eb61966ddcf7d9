"""Calibrate: run both models over a short text and learn which draft heads show what each target head reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from outrider.config import Budget, check
from outrider.decoding.list_costs import measure
from outrider.decoding.pair import identity
from outrider.decoding.prefill import ProgressCallback
from outrider.decoding.unlisted import fit_unlisted
from outrider.errors import PromptError
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.calibration import Calibration
from outrider.guidance.head_map import HEAD_MAPS
from outrider.guidance.layer_map import LAYER_MAPS
from outrider.guidance.selectors.outrider import Outrider
from outrider.models import KVCache, LanguageModel
from outrider.models.attention import ROUND
from outrider.ops import attention_mass

DEFAULT_MAPS = ("joint+divergence", "proportional+jaccard", "monotone+average")  # of outrider, sts and specattn
ROUNDS_AT_ONCE = 16  # rounds scored in one call: bounds the memory of large models


def calibrate(
    target: LanguageModel,
    draft: LanguageModel,
    text: str,
    *,
    text_name: str,
    maps: tuple[str, ...] = DEFAULT_MAPS,
    tokens: int = 4096,
    rounds: int = 96,
    queries_per_round: int = 5,
    keep: float = 0.05,
    budget_rounds: int = 32,
    prefill_chunk: int = 2048,
    progress: ProgressCallback | None = None,
) -> AlignmentFile:
    """Fit alignment maps ("joint+divergence", "monotone+average", ...) on the first `tokens` tokens of a text.

    Scores `rounds` rounds of `queries_per_round` consecutive query rows, spread evenly over the text behind its first eighth;
    recall is measured for lists of the share `keep`. What stands for unlisted tokens is fitted on the same rounds. If the map
    of method outrider is among the maps, at most `budget_rounds` of the rounds tell what its lists cost by layer and head (0:
    nobody asks). Raises, before any work, OptionError for unknown maps or numbers out of range and PromptError for a text that
    is too short.
    """
    pairs = [_split(name) for name in maps]
    check("keep", keep, 0 < keep <= 1, "a number in (0, 1]")
    check("rounds", rounds, rounds >= 2, "a whole number >= 2")
    check("budget-rounds", budget_rounds, budget_rounds >= 0, "a whole number >= 0")
    most = ROUND if budget_rounds else tokens
    check("queries-per-round", queries_per_round, 1 <= queries_per_round <= most, f"1 .. {most} (where budgets are measured)")
    limit = min(target.spec.context, draft.spec.context)
    least = 4 * rounds * queries_per_round // 3 + 8
    check("tokens", tokens, least <= tokens <= limit, f"{least} (for {rounds} rounds) .. {limit} (the context of the pair)")
    if target.tokenizer is None:
        raise PromptError(
            f"text: {target.spec.name!r} has no tokenizer to read it with; allowed: a checkpoint with a tokenizer"
        )
    ids = target.tokenizer(text, verbose=False)["input_ids"][:tokens]
    if len(ids) < tokens:
        raise PromptError(f"text {text_name}: got {len(ids)} tokens; allowed: at least --tokens {tokens}")

    starts = torch.linspace(tokens // 8, tokens - queries_per_round, rounds).long()
    sequence = torch.tensor([ids])
    seen = {
        name: _queries(model, name, sequence, starts, queries_per_round, prefill_chunk, progress)
        for name, model in (("draft", draft), ("target", target))
    }
    draft_layers, budget = draft.spec.full_layers, Budget()
    draft_mass = torch.stack([_mass(draft, *seen["draft"], starts, layer) for layer in draft_layers], dim=1)
    calibration = Calibration(
        draft_mass,
        starts,
        num_target_layers=len(target.spec.layers),
        kv_heads=target.spec.full_shape.kv_heads,
        keep=keep,
        sinks=budget.sinks,
        recent=budget.recent,
        draft_layers=draft_layers,
    )
    for done, layer in enumerate(target.spec.full_layers, start=1):
        calibration.add_target_layer(layer, _mass(target, *seen["target"], starts, layer))
        if progress is not None:
            progress("compare layers", done, len(target.spec.full_layers))
    fitted = {name: calibration.fit(*pair) for name, pair in zip(maps, pairs, strict=True)}
    alignments = fit_unlisted(target, draft, {name: one.alignment for name, one in fitted.items()}, seen, starts, progress)
    fitted = {name: replace(one, alignment=alignments[name]) for name, one in fitted.items()}
    if budget_rounds and Outrider.default_map in fitted:
        found = fitted[Outrider.default_map]
        chosen = torch.linspace(0, rounds - 1, min(rounds, budget_rounds)).round().long()
        cache, queries = seen["target"]
        costs = measure(
            target,
            draft.spec,
            found.alignment,
            cache,
            sequence,
            starts[chosen].tolist(),
            [layer[chosen.to(layer.device)] for layer in queries],
            draft_mass[chosen.to(draft_mass.device)],
            progress,
        )
        fitted[Outrider.default_map] = replace(found, alignment=replace(found.alignment, costs=costs))
    return AlignmentFile(
        target=identity(target),
        draft=identity(draft),
        text=text_name,
        text_digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        tokens=tokens,
        rounds=rounds,
        queries_per_round=queries_per_round,
        keep=keep,
        maps=fitted,
    )


def _split(name: str) -> tuple[str, str]:
    layer_map, _, head_map = name.partition("+")
    allowed = [f"{a}+{b}" for a in LAYER_MAPS for b in HEAD_MAPS]
    check("maps", name, name in allowed, ", ".join(allowed))
    return layer_map, head_map


def _queries(
    model: LanguageModel, name: str, tokens: Tensor, starts: Tensor, t: int, chunk: int, progress: ProgressCallback | None
) -> tuple[KVCache, list[Tensor]]:
    """Run the text densely; returns the cache and, per layer, the queries of every round [N, T, Hq, D]."""
    cache = model.new_cache(1, tokens.shape[1])
    wanted = (starts[:, None] + torch.arange(t)).flatten()  # ascending positions
    found: list[list[Tensor]] = [[] for _ in model.spec.layers]
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start : start + chunk]
        queries = model.forward(part, cache, record_queries=True, logits=False).queries
        cache.advance(part.shape[1])
        here = wanted[(wanted >= start) & (wanted < start + part.shape[1])] - start
        for layer, rows in zip(found, queries, strict=True):
            layer.append(rows[0, here.to(rows.device)])
        if progress is not None:
            progress(f"read text with the {name}", start + part.shape[1], tokens.shape[1])
    return cache, [torch.cat(rows).unflatten(0, (-1, t)) for rows in found]


def _mass(model: LanguageModel, cache: KVCache, queries: list[Tensor], starts: Tensor, layer: int) -> Tensor:
    """Mean softmax mass of every round on every token before it: [N, Hq, S] fp32."""
    n, t = queries[layer].shape[:2]
    s = int(starts.max())
    keys = cache.keys(layer, s + t).expand(n, -1, -1, -1)
    lengths = starts.to(keys.device)
    scale = model.spec.layers[layer].scale

    def parts() -> Iterator[Tensor]:
        for at in range(0, n, ROUNDS_AT_ONCE):
            some = slice(at, at + ROUNDS_AT_ONCE)
            rows = queries[layer][some], keys[some], lengths[some]
            yield attention_mass(*rows, scale=scale, key_scale=cache.key_scales[layer], backend=model.backend)[..., :s]

    return torch.cat(list(parts()))
