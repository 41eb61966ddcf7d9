"""Our engine under the clock: rows of the tiny case, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outrider.bench import decode as bench
from outrider.bench.floors import Round
from outrider.bench.options import Run
from outrider.bench.run import measure_all
from outrider.cli.tables import decode_table

BOOK = Path(__file__).parents[2] / "examples" / "books" / "persuasion.txt"
CONDITIONS = {"stream_gb_s": 4000.0}
STAGES = {"plain": {"verify", "accept"}, "dense": {"propose", "verify", "accept"}}


def quiet(what: str, done: int, of: int) -> None:
    pass


@pytest.mark.parametrize("mode, drafting", [("plain", None), ("dense", "dense"), ("sparse", "dense"), ("sparse", "sparse")])
def test_a_row_says_what_was_measured(work, options, monkeypatch, mode, drafting):
    counted: list[Round] = []
    count = bench.stage_bytes
    monkeypatch.setattr(bench, "stage_bytes", lambda *given: counted.append(given[-1]) or count(*given))
    row = bench.measure(work, Run(engine="outrider", mode=mode, drafting=drafting), options(rounds=3), CONDITIONS, quiet)
    per_round = row.acceptance["tokens_per_round"]
    assert (row.case, row.context, row.batch, row.error) == ("tiny", 2048, 2, None)
    assert row.tokens_per_second == pytest.approx(2 * per_round / row.round_ms * 1e3)
    assert row.host_ms == pytest.approx(row.round_ms - sum(row.stages.values())) and row.host_ms > 0
    assert row.stages.keys() >= STAGES.get(mode, {"propose", "score", "select", "verify", "accept"})
    assert row.floors.keys() <= row.stages.keys()
    assert row.floors["verify"]["ms"] == pytest.approx(row.floors["verify"]["bytes"] / 4000e6)
    if mode == "plain":
        assert row.acceptance == {"kind": "none", "rates": [], "tokens_per_round": 1.0}
    else:
        assert row.acceptance["kind"] == "scripted" and row.acceptance["rates"] == [0.9, 0.8, 0.7, 0.6]
        assert 1 <= per_round <= 5
    assert row.kept == pytest.approx(0.1 if mode == "sparse" else 1.0, abs=0.001)
    [reads] = counted
    assert reads.batch == 2 and 2048 < reads.cached < 2048 + 40
    assert reads.draft_tokens == (0 if mode == "plain" else 4)
    assert (reads.kept is not None) == (mode == "sparse")
    assert (reads.draft_listed is not None) == (drafting == "sparse")


def test_acceptance_is_that_of_the_script(options):
    [row] = measure_all(options(rounds=2, acceptance="1,1,0,0", mode=("dense",), drafting=("dense",)), "", "", quiet)
    assert row.acceptance == {"kind": "scripted", "rates": [1.0, 1.0, 0.0, 0.0], "tokens_per_round": 3.0}


def test_exact_is_measured_from_confirmation_to_confirmation(options):
    given = options(rounds=12, acceptance="1,1,1,1", mode=("exact",), drafting=("sparse",), agreement=1.0, exact_every=15)
    [row] = measure_all(given, "", "", quiet)
    assert row.error is None and row.stages["confirm"] > 0 and row.floors["confirm"]["bytes"] > 0
    found = row.acceptance
    assert (found["agreement"], found["exact_every"]) == (1.0, 15)
    # three rounds of 5 tokens each, then 6 drafted ones and a bonus token
    assert found["tentative_per_confirmation"] == found["confirmed_per_confirmation"] == 15
    assert found["tokens_per_round"] == pytest.approx(22 / 3)
    assert row.kept == pytest.approx(0.1, abs=0.001)


def test_scripted_disagreement_is_rolled_back(options):
    given = options(rounds=12, acceptance="1,1,1,1", mode=("exact",), drafting=("sparse",), agreement=0.9, exact_every=10)
    [row] = measure_all(given, "", "", quiet)
    assert 0 < row.acceptance["confirmed_per_confirmation"] < row.acceptance["tentative_per_confirmation"] == 10
    [one, other] = measure_all(options(rounds=3, mode=("dense", "exact"), drafting=("dense",)), "", "", quiet)
    assert "confirm" not in one.stages and "agreement" not in one.acceptance
    decode_table([one, other])


@pytest.mark.parametrize("mode", ["plain", "dense", "sparse", "exact", "auto"])
def test_predictions_stand_beside_measurements(options, mode):
    [row] = measure_all(options(rounds=12, mode=(mode,), drafting=("sparse",)), "", "", quiet)
    assert row.error is None and 0 < row.predicted_ms < 20 * row.round_ms
    assert bool(row.chosen) == (mode == "auto") == (not row.floors)
    if mode == "auto":
        assert sum(row.chosen.values()) == pytest.approx(2 * 12, abs=2 * 64)
    decode_table([row])


def test_a_guard_that_only_watches_is_measured(options):
    given = options(rounds=12, mode=("dense", "sparse"), drafting=("sparse",), guard_every=3)
    dense, sparse = measure_all(given, "", "", quiet)
    assert "audit" not in dense.stages and dense.conditions["guard_every"] is None
    assert sparse.stages["audit"] > 0 and sparse.floors["audit"]["bytes"] > 0 and sparse.conditions["guard_every"] == 3
    assert sparse.kept == pytest.approx(0.1, abs=0.001), "dummy weights differ, and nothing comes of it"


def test_what_fails_is_a_row_and_stops_nothing(options, monkeypatch):
    def broken(work, run, *given):
        if run.mode == "dense":
            raise RuntimeError("out of memory")
        return measured(work, run, *given)

    measured = bench.measure
    monkeypatch.setattr("outrider.bench.run.measure", broken)
    rows = list(measure_all(options(rounds=1, mode=("dense", "plain"), drafting=("dense",)), "", "command", quiet))
    assert [(row.mode, row.error) for row in rows] == [("dense", "RuntimeError: out of memory"), ("plain", None)]
    assert all(row.conditions["command"] == "command" and row.conditions["pair"] == "tiny" for row in rows)
    decode_table(rows)


def test_the_command_writes_rows_and_shows_tables(decode, tmp_path):
    arguments = [
        "--case",
        "tiny",
        "--device",
        "cpu",
        "--rounds",
        2,
        "--mode",
        "plain",
        "--mode",
        "sparse",
        "--drafting",
        "dense",
    ]
    outcome = decode(*arguments)
    assert outcome.code == 0, outcome.err
    assert "tiny: 2 x 2048 tokens" in outcome.out and "tiny: stages" in outcome.out and "select" in outcome.out
    lines = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert [(line["mode"], line["drafting"]) for line in lines] == [("plain", None), ("sparse", "dense")]
    wanted = {"device", "driver", "torch", "triton", "cuda", "transformers", "commit", "ops", "date", "command", "stream_gb_s"}
    assert wanted <= lines[0]["conditions"].keys()
    assert lines[0]["conditions"]["fused_layers"] == [0, 0], "a CPU has no kernels for them"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert decode(*arguments, "--mode", "plain").code == 0
    assert (tmp_path / "benchmarks" / "results" / "decode.jsonl").exists()


def test_rows_of_few_bits_are_rows_of_their_own(decode, tmp_path):
    real = ["--target", "builtin", "--device", "cpu", "--prompt-file", BOOK, "--context", 1100, "--rounds", 2]
    outcome = decode(*real, "--mode", "sparse", "--drafting", "sparse", "--score-keys", "exact", "--score-keys", "4bit")
    assert outcome.code == 0, outcome.err
    exact, few = (json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines())
    assert (exact["scoring"], few["scoring"]) == ("exact", "4bit") == tuple(x["conditions"]["score_keys"] for x in (exact, few))
    share = few["floors"]["score"]["bytes"] / exact["floors"]["score"]["bytes"]
    assert share == pytest.approx(4.5 / 32, rel=0.01), "bits of a number; how many tokens are cached differs by a few"
    assert outcome.out.count("sparse, 4bit keys") >= 2


def test_the_tiny_case_cannot_be_coded(decode):
    arguments = ["--case", "tiny", "--device", "cpu", "--mode", "sparse", "--score-keys", "4bit"]
    assert "score-keys: got '4bit'; allowed: exact for a draft with head dim 16" in decode(*arguments).err


def test_real_models_bring_their_own_acceptance(decode, tmp_path):
    real = ["--target", "builtin", "--device", "cpu", "--prompt-file", BOOK]
    outcome = decode(*real, "--context", 1100, "--batch", 2, "--rounds", 2, "--mode", "sparse", "--drafting", "dense")
    assert outcome.code == 0, outcome.err
    [line] = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert (line["case"], line["context"], line["batch"]) == ("target-1100-b2", 1100, 2)
    rates = line["acceptance"]["rates"]
    assert line["acceptance"]["kind"] == "real" and len(rates) == 4 and rates == sorted(rates, reverse=True)
    assert line["acceptance"]["tokens_per_round"] == pytest.approx(1 + sum(rates))
    assert "the pair holds" in decode(*real, "--context", 10**6).err
    short = tmp_path / "short.txt"
    short.write_text("It was a dark and stormy night.", encoding="utf-8")
    assert "allowed: at least --context 1100" in decode(*real, "--prompt-file", short, "--context", 1100).err


def test_no_sequence_ends_while_it_is_measured(options, monkeypatch):
    """Where everything passes and each round is confirmed, it brings K + 1 tokens, then 3K/2 drafted ones and a bonus."""
    monkeypatch.setattr(bench, "MAX_EXACT_EVERY", 4)
    given = options(rounds=20, acceptance="1,1,1,1", mode=("exact",), drafting=("sparse",), agreement=1.0, exact_every=1)
    [row] = measure_all(given, "", "", quiet)
    assert row.error is None and row.acceptance["tokens_per_round"] == pytest.approx(12)
