"""Bytes counted by hand; how many rows fit, and what is said when they do not."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from outrider.decoding import memory
from outrider.decoding.memory import RowDemand, free_bytes, plan_rows, rows_that_fit, token_bytes, tokens_that_fit
from outrider.errors import PromptError
from outrider.models import LayerShape, ModelSpec

FULL = LayerShape(query_heads=8, kv_heads=2, head_dim=64, scale=1.0, window=None)
TARGET = ModelSpec(
    name="target",
    digest="0",
    layers=(FULL, replace(FULL, window=16), FULL),
    vocabulary=9,
    context=2**20,
    eos_tokens=(),
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
)
DRAFT = replace(TARGET, name="draft", layers=(replace(FULL, kv_heads=1, head_dim=32),), dtype=torch.float32)
DENSE = RowDemand(target=TARGET, draft=DRAFT, capacity=1000)
SPARSE = replace(DENSE, score_rows=16, score_bytes=2, list_entries=3 * 2 * 100)


def test_a_token_holds_keys_and_values_of_every_layer():
    assert token_bytes(TARGET) == 3 * 2 * 2 * 64 * 2  # layers, key and value, KV heads, head dim, bytes
    assert token_bytes(DRAFT) == 1 * 2 * 1 * 32 * 4
    assert token_bytes(replace(TARGET, kv_dtype="fp8")) == 3 * 2 * 2 * 64
    assert token_bytes(replace(DRAFT, kv_dtype="fp8")) == 1 * 2 * 1 * 32
    mixed = replace(TARGET, layers=(FULL, replace(FULL, kv_heads=1, head_dim=16)))
    assert token_bytes(mixed) == 2 * (2 * 64 + 16) * 2


def test_a_row_holds_caches_masses_and_lists():
    assert (DENSE.target_bytes, DENSE.draft_bytes, DENSE.guidance_bytes) == (1_536_000, 256_000, 0)
    assert SPARSE.guidance_bytes == 2 * 1000 * 16 * 2 + 600 * 4
    assert SPARSE.bytes == 1_536_000 + 256_000 + 64_000 + 2_400


def test_a_row_holds_keys_in_few_bits():
    coded = replace(SPARSE, code_bytes=18)
    assert (coded.coded_bytes, coded.bytes) == (18_000, SPARSE.bytes + 18_000)
    most = tokens_that_fit(coded, 1_000_000)
    assert rows_that_fit(replace(coded, capacity=most), 1_000_000) == 1
    assert rows_that_fit(replace(coded, capacity=most + 1), 1_000_000) == 0
    said = r"draft 0\.3\), 0\.2 GB of keys in few bits and 0\.1 GB of scores and lists; allowed: at most"
    with pytest.raises(PromptError, match=said):
        plan_rows(replace(coded, capacity=1_000_000, code_bytes=200), 8, 10**9, prompt=3, tokens=999_990)


def test_a_token_is_what_a_cache_allocates(make_model):
    """The count against the tensors themselves, windows and 8 bits included."""
    for kv_dtype in ("auto", "fp8"):
        model = make_model("gemma3", dtype="bfloat16").with_kv_dtype(kv_dtype)
        cache = model.new_cache(1, 10)
        held = sum(rows(i).nbytes for rows in (cache.keys, cache.values) for i in range(len(model.spec.layers)))
        assert held == 10 * token_bytes(model.spec)


@pytest.mark.parametrize("free, rows", [(0, 0), (1_991_111, 0), (1_991_112, 1), (3_982_223, 2), (19_911_112, 10)])
def test_rows_leave_a_tenth_to_everything_else(free, rows):
    assert DENSE.bytes == 1_792_000  # nine tenths of 1,991,111.1
    assert rows_that_fit(DENSE, free) == rows


def test_tokens_that_fit_do_fit():
    for free in (0, 1_000, 123_456, 1_000_000):
        most = tokens_that_fit(SPARSE, free)
        assert most == 0 or rows_that_fit(replace(SPARSE, capacity=most), free) == 1
        assert rows_that_fit(replace(SPARSE, capacity=most + 1), free) == 0


def test_a_run_with_room_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_rows(DENSE, 8, 8 * 1_991_112, prompt=0, tokens=990) == 8
        assert plan_rows(DENSE, 8, None, prompt=0, tokens=990) == 8, "where the system does not tell, all run"


def test_fewer_rows_than_wanted_run_with_a_warning():
    free = 2_500_000_000
    large = replace(DENSE, capacity=500_000)  # 0.896 GB
    said = r"batch-size: 8 rows of 499,990 tokens need 7\.2 GB, but 2\.5 GB are free; 2 run at the same time"
    with pytest.warns(UserWarning, match=said):
        assert plan_rows(large, 8, free, prompt=0, tokens=499_990) == 2


def test_not_even_one_row_is_an_error_that_names_the_prompt():
    large = RowDemand(
        target=TARGET, draft=DRAFT, capacity=1_000_000, score_rows=16, score_bytes=2, list_entries=3 * 2 * 100_000
    )
    # (0.9 GB - 2.4 MB of lists) / 1,856 bytes a token = 483,620 tokens, less the 10 that a row holds beyond its own
    said = (
        r"prompt 3: 999,990 tokens need 1\.8 GB of keys and values \(target 1\.5, draft 0\.3\) and 0\.1 GB of scores and "
        r"lists; allowed: at most 483,610 tokens in the 1\.0 GB that are free"
    )
    with pytest.raises(PromptError, match=said):
        plan_rows(large, 8, 10**9, prompt=3, tokens=999_990)
    with pytest.raises(PromptError, match=r"at most 0 tokens in the 0\.0 GB"):
        plan_rows(large, 8, 0, prompt=3, tokens=999_990)


def test_free_memory_of_this_machine():
    assert free_bytes(torch.device("cpu")) is None or free_bytes(torch.device("cpu")) > 0


def test_free_memory_counts_file_caches_where_the_system_tells(monkeypatch, tmp_path):
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:   60 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", told)
    assert free_bytes(torch.device("cpu")) == 60 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory.os, "sysconf_names", {"SC_AVPHYS_PAGES": 1, "SC_PAGE_SIZE": 2})
    monkeypatch.setattr(memory.os, "sysconf", {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_bytes(torch.device("cpu")) == 7 * 4096
    monkeypatch.setattr(memory.os, "sysconf_names", {})
    assert free_bytes(torch.device("cpu")) is None


def test_free_memory_of_a_gpu_counts_what_the_allocator_holds(monkeypatch):
    for name, value in (("mem_get_info", (1000, 9000)), ("memory_reserved", 300), ("memory_allocated", 120)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 1180
