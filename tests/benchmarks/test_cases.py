"""Cases: inputs as described, bytes counted by hand, and checks that pass what is right and nothing else."""

from __future__ import annotations

import pytest
import torch
from benchmarks.kernels.attention_mass import AttentionMass
from benchmarks.kernels.block_mass import BlockMass
from benchmarks.kernels.cases import CASES, chosen
from benchmarks.kernels.chunk_attention import ChunkAttention
from benchmarks.kernels.dense_attention import DenseAttention
from benchmarks.kernels.quantized_keys import QuantizedMass
from benchmarks.kernels.sparse_attention import SparseAttention
from benchmarks.kernels.token_select import TokenSelect
from benchmarks.kernels.unlisted_mass import UnlistedMass

from outrider.errors import OptionError
from outrider.ops.token_select import TokenLists

CPU = torch.device("cpu")


def test_the_table_has_the_cases_that_are_reported():
    ids = [case.id for case in CASES]
    assert len(set(ids)) == len(ids) == 39
    layer = {"128k-b1": (2**17, 1), "128k-b4": (2**17, 4), "32k-b1": (2**15, 1), "32k-b4": (2**15, 4)}
    for case in CASES:
        assert case.id.startswith(case.op + "-")
        if isinstance(case, SparseAttention):
            assert layer["-".join(case.id.split("-")[1:3])] == (case.S, case.B)
            dense = case.op == "dense_attention"
            assert (case.Hq, case.Hkv, case.D, case.T, case.keep) == (32, 8, 128, 5, 0.0 if dense else 0.1)
            assert case.separate == (dense or case.id.endswith("-separate"))
        if isinstance(case, AttentionMass):
            assert (case.Hq, case.Hkv, case.D, case.T) == (32, 8, 64, 5)
        if isinstance(case, BlockMass):
            assert (case.Hq, case.Hkv, case.D, case.T) == (32, 8, 64, 2048)
        if isinstance(case, ChunkAttention):
            assert (case.Hq, case.Hkv, case.D, case.T) == (32, 8, 64 if case.id.endswith("-draft") else 128, 4096)
            assert layer[case.id.split("-")[1] + "-b1"] == (case.S, case.B)
            assert case.keep == (0 if "-dense" in case.id else 0.1)


def test_cases_are_chosen_by_a_part_of_their_name():
    assert [case.id for case in chosen(["32x1m", "attention_mass-32k"])] == [
        "token_select-32x1m-top_k",
        "attention_mass-32k-b1",
    ]
    assert len(chosen([])) == len(CASES)
    with pytest.raises(OptionError, match=r"--only: got 'prefill'; allowed: a part of sparse_attention-128k-b1-keep10, .*mass"):
        chosen(["sparse", "prefill"])


def test_bytes_of_sparse_attention():
    """Llama-3.1-8B, 128K, one sequence: 13,107 listed tokens and 5 of the tail a KV head; EVIDENCE: 12.5 us at 4.3 TB/s."""
    case = SparseAttention(id="x", S=1000, B=2, Hq=8, Hkv=2, D=16)
    rows = 2 * 2 * (100 + 5)
    expected = rows * 2 * 16 * 2 + 2 * 2 * 100 * 4 + 2 * 2 * 4 + 2 * 4 + 2 * (2 * 5 * 8 * 16 * 2)
    assert case.fewest_bytes(case.inputs(CPU)) == expected
    halved = SparseAttention(id="x", S=1000, B=2, Hq=8, Hkv=2, D=16, fp8=True)
    assert expected - halved.fewest_bytes(halved.inputs(CPU)) == rows * 2 * 16
    assert pytest.approx(12.5, abs=0.1) == 13107 * 8 * 2 * 128 * 2 / 4.3e6


def test_bytes_of_dense_attention():
    """Llama-3.1-8B, 128K, one sequence: 537 MB of keys and values."""
    case = DenseAttention(id="x", S=1000, B=2, Hq=8, Hkv=2, D=16)
    expected = 2 * 2 * 1005 * 2 * 16 * 2 + 2 * 4 + 2 * (2 * 5 * 8 * 16 * 2)
    assert case.fewest_bytes(case.inputs(CPU)) == expected


def test_bytes_of_token_select():
    case = TokenSelect(id="x", R=16, S=1000)
    assert case.fewest_bytes(case.inputs(CPU)) == 16 * 1000 * 2 + 16 * (100 * 4 + 4) + 16 * 8 + 4
    case = TokenSelect(id="x", R=16, S=1000, G=4, dtype=torch.float32)
    assert case.fewest_bytes(case.inputs(CPU)) == 16 * 1000 * 4 + 16 * (100 * 4 + 4) + 16 * 4 * 8 + 4


def test_bytes_of_attention_mass():
    case = AttentionMass(id="x", S=1000, B=2, Hq=8, Hkv=2, D=16)
    keys = 2 * 2 * 1005 * 16 * 2
    assert case.key_bytes(case.inputs(CPU)) == keys
    assert case.fewest_bytes(case.inputs(CPU)) == keys + 2 * 8 * 1128 * 2 + 2 * 5 * 8 * 16 * 2 + 2 * 4


