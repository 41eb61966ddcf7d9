"""Other people's kernels that do the same work. They are benchmark-only: no dependency of the project.

FlashAttention-3 comes as one .so file out of a vLLM wheel, FlashInfer as an unpacked site folder with compiled kernels. Both
read token lists as pages of one token: the KV heads are folded into the batch, so that a KV head's list becomes the page
table of a batch entry. All that a peer prepares, FlashInfer's plan included, is left out of its time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import Call

FA3, FLASHINFER = "--peer-fa3", "--peer-flashinfer"
FA3_ARGUMENTS = (  # of torch.ops._vllm_fa3_C.fwd in vLLM 0.26.0: none has a default
    "q", "k", "v", "k_new", "v_new", "q_v", "out", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k",
    "max_seqlen_q", "max_seqlen_k", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary",
    "q_descale", "k_descale", "v_descale", "softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap",
    "is_rotary_interleaved", "scheduler_metadata", "num_splits", "pack_gqa", "sm_margin", "s_aux", "cp_world_size", "cp_rank",
    "cp_tot_seqused_k",
)  # fmt: skip
TOLERANCE = 2e-2  # a peer whose relative error is larger is not doing the same work


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    prepare: Callable[[Any], Call]  # inputs -> call
    needs: str = ""  # the option that brings it; "": comes with torch
    error: Callable[[Any, Any], float] | None = None  # inputs, output -> relative error


def load(paths: Mapping[str, Path | None]) -> dict[str, str]:
    """Load what was given: option -> "" where it is there, otherwise why it is not."""
    loaders = {FA3: _load_fa3, FLASHINFER: _load_flashinfer}
    missing = {}
    for option, loader in loaders.items():
        path = paths.get(option)
        try:
            missing[option] = f"{option} not given" if path is None else loader(path)
        except Exception as error:  # whatever their code raises: the run goes on without them
            missing[option] = f"{option} {path}: {type(error).__name__}: {error}"
    return missing


def _load_fa3(path: Path) -> str:
    torch.ops.load_library(str(path.resolve()))
    _ = torch.ops._vllm_fa3_C.fwd
    return ""


def _load_flashinfer(path: Path) -> str:
    sys.path.insert(0, str(path.resolve()))
    importlib.import_module("flashinfer")
    return ""


def fa3(
    queries: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scale: float, causal: bool, pages: Tensor | None = None
) -> Call:
    """FlashAttention-3 over the first `lengths [B]` tokens of keys `[B, N, Hkv, D]`, or of `pages [B, M]` of one token each.

    Queries `[B, T, Hq, D]`; the result has their shape. The number of splits is its own choice.
    """
    out = torch.empty_like(queries)
    arguments = dict.fromkeys(FA3_ARGUMENTS) | {
        "q": queries, "k": keys, "v": values, "out": out, "seqused_k": lengths.int(), "page_table": pages,
        "softmax_scale": scale, "is_causal": causal, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
        "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
    }  # fmt: skip
    return lambda: torch.ops._vllm_fa3_C.fwd(**arguments)[0]


def torch_flash(queries: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Call:
    """PyTorch's SDPA by FlashAttention: queries `[B, T, Hq, D]`, the last of the keys' tokens `[B, S, Hkv, D]`, causal."""
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    last = causal_lower_right(q.shape[2], k.shape[2])

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, attn_mask=last, scale=scale, enable_gqa=True).transpose(1, 2)

    return call


def flashinfer_pages(queries: Tensor, keys: Tensor, values: Tensor, pages: Tensor, *, scale: float) -> Call:
    """FlashInfer's fa2 backend: queries `[B, T, Hq, D]` over `pages [B, M]` of keys `[tokens, 1, Hkv, D]`; plan() outside.

    Returns `[B * T, Hq, D]`. The plan is that of fixed lengths, without the padding that its own graph mode needs: FlashInfer
    at its best.
    """
    flashinfer = importlib.import_module("flashinfer")
    B, T, Hq, D = queries.shape
    M = pages.shape[1]
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=queries.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
    steps = torch.arange(B + 1, dtype=torch.int32)
    wrapper.plan(
        steps * T, steps * M, pages.reshape(-1), torch.ones(B, dtype=torch.int32), Hq, keys.shape[2], D, 1,
        causal=False, sm_scale=scale, q_data_type=queries.dtype, kv_data_type=keys.dtype,
    )  # fmt: skip
    queries = queries.reshape(B * T, Hq, D)
    out = torch.empty_like(queries)
    return lambda: wrapper.run(queries, (keys, values), out=out)


def flashinfer_top_k(rows: Call, k: int) -> Call:
    """FlashInfer's radix top-k of what `rows` returns, `[rows, S]`: indices in no order."""
    flashinfer = importlib.import_module("flashinfer")
    return lambda: flashinfer.top_k(rows(), k)
