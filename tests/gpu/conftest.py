"""Tiny checkpoints on a GPU, and one speculative round on it, stage by stage.

Run by hand on a machine with a GPU: make test-gpu.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from outrider.config import Budget
from outrider.decoding.pair import make_selector
from outrider.decoding.prefill import prefill
from outrider.decoding.scoring import score
from outrider.guidance.selectors import SELECTORS
from outrider.models import KVCache, LanguageModel, wrap
from outrider.models.cache import aligned
from outrider.ops.backends import device_obstacle
from outrider.types import DraftScores, Selection

T = 4  # tokens of a round
# Head dims and heads that the kernels in CUDA C++ take, in 16 bits; the draft has fewer layers and narrower heads.
TARGET = {"hidden_size": 64, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
DRAFT = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(scope="session")
def gpu_pair(make_model: Callable[..., LanguageModel], device: torch.device) -> Callable[..., Any]:
    """`gpu_pair(dtype)`: a (target, draft) on the GPU."""
    made: dict[str, tuple[LanguageModel, LanguageModel]] = {}

    def move(model: LanguageModel) -> LanguageModel:
        return wrap(copy.deepcopy(model.module).to(device), None, name=model.spec.name)

    def make(dtype: str) -> tuple[LanguageModel, LanguageModel]:
        if dtype not in made:
            made[dtype] = (
                move(make_model("llama", 0, dtype, **TARGET)),
                move(make_model("llama", 9, dtype, **DRAFT)),
            )
        return made[dtype]

    return make


@pytest.fixture(scope="session", params=["auto", "triton", "cuda"])
def backend(request: pytest.FixtureRequest, method: str, device: torch.device) -> str:
    """Every choice that runs kernels for the method; those in CUDA C++ need a Hopper GPU and nvcc."""
    reason = device_obstacle(request.param, device)
    if (request.param, method) == ("cuda", "specattn"):
        reason = "attention_mass in CUDA C++ keeps no queries apart"
    if reason is not None:
        pytest.skip(reason)
    return request.param


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round under one backend, up to the verification."""

    target: LanguageModel
    target_cache: KVCache
    lengths: Tensor  # [B] on the host
    tokens: Tensor  # [B, T]
    scores: DraftScores
    selection: Selection

    def verify(self, selection: Selection) -> Tensor:
        """Logits of the target over the round's tokens [B, T, V]; the cache stays as long as it was."""
        return self.target.forward(self.tokens, self.target_cache, selection=selection).logits


@pytest.fixture(scope="session")
def begin_round(align: Callable[..., Any]) -> Callable[..., Round]:
    """`begin_round(pair, prompts, method, backend, **budget)`: prefill, run the draft over T tokens, score, select."""

    def begin(pair: Any, prompts: list[list[int]], method: str, backend: str, **budget: Any) -> Round:
        target, draft = (model.with_backend(backend) for model in pair)
        caches = [model.new_cache(len(prompts), aligned(max(map(len, prompts)))) for model in (target, draft)]
        for row, prompt in enumerate(prompts):
            for model, cache in zip((target, draft), caches, strict=True):
                prefill(model, cache.rows(row, row + 1), torch.tensor([prompt[:-T]]), 64)
        lengths = caches[0].lengths.clone()
        tokens = torch.tensor([prompt[-T:] for prompt in prompts])
        alignment = align(*pair).map(SELECTORS[method].default_map).alignment
        selector = make_selector(target, draft, method, alignment, Budget(**({"min_context": 8} | budget)), T - 1)
        queries = draft.forward(tokens, caches[1], record_queries=True).queries
        scores = score(draft, caches[1], queries, lengths, selector.draft_layers, per_query=selector.per_query)
        return Round(
            target=target,
            target_cache=caches[0],
            lengths=lengths,
            tokens=tokens,
            scores=scores,
            selection=selector.select(scores),
        )

    return begin
