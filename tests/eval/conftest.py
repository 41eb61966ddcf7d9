"""A tiny random pair with a byte-level tokenizer, and an alignment fitted to nothing in particular."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from outrider.guidance.alignment import AlignmentFile, AlignmentMap, ModelIdentity
from outrider.models import LanguageModel, wrap
from outrider.models.attention import NAME, register
from outrider.types import Alignment

MAPS = {"joint+divergence": (2, 2), "proportional+jaccard": (4, 1), "monotone+average": (1, 3)}  # Hs, G of the target's 4 heads


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny(name: str, layers: int, width: int, heads: int, kv_heads: int, head_dim: int, seed: int) -> LanguageModel:
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    register()
    torch.manual_seed(seed)
    module = Qwen3ForCausalLM._from_config(config, attn_implementation=NAME).eval()
    return wrap(module, byte_tokenizer(), name=name)


@pytest.fixture(scope="session")
def pair() -> tuple[LanguageModel, LanguageModel]:
    return tiny("tiny-target", 3, 48, 4, 2, 16, 0), tiny("tiny-draft", 2, 32, 3, 1, 8, 1)


@pytest.fixture(scope="session")
def alignments(pair: tuple[LanguageModel, LanguageModel]) -> AlignmentFile:
    generator = torch.Generator().manual_seed(0)
    maps = {}
    for name, (heads, merged) in MAPS.items():
        layer_map, head_map = name.split("+")
        # every row of a target layer takes heads of one draft layer, as all three maps may
        draft_layers = torch.randint(2, (3, 1, 1), generator=generator).expand(3, heads, merged)
        draft_heads = torch.randint(3, (3, heads, merged), generator=generator)
        if head_map == "average":
            draft_heads = torch.arange(3).expand(3, 1, 3)
        sources = torch.stack((draft_layers, draft_heads), dim=-1).clone()
        maps[name] = AlignmentMap(layer_map, head_map, Alignment(sources=sources), {"recall": 0.5})
    identities = [ModelIdentity(model.spec.name, model.spec.digest) for model in pair]
    return AlignmentFile(*identities, "noise", "0", 100, 2, 5, 0.05, maps)
