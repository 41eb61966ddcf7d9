"""Tensors to tensors: the operations of a round, each a folder of `api.py`, `reference.py` and a README with the maths."""

from outrider.ops.attention_mass import attention_mass
from outrider.ops.block_mass import block_mass
from outrider.ops.chunk_attention import chunk_attention
from outrider.ops.fused_linear import fused_linear
from outrider.ops.kv_append import kv_append
from outrider.ops.quantized_keys import quantize_keys, quantized_mass
from outrider.ops.rotary_append import rotary_append
from outrider.ops.span_mass import span_mass
from outrider.ops.sparse_attention import sparse_attention
from outrider.ops.token_select import TokenLists, token_select, union_lists
from outrider.ops.token_verify import Verified, token_verify
from outrider.ops.unlisted_mass import unlisted_mass

__all__ = [
    "TokenLists",
    "Verified",
    "attention_mass",
    "block_mass",
    "chunk_attention",
    "fused_linear",
    "kv_append",
    "quantize_keys",
    "quantized_mass",
    "rotary_append",
    "span_mass",
    "sparse_attention",
    "token_select",
    "token_verify",
    "union_lists",
    "unlisted_mass",
]
