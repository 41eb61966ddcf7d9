"""The table of cases: which pair of models, how long a context, how many sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LONGEST = 1 << 21  # positions: none of the cases comes near


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The shapes of a target and its draft, as the content of their config.json."""

    name: str
    target: dict[str, Any]
    draft: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pair that decodes `batch` sequences behind `context` tokens each."""

    name: str
    pair: Pair
    context: int
    batch: int = 1


# The kind of rotary embedding is left at its default: it changes numbers and no speed.
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "max_position_embeddings": LONGEST,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "max_position_embeddings": LONGEST,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "max_position_embeddings": LONGEST,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

LLAMA = Pair(
    name="Llama-3.1-8B + Llama-3.2-1B",
    target=_LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "tie_word_embeddings": False},
    draft=_LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
)
QWEN3 = Pair(
    name="Qwen3-8B + Qwen3-0.6B",
    target=_QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"tie_word_embeddings": False},
    draft=_QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"tie_word_embeddings": True},
)
TINY = Pair(
    name="tiny",
    target=_TINY
    | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"tie_word_embeddings": False},
    draft=_TINY
    | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"tie_word_embeddings": True},
)

DEFAULT_CASES = (
    Case(name="llama-128k-b1", pair=LLAMA, context=131072),
    Case(name="llama-128k-b4", pair=LLAMA, context=131072, batch=4),
    Case(name="llama-32k-b1", pair=LLAMA, context=32768),
    Case(name="llama-8k-b1", pair=LLAMA, context=8192),
    Case(name="qwen3-128k-b1", pair=QWEN3, context=131072),
)
LONG_CASES = (  # of which bf16 caches of the second would not fit one GPU of 141 GB: --kv-dtype fp8
    Case(name="llama-512k-b1", pair=LLAMA, context=524288),
    Case(name="llama-1m-b1", pair=LLAMA, context=1048576),
)
TINY_CASE = Case(name="tiny", pair=TINY, context=2048, batch=2)  # for a CPU
CASES = {case.name: case for case in (*DEFAULT_CASES, *LONG_CASES, TINY_CASE)}
