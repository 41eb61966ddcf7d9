"""Load a checkpoint from a folder or hub id, and find out how its attention layers look by running two tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outrider.config import DTYPES, check
from outrider.errors import ModelError, OutriderError, PairError
from outrider.models.attention import NAME, Forward, register
from outrider.models.cache import KVCache, LayerShape
from outrider.models.language_model import LanguageModel, ModelSpec, check_backend
from outrider.models.quantization import check_kv_dtype
from outrider.models.ranks import ALONE, Ranks
from outrider.models.sharding import check_shards, shard

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


def load_model(
    path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str = "auto",
    kv_dtype: str = "auto",
    role: str = "model",
    ranks: Ranks = ALONE,
) -> LanguageModel:
    """Load a decoder-only checkpoint that transformers can run with a custom attention function.

    `path` is a folder or a hub id, `role` ("target" or "draft") names the option in errors. With several `ranks` this one keeps
    its part of the weights. Raises OptionError for a dtype, device, backend or kv_dtype that is unknown or cannot be had here,
    and for heads that cannot be shared among the ranks, ModelError for a checkpoint that is missing, broken, or whose attention
    cannot be routed through Outrider.
    """
    check("dtype", dtype, dtype in DTYPES, ", ".join(DTYPES))
    _check_device(device)
    check_backend(backend, torch.device(device))
    check_kv_dtype(kv_dtype, torch.device(device), getattr(torch, dtype))
    if not Path(path).exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        raise ModelError(f"{role} {path!r}: no such folder; allowed: a folder that exists, or a hub id such as org/name")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    register()
    logging.disable_progress_bar()
    try:
        if ranks.size > 1:
            check_shards(AutoConfig.from_pretrained(path), ranks, f"{role} {path!r}")
        module = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation=NAME)
    except OutriderError:
        raise
    except Exception as error:  # transformers raises many types here; each becomes one clear error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"{role} {path!r}: cannot be loaded with attention routed through Outrider: {reason}") from error
    shard(module, ranks, f"{role} {path!r}")
    tokenizer, name = _load_tokenizer(path), model_name(path)
    model = wrap(module.eval().to(device), tokenizer, name=name, backend=backend, role=role, ranks=ranks)
    return model.with_kv_dtype(kv_dtype)


def wrap(
    module: Any,
    tokenizer: Any | None,
    *,
    name: str,
    backend: str = "auto",
    role: str = "model",
    ranks: Ranks = ALONE,
) -> LanguageModel:
    """Make a `LanguageModel` of a transformers module that was created with attn_implementation="outrider".

    With several `ranks` the module is what `shard` has left of it.
    """
    config = module.config.get_text_config(decoder=True)
    layers = _probe(module, config, f"{role} {name!r}")
    eos = module.generation_config.eos_token_id if module.generation_config is not None else None
    eos = config.eos_token_id if eos is None else eos
    spec = ModelSpec(
        name=name,
        digest="",
        layers=layers,
        vocabulary=config.vocab_size,
        context=_context(config),
        eos_tokens=_as_tuple(eos),
        dtype=next(module.parameters()).dtype,
        device=next(module.parameters()).device,
        ranks=ranks.size,
    )
    spec = replace(spec, digest=config_digest(config, spec.whole.layers))
    return LanguageModel(module, tokenizer, spec, backend, ranks=ranks)


def _as_tuple(tokens: int | list[int] | None) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return (tokens,) if isinstance(tokens, int) else tuple(tokens)


def model_name(path: str) -> str:
    """The folder's own name, or the hub id as given."""
    return Path(path).resolve().name if Path(path).exists() else path


def config_digest(config: Any, layers: tuple[LayerShape, ...]) -> str:
    """A digest of the architecture that does not depend on the version of transformers."""
    shape = [[x.query_heads, x.kv_heads, x.head_dim, x.window] for x in layers]
    facts = [config.model_type, config.vocab_size, config.hidden_size, getattr(config, "intermediate_size", None), shape]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def check_pair(target: LanguageModel, draft: LanguageModel) -> None:
    """Raise PairError unless both models speak the same tokens; names the first token that differs."""
    if target.tokenizer is None or draft.tokenizer is None:
        if target.spec.vocabulary != draft.spec.vocabulary:
            sizes = f"{target.spec.vocabulary} (target) and {draft.spec.vocabulary} (draft)"
            raise PairError(f"draft: vocabulary sizes {sizes} differ; allowed: a draft with the target's vocabulary")
        return
    ours = {index: token for token, index in target.tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in draft.tokenizer.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            raise PairError(
                f"draft: token {index} is {theirs.get(index)!r} in draft {draft.spec.name!r} but {ours.get(index)!r} in target "
                f"{target.spec.name!r}; allowed: a draft with the target's vocabulary"
            )


def _probe(module: nn.Module, config: Any, what: str) -> tuple[LayerShape, ...]:
    """Run two tokens and read every layer's shape off its attention call."""
    unknown = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if unknown:
        raise ModelError(f"{what}: layer types {sorted(unknown)} cannot be routed; allowed: {sorted(SUPPORTED_LAYERS)}")
    found: dict[int, LayerShape] = {}
    device = next(module.parameters()).device
    empty = KVCache(
        (LayerShape(query_heads=1, kv_heads=1, head_dim=1, scale=1.0, window=None),), 1, 1, dtype=torch.float32, device=device
    )
    forward = Forward(cache=empty, stop=2, probe=found)
    with torch.inference_mode():
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
        try:
            module(input_ids=tokens, position_ids=torch.arange(2, device=device)[None], use_cache=False, outrider=forward)
        except Exception as error:  # whatever a model without AttentionInterface stumbles over
            raise ModelError(f"{what} ({config.model_type}): cannot be routed through Outrider: {error!s}") from error
    missing = sorted(set(range(config.num_hidden_layers)) - set(found))
    if missing:
        raise ModelError(
            f"{what} ({config.model_type}): layers {missing} did not call the routed attention function; allowed: models whose "
            "every layer uses transformers' AttentionInterface"
        )
    return tuple(found[i] for i in range(config.num_hidden_layers))


def _context(config: Any) -> int:
    """Tokens the model can hold. "longrope" is cut to its original length: past it, transformers rotates queries and keys by
    other frequencies, and a cache filled before would not fit them."""
    context = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    return min(context, rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else context


def _load_tokenizer(path: str) -> Any | None:
    """The checkpoint's tokenizer, or None when it ships none (then prompts must be token ids)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # some families get a tokenizer of special tokens alone when there is no file to read
    return tokenizer if tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens) else None


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    ok = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    check("device", device, ok, "cpu" + (", cuda" if torch.cuda.is_available() else " (no CUDA GPU is visible here)"))
