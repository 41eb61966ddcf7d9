"""The table of cases. Sizes: a layer of Llama-3.1-8B (target) and of Llama-3.2-1B (draft), 10% kept.

5 queries a round, 4,096 a chunk of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.kernels.attention_mass import AttentionMass
from benchmarks.kernels.block_mass import BlockMass
from benchmarks.kernels.case import Case
from benchmarks.kernels.chunk_attention import ChunkAttention
from benchmarks.kernels.dense_attention import DenseAttention
from benchmarks.kernels.quantized_keys import QuantizedMass
from benchmarks.kernels.span_mass import SpanMass
from benchmarks.kernels.sparse_attention import SparseAttention
from benchmarks.kernels.token_select import TokenSelect
from benchmarks.kernels.unlisted_mass import UnlistedMass
from outrider.errors import OptionError

K32, K128, M1 = 2**15, 2**17, 2**20
SIZES = (("128k-b1", K128, 1), ("128k-b4", K128, 4), ("32k-b1", K32, 1), ("32k-b4", K32, 4))

CASES: tuple[Case, ...] = (
    *(SparseAttention(id=f"sparse_attention-{name}-keep10", S=S, B=B) for name, S, B in SIZES),
    *(SparseAttention(id=f"sparse_attention-{name}-keep10-separate", S=S, B=B, separate=True) for name, S, B in SIZES),
    SparseAttention(id="sparse_attention-128k-b1-keep10-fp8", S=K128, B=1, fp8=True),
    *(DenseAttention(id=f"dense_attention-{name}", S=S, B=B, separate=True) for name, S, B in SIZES[:3]),
    TokenSelect(id="token_select-256x128k-top_k", R=256, S=K128),
    TokenSelect(id="token_select-256x128k-top_p", R=256, S=K128, budget="top_p"),
    TokenSelect(id="token_select-32x1m-top_k", R=32, S=M1),
    TokenSelect(id="token_select-8x128k-top_k", R=8, S=K128),
    TokenSelect(id="token_select-256x128k-merge4-top_k", R=256, S=K128, G=4),
    TokenSelect(id="token_select-256x128k-merge4-fp32-top_k", R=256, S=K128, G=4, dtype=torch.float32),
    AttentionMass(id="attention_mass-128k-b1", S=K128, B=1),
    AttentionMass(id="attention_mass-128k-b4", S=K128, B=4),
    AttentionMass(id="attention_mass-32k-b1", S=K32, B=1),
    AttentionMass(id="attention_mass-128k-b1-interleaved", S=K128, B=1, interleaved=True),
    BlockMass(id="block_mass-128k-t2048-block128", S=K128),
    BlockMass(id="block_mass-128k-t2048-block512", S=K128, block=512),
    BlockMass(id="block_mass-32k-t2048-block128-computed", S=K32, known=False),
    SpanMass(id="span_mass-128k", S=K128),
    *(QuantizedMass(id=f"quantized_mass-{name}-{bits}bit", S=S, B=B, bits=bits) for name, S, B in SIZES[:3] for bits in (4, 2)),
    UnlistedMass(id="unlisted_mass-256x128k", R=256, S=K128),
    UnlistedMass(id="unlisted_mass-256x128k-merge4", R=256, S=K128, G=4),
    ChunkAttention(id="chunk_attention-128k-keep10", S=K128),
    ChunkAttention(id="chunk_attention-128k-keep10-block128", S=K128, block=128),
    ChunkAttention(id="chunk_attention-32k-keep10", S=K32),
    ChunkAttention(id="chunk_attention-128k-dense", S=K128, keep=0),
    ChunkAttention(id="chunk_attention-128k-dense-draft", S=K128, keep=0, D=64),
)


def chosen(parts: Sequence[str]) -> list[Case]:
    """The cases whose id holds one of `parts`; all of them without any. Raises OptionError for a part that no id holds."""
    for part in parts:
        if not any(part in case.id for case in CASES):
            raise OptionError("--only", part, "a part of " + ", ".join(case.id for case in CASES))
    return [case for case in CASES if not parts or any(part in case.id for part in parts)]
