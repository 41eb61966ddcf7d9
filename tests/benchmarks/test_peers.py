"""Peers: the real signature of FlashAttention-3, stand-ins for both libraries, and every one of them answers rightly."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import peers

CPU = torch.device("cpu")
# as registered by the .so of vLLM 0.26.0
FWD = (
    "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, bool is_causal, "
    "int window_size_left, int window_size_right, float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, "
    "int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) "
    "-> Tensor[]"
)


def dense(q, k, v, scale, causal):
    """`[B, T, H, D]` over `[B, n, Hkv, D]`, causal to the lower right, as both libraries have it."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).float() for x in (k, v))
    logits = torch.einsum("bthd,bnhd->bhtn", q.float(), k) * scale
    if causal:
        T, n = logits.shape[-2:]
        logits = logits.masked_fill(torch.ones(T, n).triu(n - T + 1).bool(), -torch.inf)
    return torch.einsum("bhtn,bnhd->bthd", logits.softmax(-1), v).to(q.dtype)


def fwd(q, k, v, *rest):
    names = peers.FA3_ARGUMENTS[3:]
    given = dict(zip(names, rest, strict=True))
    assert given["num_splits"] == 0 and given["softcap"] == 0 and given["cp_world_size"] == 1
    assert given["window_size_left"] == given["window_size_right"] == -1
    assert given["seqused_k"].dtype == torch.int32 and given["seqused_k"].is_contiguous()
    if (pages := given["page_table"]) is not None:
        assert pages.dtype == torch.int32 and k.shape[1:3] == v.shape[1:3] == (1, 1)
        k, v = (x[pages.long(), 0] for x in (k, v))
    assert len(q) == len(k) and (given["seqused_k"] == k.shape[1]).all()  # all lists of the benchmark are equally long
    given["out"].copy_(dense(q, k, v, given["softmax_scale"], given["is_causal"]))
    return [given["out"]]


@pytest.fixture(scope="module")
def fa3():
    """torch.ops._vllm_fa3_C.fwd with its own schema and an implementation for the CPU."""
    library = torch.library.Library("_vllm_fa3_C", "DEF")
    library.define(FWD)
    library.impl("fwd", fwd, "CPU")
    yield
    library._destroy()


class Wrapper:
    def __init__(self, workspace, layout, backend):
        assert (workspace.dtype, layout, backend) == (torch.uint8, "NHD", "fa2")

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
        page_size, *, causal, sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        assert page_size == 1 and (paged_kv_last_page_len == 1).all() and not causal
        assert qo_indptr.dtype == paged_kv_indptr.dtype == paged_kv_indices.dtype == torch.int32
        assert q_data_type == kv_data_type == torch.bfloat16
        self.pages, self.scale = paged_kv_indices.view(len(paged_kv_indptr) - 1, -1), sm_scale
        self.batch, self.heads = len(qo_indptr) - 1, (num_qo_heads, num_kv_heads, head_dim_qk)
        assert paged_kv_indptr[-1] == len(paged_kv_indices)

    def run(self, q, paged_kv_cache, *, out):
        k, v = paged_kv_cache
        assert k.stride() == v.stride() and k.shape[1:] == (1, self.heads[1], self.heads[2]) and q.shape[1:] == out.shape[1:]
        k, v = (x[self.pages.long(), 0] for x in (k, v))
        return out.copy_(dense(q.unflatten(0, (self.batch, -1)), k, v, self.scale, False).flatten(0, 1))


@pytest.fixture
def flashinfer(monkeypatch):
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    module.top_k = lambda rows, k: torch.topk(rows, k, sorted=False)
    monkeypatch.setitem(sys.modules, "flashinfer", module)


def test_every_peer_runs_and_answers_rightly(case, fa3, flashinfer):
    inputs = case.inputs(CPU)
    for peer in case.peers():
        output = peer.prepare(inputs)()
        assert peer.error is None or peer.error(inputs, output) <= peers.TOLERANCE, peer.name


def test_a_peer_that_answers_wrongly_is_seen(case, fa3, flashinfer):
    inputs = case.inputs(CPU)
    for peer in case.peers():
        if peer.error is not None:
            assert peer.error(inputs, peer.prepare(inputs)().roll(1, 0)) > peers.TOLERANCE, peer.name


def test_peers_of_selection_choose_as_many(case, flashinfer):
    if case.op == "token_select":
        inputs = case.inputs(CPU)
        lists = case.run(inputs, "reference")
        for peer in case.peers():
            first, second = peer.prepare(inputs)()
            if case.budget == "top_p":
                assert first.shape == (case.R, case.S)
                # without sinks and recent tokens fewer are needed
                assert (second[inputs.sources.flatten()] <= lists.counts.flatten()).all()
            else:
                assert second.shape == (case.R, case.k)


def test_what_is_not_given_or_cannot_be_loaded_is_said(tmp_path: Path):
    broken = tmp_path / "fa3.so"
    broken.write_bytes(b"not a library")
    missing = peers.load({peers.FA3: broken, peers.FLASHINFER: None})
    assert missing[peers.FA3].startswith(f"--peer-fa3 {broken}: OSError: ")
    assert missing[peers.FLASHINFER] == "--peer-flashinfer not given"


def test_flashinfer_is_found_in_the_folder_given(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    (tmp_path / "flashinfer.py").write_text("MINE = True\n")
    try:
        assert peers.load({peers.FLASHINFER: tmp_path})[peers.FLASHINFER] == ""
        assert sys.modules["flashinfer"].MINE
    finally:
        sys.modules.pop("flashinfer", None)
