"""The documents' tables of kernel results: made from lines, and said to be missing where there are none."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables

LINES = [
    {
        "id": "sparse_attention-128k-b1-keep10", "backend": "cuda", "us": 14.96, "us_min": 14.5, "us_chained": 13.2,
        "gb": 0.0545, "gb_s": 3643.0, "stream_fraction": 0.83, "key_fraction": None,
        "peers": {"FA3 dense": 141.2, "FA3 page 1": 31.5},
        "peers_chained": {"FA3 dense": 139.6}, "ratio": 2.1056, "error": 2e-3, "conditions": {"device": "x"},
    },
    {
        "id": "attention_mass-32k-b1", "backend": "triton", "us": 12.0, "us_min": 11.0, "us_chained": None,
        "gb": 0.036, "gb_s": 3000.0, "stream_fraction": 0.68, "key_fraction": 0.6,
        "peers": {"stream of K": 7.6}, "peers_chained": {},
        "ratio": None, "error": 2e-3, "conditions": {"device": "x"},
    },
]  # fmt: skip


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["kernels", "kernels-sparse_attention", "kernels-token_select", "kernel-matrix"])
def test_without_results_the_table_says_so(name):
    block = f"<!-- table: {name} -->\nold\n<!-- end -->"
    assert tables.rewritten(block) == f"<!-- table: {name} -->\nNot measured yet.\n<!-- end -->"


def test_the_table_of_all_kernels(results):
    (results / "kernels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert tables.kernels_table("kernels").splitlines() == [
        "| case | backend | us, alone / in a chain | GB | GB/s | of streaming rate | best peer | its us | best peer / ours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| sparse_attention-128k-b1-keep10 | cuda | 15.0 / 13.2 | 0.054 | 3643 | 83% | FA3 page 1 | 31.5 | 2.11x |",
        "| attention_mass-32k-b1 | triton | 12.0 | 0.036 | 3000 | 68% |  |  |  |",
    ]


def test_the_table_of_one_op_has_a_column_for_every_peer(results):
    (results / "kernels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    header, _, only = tables.kernels_table("kernels-sparse_attention").splitlines()
    assert "| FA3 dense, us | FA3 page 1, us | best peer / ours |" in header
    assert only == "| 128k-b1-keep10 | cuda | 15.0 / 13.2 | 0.054 | 3643 | 83% | 141 / 140 | 31.5 | 2.11x |"
    assert "| stream of K, us |" in tables.kernels_table("kernels-attention_mass")
    assert tables.kernels_table("kernels-token_select") == tables.NOT_MEASURED


def test_rows_scored_from_few_bits_are_rows_of_their_own(results):
    floors = {stage: {"percent": 50.0} for stage in ("propose", "score", "select", "verify")}
    line = {
        "case": "a", "engine": "outrider", "mode": "sparse", "drafting": "sparse", "tokens_per_second": 10.0, "round_ms": 5.0,
        "acceptance": {"tokens_per_round": 3.0}, "floors": floors, "stages": dict.fromkeys((*floors, "accept"), 1.0),
    }  # fmt: skip
    found = [line, line | {"scoring": "exact", "case": "b"}, line | {"scoring": "4bit"}]
    (results / "decode.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    for table, place in ((tables.decode_table, 4), (tables.decode_stages_table, 2)):
        cells = [row.split(" | ")[place - 1] for row in table("decode").splitlines()[2:]]
        assert cells == ["sparse", "sparse", "sparse, 4bit keys"]


def test_the_table_of_the_test_matrix(results):
    line = {"op": "token_select", "backend": "cuda", "passed": 812, "failed": 0, "skipped": 3, "margin": 0.512}
    (results / "kernel-matrix.jsonl").write_text(json.dumps(line | {"conditions": {"device": "NVIDIA H200"}}) + "\n")
    assert tables.kernel_matrix_table("kernel-matrix").splitlines()[-1] == (
        "| token_select | cuda | 812 | 0 | 3 | 0.51 | NVIDIA H200 |"
    )


def test_unlisted_tokens_are_compared_with_none_text_by_text(results):
    def line(unlisted, text, change, task="perplexity", **more):
        return {
            "task": task, "method": "outrider", "text": text, "keep": 0.05, "kv_read_fraction": 0.217, "delta_percent": change,
            "agreement": 0.9, "conditions": {"unlisted": unlisted},
        } | more  # fmt: skip

    rows = [line("none", text, change) for text, change in (("a", 1.0), ("b", 2.0))]
    rows += [line("mean", text, change) for text, change in (("b", 1.0), ("a", -1.0))]
    rows += [line("mean", text, None, "facts", recalled=19, asked=20) for text in "ab"]
    (results / "unlisted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tables.unlisted_table("unlisted").splitlines()[2:] == [
        "| outrider | none | 5% | 21.7% | 2 | +1.50% |  |  | 0.900 |  |  |  |",
        "| outrider | mean | 5% | 21.7% | 2 | +0.00% | -1.50 | -2.00 .. -1.00 | 0.900 | +0.000 | +0.000 .. +0.000 | 38/40 |",
    ]


def test_budgets_are_compared_with_flat_ones_text_by_text(results):
    def line(variant, text, kl, change, **more):
        return {
            "budgets": variant, "text": text, "keep": 0.05, "scored": 1279, "kl": kl, "delta_percent": change, "agreement": 0.9,
            "kv_read_fraction": 0.217, "held": 0.75, "recalled": 9, "asked": 10,
        } | more  # fmt: skip

    rows = [line("flat", text, kl, 1.0) for text, kl in (("a", 0.02), ("b", 0.04))]
    rows += [line("fitted", text, kl, 0.5, agreement=0.91) for text, kl in (("a", 0.01), ("b", 0.02))]
    rows.append(line("fitted", "c", 1.0, 1.0, stage="development"))
    (results / "budgets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tables.budgets_table("budgets").splitlines()[2:] == [
        "| flat | 5% | 21.7% | 2 x 1,279 | 0.0300 |  |  | 0.900 |  | +1.00% |  | 0.750 | 18/20 |",
        "| fitted | 5% | 21.7% | 2 x 1,279 | 0.0150 | -50% | -50.0 .. -50.0 | 0.910 | "
        "+1.0 .. +1.0 | +0.50% | -0.5 .. -0.5 | 0.750 | 18/20 |",
    ]


def test_corrections_are_compared_with_none_text_by_text(results):
    def line(correction, text, change, **more):
        return {
            "correction": correction, "text": text, "keep": 0.05, "lists": "draft", "scored": 1279, "kv_read_fraction": 0.217,
            "output_error": 0.1, "delta_percent": change, "agreement": 0.9 + change / 1000, "recalled": 9, "asked": 10,
        } | more  # fmt: skip

    rows = [line("none", text, change) for text, change in (("a", 1.0), ("b", 2.0), ("c", 6.0))]
    rows += [line("mean", text, change, output_error=0.07) for text, change in (("a", 0.0), ("b", 1.0), ("c", 5.0))]
    rows += [
        line(name, "d", 3.0, stage="development", scored=160, agreement=None, recalled=0, asked=0) for name in ("none", "mean")
    ]
    (results / "tail-correction.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tables.tail_correction_table("tail-correction").splitlines()[2:] == [
        "| none | 5% | 21.7% | 3 x 1,279 | 0.1000 | +3.00% |  |  | 0.903 |  |  | 27/30 |",
        "| mean | 5% | 21.7% | 3 x 1,279 | 0.0700 | +2.00% | -1.00 | -1.00 .. -1.00 | 0.902 | -0.001 "
        "| -0.001 .. -0.001 | 27/30 |",
    ]
