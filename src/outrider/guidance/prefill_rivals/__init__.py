"""How others have prompts read, one small file each: what a method computes, as pure functions and as what a layer asks.

`token_sparse` and `vertical_slash` choose inside the target's forward, `spec_prefill` by the draft's attention before it. All
look at the whole prompt at once; who runs the models for them is `decoding/prefill_rivals.py`.
"""

from __future__ import annotations

from outrider.guidance.prefill_rivals.base import Prompt, kept_tokens
from outrider.guidance.prefill_rivals.token_sparse import TokenSparse, sparse_layers
from outrider.guidance.prefill_rivals.vertical_slash import VerticalSlash

__all__ = ["Prompt", "TokenSparse", "VerticalSlash", "kept_tokens", "sparse_layers"]
