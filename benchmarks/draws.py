"""Are drawn texts distributed as the dense target's? Chi-square of many texts of two tokens, from a small vocabulary.

Lists hold one or two of the prompt's tokens, so the sparse target is another one, and which tokens they are depends on what was
drafted: mode sparse, counted beside, fails where mode exact must not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outrider.config import SamplingParams, engine_config
from outrider.decoding.outrider import Outrider
from outrider.decoding.pair import identity
from outrider.decoding.prefill import read_chunk
from outrider.decoding.sampling import Sampling, distributions
from outrider.decoding.statistics import total
from outrider.guidance.alignment import AlignmentFile, AlignmentMap
from outrider.models import KVCache, LanguageModel, wrap
from outrider.models.cache import aligned
from outrider.models.dummy import dummy_module
from outrider.types import Alignment

VOCABULARY, PROMPT = 12, 14
TINY = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
WIDE = 15.0  # times 0.02, the deviation of dummy weights: distributions are far from even
NOISE = 0.3  # of a draft that agrees in part: deviation added, as a share
STARVED = {"keep": 0.005, "sinks": 0, "recent": 0, "min_context": 0, "draft_recent": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How rounds are run."""

    name: str
    mode: str = "exact"
    noise: bool = False  # the draft has nothing to do with the target
    options: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting(name="one token listed, N = 1", options={"exact_every": 1}),
    Setting(name="one token listed, N = 2, 3 drafted", options={"exact_every": 2, "draft_tokens": 3}),
    Setting(name="one token listed, N = 64, draft of noise", noise=True, options={"exact_every": 64}),
    Setting(name="mode sparse, one token listed", mode="sparse"),
)


def count(draws: int, batch: int, device: torch.device, note: Callable[[str, int, int], None]) -> Iterator[dict[str, Any]]:
    """A row for each setting: chi-square of `draws` texts, and the chance p of a larger one if they are the dense target's."""
    target, agreeing, noise = _models(device)
    prompt = torch.randint(VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = draws * _expected(target, prompt)
    for done, setting in enumerate(SETTINGS):
        note("draws", done, len(SETTINGS))
        draft = noise if setting.noise else agreeing
        config = engine_config(
            mode=setting.mode, batch_size=batch, eager=True, **(STARVED | {"draft_tokens": 2} | setting.options)
        )
        engine = Outrider(target, draft, config, _alignment(target, draft), read=_ReadOnce())
        params = [SamplingParams(max_new_tokens=2, temperature=1.0, seed=seed) for seed in range(draws)]
        results = engine.generate([prompt] * draws, params)
        texts = torch.tensor([result.token_ids for result in results])
        seen = torch.bincount(texts[:, 0] * VOCABULARY + texts[:, 1], minlength=VOCABULARY**2).double()
        statistic, freedom = chi_square(seen, expected)
        counted = total([result.statistics for result in results])
        yield {
            "setting": setting.name,
            "draws": draws,
            "chi_square": statistic,
            "freedom": freedom,
            "p": p_value(statistic, freedom),
            "kept": counted.kept_fraction,
            "tentative": counted.tentative,
            "rolled_back": counted.rolled_back,
        }
    note("draws", len(SETTINGS), len(SETTINGS))


def chi_square(seen: Tensor, expected: Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; cells of fewer than five expected are one."""
    often = expected >= 5
    seen, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (seen, expected))
    filled = expected > 0
    if (seen[~filled] > 0).any():
        return float("inf"), int(filled.sum()) - 1
    return float(((seen - expected)[filled] ** 2 / expected[filled]).sum()), int(filled.sum()) - 1


def p_value(statistic: float, freedom: int) -> float:
    """The chance of a larger chi-square."""
    if statistic == float("inf"):
        return 0.0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2).double()))


def _models(device: torch.device) -> tuple[LanguageModel, LanguageModel, LanguageModel]:
    """A target, a draft that agrees in part, one that does not."""
    made = [dummy_module(TINY, dtype=torch.float32, device=device, seed=seed) for seed in (1, 1, 2)]
    generator = torch.Generator().manual_seed(3)
    for at, module in enumerate(made):
        for weights in module.parameters():
            if weights.dim() > 1:
                weights.mul_(WIDE)
                if at == 1:
                    weights.add_(NOISE * weights.std() * torch.randn(weights.shape, generator=generator).to(weights))
    target, agreeing, noise = (wrap(module, None, name=f"tiny {at}") for at, module in enumerate(made))
    return target, agreeing, noise


class _ReadOnce:
    """All texts continue the same prompt: a model reads it once, and its rows are copied."""

    def __init__(self) -> None:
        self._read: dict[int, KVCache] = {}

    def __call__(self, model: LanguageModel, cache: KVCache, tokens: Tensor, stop: int) -> None:
        if id(model) not in self._read:
            self._read[id(model)] = model.new_cache(1, aligned(stop))
            read_chunk(model, self._read[id(model)], tokens, stop)
        for layer in range(len(model.spec.layers)):
            cache.append(layer, *(rows(layer, stop) for rows in (self._read[id(model)].keys, self._read[id(model)].values)))
        cache.advance(stop)


def _expected(target: LanguageModel, prompt: list[int]) -> Tensor:
    """[V * V] fp64: the dense target's probability of each text of two tokens."""

    def after(texts: list[list[int]]) -> Tensor:
        logits = target.forward(torch.tensor(texts), target.new_cache(len(texts), 64)).logits[:, -1:]
        drawn = [SamplingParams(temperature=1.0)] * len(texts)
        return distributions(logits, Sampling.of(drawn, target.spec.device))[:, 0].cpu().double()

    return (after([prompt]).T * after([[*prompt, token] for token in range(VOCABULARY)])).flatten()


def _alignment(target: LanguageModel, draft: LanguageModel) -> AlignmentFile:
    """The draft's first head for every head of the target."""
    sources = torch.zeros(len(target.spec.layers), target.spec.full_shape.kv_heads, 1, 2, dtype=torch.int64)
    entry = AlignmentMap("joint", "divergence", Alignment(sources=sources), {})
    return AlignmentFile(
        target=identity(target),
        draft=identity(draft),
        text="",
        text_digest="",
        tokens=0,
        rounds=0,
        queries_per_round=1,
        keep=0.1,
        maps={entry.name: entry},
    )
