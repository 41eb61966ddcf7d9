"""Models without a checkpoint: the shapes of a config and weights of noise. They run as fast as real ones and say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from outrider.models.attention import NAME, register
from outrider.models.language_model import LanguageModel
from outrider.models.loading import wrap
from outrider.models.ranks import ALONE, Ranks
from outrider.models.sharding import shard


def dummy_model(
    config: Mapping[str, Any], *, name: str, dtype: torch.dtype, device: torch.device, seed: int = 0, ranks: Ranks = ALONE
) -> LanguageModel:
    """A model of `config`, the content of a config.json, or this rank's part of it, with noise for weights and no tokenizer."""
    module = dummy_module(config, dtype=dtype, device=device, seed=seed)
    shard(module, ranks, name)
    return wrap(module, None, name=name, ranks=ranks)


def dummy_module(
    config: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device, attention: str = NAME, seed: int = 0
) -> Any:
    """transformers' own module of `config`, with transformers' attention function `attention`.

    Weights are made on the device, so that billions take seconds: matrices are normal, of deviation 0.02, all else is one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    with torch.device("meta"):
        shapes = AutoConfig.for_model(**config)
        module = AutoModelForCausalLM.from_config(shapes, attn_implementation=attention, dtype=dtype)
    module = module.to_empty(device=device).eval().requires_grad_(False)
    noise = torch.Generator(device).manual_seed(seed)
    for weights in module.parameters():
        weights.normal_(0, 0.02, generator=noise) if weights.dim() > 1 else weights.fill_(1)
    decoder = module.get_decoder()
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(module.config)  # its frequencies are no parameters
    if module.config.tie_word_embeddings:
        module.tie_weights()  # moving away from the meta device has parted them
    return module