def test_bytes_of_block_mass():
    case = BlockMass(id="x", S=1000, B=2, T=11, block=4, Hq=8, Hkv=2, D=16)
    expected = 2 * 2 * 1011 * 16 * 2 + 2 * 3 * 8 * 1139 * 2 + 2 * 11 * 8 * 16 * 2 + 2 * 4
    inputs = case.inputs(CPU)
    assert case.fewest_bytes(inputs) == expected + 2 * 8 * 11 * 4
    assert inputs.keys[:, 1011:].isnan().all() and inputs.keys[:, :1011].isfinite().all()
    computed = BlockMass(id="x", S=1000, B=2, T=11, block=4, known=False, Hq=8, Hkv=2, D=16)
    assert computed.fewest_bytes(computed.inputs(CPU)) == expected
    assert case.operations(inputs) == 2 * 2 * 8 * 16 * (4 * 1000 + 4 * 1004 + 3 * 1008)


def test_bytes_and_operations_of_chunk_attention():
    """Llama-3.1-8B, 128K, 4,096 tokens in blocks of 512: 0.9 T operations, a tenth of the dense ones."""
    case = ChunkAttention(id="x", S=1000, B=2, T=90, block=40, Hq=8, Hkv=2, D=16)
    rows, lists = 2 * 2 * (3 * 100 + 90), 2 * 3 * 2
    expected = rows * 2 * 16 * 2 + lists * (100 + 1) * 4 + 2 * 4 + 2 * (2 * 90 * 8 * 16 * 2)
    assert case.fewest_bytes(case.inputs(CPU)) == expected
    assert case.operations(case.inputs(CPU)) == 4 * 2 * 8 * 16 * (90 * 100 + 40 * 41 + 10 * 11 // 2)
    dense = ChunkAttention(id="x", S=1000, B=2, T=90, keep=0, Hq=8, Hkv=2, D=16)
    assert dense.fewest_bytes(dense.inputs(CPU)) == 2 * 2 * 1090 * 2 * 16 * 2 + 2 * 4 + 2 * (2 * 90 * 8 * 16 * 2)
    assert dense.operations(dense.inputs(CPU)) == 4 * 2 * 8 * 16 * sum(range(1001, 1091))
    layer = {case.id: case for case in CASES if isinstance(case, ChunkAttention)}
    assert layer["chunk_attention-128k-keep10"].operations(None) == pytest.approx(0.90e12, rel=1e-2)
    assert layer["chunk_attention-128k-dense"].operations(None) == pytest.approx(8.93e12, rel=1e-2)


def test_bytes_of_unlisted_mass():
    case = UnlistedMass(id="x", R=16, S=1000, G=4)
    assert case.fewest_bytes(case.inputs(CPU)) == 16 * 1000 * 2 + 16 * 4 * 8 + 16 * (100 * 4 + 4) + 16 * 100 * 4 * 2 + 4


def test_bytes_of_quantized_mass():
    """Llama-3.2-1B, 128K, one sequence, 4 bits: 604 MB of codes, ranges and recent keys in docs/kernels.md."""
    case = QuantizedMass(id="x", S=1000, B=2, L=3, Hq=8, Hkv=2, D=64)
    keys = 3 * 2 * 2 * (14 * (64 * 64 // 2 + 2 * 64 * 2) + (1000 - 14 * 64 + 5) * 64 * 2)  # a word of two float16 a channel
    assert case.key_bytes(case.inputs(CPU)) == keys
    assert case.fewest_bytes(case.inputs(CPU)) == keys + 3 * 2 * 8 * 1128 * 2 + 3 * 2 * 5 * 8 * 64 * 2 + 2 * 4
    assert pytest.approx(604e6, rel=1e-2) == 16 * 8 * (2047 * (64 * 32 + 256) + 69 * 128)


def test_inputs_are_fresh_for_every_copy_and_the_same_for_one(case):
    def first(copy):
        inputs = case.inputs(CPU, copy)
        return inputs.scores if hasattr(inputs, "scores") else inputs.queries[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(0), first(1))


def test_storage_of_the_cache(case):
    inputs = case.inputs(CPU)
    if case.op in ("token_select", "unlisted_mass", "quantized_mass", "block_mass", "chunk_attention"):
        return
    N, beside = case.S + 128, 2 if "separate" not in case.id and case.id != "attention_mass-tiny" else 1
    assert inputs.keys.shape == (case.B, N, case.Hkv, case.D)
    assert inputs.keys.stride() == (case.Hkv * N * beside * case.D, beside * case.D, N * beside * case.D, 1)
    dead, living = inputs.keys[:, case.S + case.T :].float(), inputs.keys[:, : case.S + case.T].float()
    assert dead.isnan().all() and living.isfinite().all()
    if case.op == "sparse_attention":
        apart = inputs.values.data_ptr() - inputs.keys.data_ptr()
        element = inputs.keys.element_size()
        assert apart == element * case.D * (1 if beside == 2 else case.B * case.Hkv * N)
        assert (inputs.indices.diff() > 0).all() and inputs.indices.max() < case.S
        assert inputs.indices.shape == (case.B, case.Hkv, 20)


def test_about_a_tenth_is_kept_by_mass(case):
    if case.op == "token_select" and case.budget == "top_p":
        inputs = case.inputs(CPU)
        counts = case.run(inputs, "reference").counts
        assert inputs.width == 229
        assert counts.min() >= 150 and counts.max() <= inputs.width


def test_merged_rows_are_four_different_ones_and_each_serves_four_lists(case):
    if case.op == "token_select":
        sources = case.inputs(CPU).sources.view(-1, case.G)
        assert (sources.sort().values.diff() > 0).all()
        assert (sources.flatten().bincount(minlength=case.R) == case.G).all()


def test_the_check_passes_the_reference(case):
    inputs = case.inputs(CPU)
    assert case.error(inputs, case.run(inputs, "reference")) <= case.tolerance


def test_the_check_fails_on_a_wrong_tensor(case):
    if case.op == "token_select":
        return
    inputs = case.inputs(CPU)
    right = case.run(inputs, "reference")
    assert not case.error(inputs, right * 1.02) <= case.tolerance
    assert not case.error(inputs, right.roll(1, -1)) <= case.tolerance
    assert not case.error(inputs, right[:, :-1]) <= case.tolerance
    one = right.clone()
    one[0, 0, 0] = torch.nan
    assert not case.error(inputs, one) <= case.tolerance


def test_the_check_fails_where_another_token_is_read():
    case = SparseAttention(id="x", S=200, B=1, Hq=8, Hkv=2, D=16)
    inputs = case.inputs(CPU)
    right = case.run(inputs, "reference")
    inputs.indices[0, 1, 0] -= 1
    assert not case.error(inputs, right) <= case.tolerance


def test_the_check_fails_where_something_is_written_behind_the_past():
    case = AttentionMass(id="x", S=200, B=1, Hq=8, Hkv=2, D=16)
    inputs = case.inputs(CPU)
    right = case.run(inputs, "reference")
    right[0, 3, 201] = 1e-3
    assert not case.error(inputs, right) <= case.tolerance


def swapped(lists: TokenLists, scores: torch.Tensor) -> TokenLists:
    """The worst listed token of the first list exchanged for one that is not listed, order kept."""
    indices = lists.indices.clone()
    listed = indices[0, 0, 0][indices[0, 0, 0] >= 0].tolist()
    spare = next(i for i in range(scores.shape[-1]) if i not in listed)
    listed.remove(listed[len(listed) // 2])
    indices[0, 0, 0, : len(listed) + 1] = torch.tensor(sorted([*listed, spare]))
    return TokenLists(indices, lists.counts)


def shortened(lists: TokenLists, scores: torch.Tensor) -> TokenLists:
    indices, counts = lists.indices.clone(), lists.counts.clone()
    counts[0, 0, 0] -= 1
    indices[0, 0, 0, int(counts[0, 0, 0])] = -1
    return TokenLists(indices, counts)


def disordered(lists: TokenLists, scores: torch.Tensor) -> TokenLists:
    indices = lists.indices.clone()
    indices[0, 0, 0, :2] = indices[0, 0, 0, :2].flip(0)
    return TokenLists(indices, lists.counts)


@pytest.mark.parametrize("plant", [swapped, shortened, disordered])
def test_the_check_fails_on_wrong_lists(case, plant):
    if case.op == "token_select":
        inputs = case.inputs(CPU)
        assert case.error(inputs, plant(case.run(inputs, "reference"), inputs.scores)) == 1 / 6


def test_the_check_fails_on_a_list_that_keeps_too_much_mass():
    case = TokenSelect(id="x", R=8, S=2000, budget="top_p")
    inputs = case.inputs(CPU)
    row = inputs.scores[0, inputs.sources[0, 0, 0]].float()
    lists = case.run(inputs, "reference")
    forced = row.clone()
    forced[:4] = forced[-64:] = torch.inf
    count = int(lists.counts[0, 0, 0]) + 1
    lists.indices[0, 0, 0, :count] = forced.sort(descending=True, stable=True).indices[:count].sort().values
    lists.counts[0, 0, 0] = count
    assert case.error(inputs, lists) == 1 / 6


def test_merged_scores_may_be_compared_by_their_upper_half():
    """What a kernel does with merged scores; the tie rule still holds."""
    case = TokenSelect(id="x", R=16, S=2000, G=4, dtype=torch.float32)
    inputs = case.inputs(CPU)
    merged = torch.stack([case._merged(inputs, *divmod(i, 8)) for i in range(16)])
    coarse = (merged.view(torch.int32) & -65536).view(torch.float32)
    single = TokenSelect(id="y", R=16, S=2000, dtype=torch.float32)
    sources = torch.arange(16).view(2, 8, 1)
    lists = single.run(type(inputs)(coarse.unsqueeze(0), inputs.lengths, sources, case.k, None, case.k), "reference")
    assert not torch.equal(lists.indices, case.run(inputs, "reference").indices)
    assert case.error(inputs, lists) == 0
