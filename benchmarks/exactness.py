"""Is the text of mode exact the dense target's own? Many tokens of the built-in pair, under settings that make it hard.

Greedy text is compared with that of the target alone. Sampled text is a function of prompt, seed and dense target (see
`decoding/noise.py`), so it is compared with that of other settings: rounds that read everything, one token confirmed at a time.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from outrider.config import SamplingParams, engine_config
from outrider.decoding.outrider import Outrider, Result
from outrider.decoding.prefill import prefill
from outrider.decoding.statistics import total
from outrider.models import LanguageModel, wrap
from outrider.models.cache import aligned

CHUNK = 2048
TEMPERATURE = 0.8
SLOW = 8
Note = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How rounds of mode exact are run."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    noise: bool = False  # the draft's weights are noise
    sampled: bool = False
    slow: bool = False  # most tokens are rolled back, or the text to compare with is slow: every `SLOW`-th prompt has to do


STARVED = {"keep": 0.005, "sinks": 0, "recent": 0, "draft_recent": 8}
SETTINGS = (
    Setting(name="10% kept, N by agreement"),
    Setting(name="10% kept, N by agreement, 8 drafted", options={"draft_tokens": 8}),
    Setting(name="0.5% kept, N = 1", options=STARVED | {"exact_every": 1}),
    Setting(name="0.5% kept, N = 64", options=STARVED | {"exact_every": 64}, slow=True),
    Setting(name="0.5% kept, N = 16, draft of noise", options=STARVED | {"exact_every": 16}, noise=True, slow=True),
    Setting(name="0.5% kept, N = 7, sampled", options=STARVED | {"exact_every": 7}, sampled=True, slow=True),
)
EVERYTHING = {"keep": 1.0, "draft_tokens": 1, "exact_every": 1}  # what sampled text is compared with


def compare(loaded: Outrider, prompts: list[list[int]], tokens: int, batch: int, note: Note) -> Iterator[dict[str, Any]]:
    """A row for each setting: `tokens` behind every prompt, `batch` prompts at a time, by the pair that is `loaded`."""
    known: dict[bool, list[Result]] = {}
    for done, setting in enumerate(SETTINGS):
        note("exactness", done, len(SETTINGS))
        some = slice(None, None, SLOW if setting.slow else 1)
        temperature = TEMPERATURE if setting.sampled else 0.0
        params = [
            SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=temperature, seed=i) for i in range(len(prompts))
        ]
        if setting.sampled not in known:
            alone = {"mode": "exact"} | EVERYTHING if setting.sampled else {"mode": "plain"}
            given = some if setting.sampled else slice(None)
            known[setting.sampled] = _engine(loaded, loaded.draft, batch, **alone).generate(prompts[given], params[given])
        draft = of_noise(loaded.draft) if setting.noise else loaded.draft
        engine = _engine(loaded, draft, batch, mode="exact", **setting.options)
        began = time.perf_counter()
        found = engine.generate(prompts[some], params[some])
        wanted = known[setting.sampled] if setting.sampled else known[False][some]
        yield _row(setting, loaded.target, prompts[some], found, wanted, time.perf_counter() - began)
    note("exactness", len(SETTINGS), len(SETTINGS))


def of_noise(draft: LanguageModel) -> LanguageModel:
    """The same shapes, every matrix drawn anew: nothing that it drafts or looks at has to do with the text."""
    module = copy.deepcopy(draft.module)
    generator = torch.Generator().manual_seed(0)
    for weights in module.parameters():
        if weights.dim() > 1:
            noise = torch.randn(weights.shape, generator=generator).to(weights)
            weights.data.copy_(noise * weights.std())
    return wrap(module, draft.tokenizer, name=draft.spec.name)


def _engine(loaded: Outrider, draft: LanguageModel, batch: int, **options: Any) -> Outrider:
    return Outrider(loaded.target, draft, engine_config(batch_size=batch, **options), loaded.alignments)


def _row(
    setting: Setting, target: LanguageModel, prompts: list[list[int]], found: list[Result], wanted: list[Result], seconds: float
) -> dict[str, Any]:
    parted = []  # texts that are not the same: from which token on, and how decided the target was there
    for prompt, one, other in zip(prompts, found, wanted, strict=True):
        assert one.error is None and other.error is None, one.error or other.error
        if one.token_ids != other.token_ids:
            at = next(i for i, (x, y) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if x != y)
            parted.append({"at": at, "gap": _gap(target, [*prompt, *one.token_ids[:at]])})
    counted = total([result.statistics for result in found])
    generated = counted.generated_tokens
    return {
        "setting": setting.name,
        "texts": len(prompts),
        "tokens": generated,
        "identical": generated - sum(len(wanted[0].token_ids) - one["at"] for one in parted),
        "parted": parted,
        "kept": counted.kept_fraction,
        "accepted_per_round": counted.accepted_per_round,
        "tentative": counted.tentative,
        "rolled_back": counted.rolled_back,
        "confirmations": counted.confirmations,
        "seconds": seconds,
    }


def _gap(target: LanguageModel, text: list[int]) -> float:
    """By how much the most probable token's logit leads behind a text."""
    cache = target.new_cache(1, aligned(len(text)))
    prefill(target, cache, torch.tensor([text[:-1]]), CHUNK)
    first, second = target.forward(torch.tensor([text[-1:]]), cache).logits[0, 0].double().topk(2).values.tolist()
    return first - second
