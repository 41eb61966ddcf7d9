"""Prompts under the clock: rows of the tiny case by hand-made arithmetic, vLLM's time to the first token, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from outrider.bench import prefill as bench
from outrider.bench.dummy import dummy_models
from outrider.bench.peers.job import first_token
from outrider.bench.prefill_floors import Work
from outrider.bench.prefill_options import TINY_CASE, PrefillOptions, PrefillRun
from outrider.bench.prefill_run import measure_all
from outrider.errors import OptionError

RATES = {"stream_gb_s": 4000.0, "matmul_tflops": 800.0}
SHAPE = {"case": ("tiny",), "device": "cpu", "chunk": 256, "block": 64}


def quiet(what, done, of):
    pass


@pytest.fixture(scope="module")
def models():
    return dummy_models(TINY_CASE.pair, torch.device("cpu"))


def measured(models, mode, method=None, **options):
    given = PrefillOptions(**(SHAPE | options))
    method = method or ("outrider" if mode == "sparse" else None)
    return bench.measure(models, TINY_CASE, PrefillRun(engine="outrider", mode=mode, method=method), given, RATES, quiet)


@pytest.mark.parametrize("mode, stages", [("plain", {"target"}), ("dense", {"draft", "target"})])
def test_a_dense_row(models, mode, stages):
    row = measured(models, mode)
    assert (row.case, row.engine, row.mode, row.context, row.kept, row.error) == ("tiny", "outrider", mode, 1000, None, None)
    assert row.tokens_per_second == pytest.approx(1000 / row.seconds)
    assert row.stages.keys() == row.floors.keys() == stages
    assert sum(row.stages.values()) <= 1e3 * row.seconds
    # 3 layers: 64 x (4 + 2 + 2 + 4) heads of 16, three products of 64 x 96, two norms; a norm at the end
    weights = 3 * (64 * 12 * 16 + 3 * 64 * 96 + 2 * 64) + 64
    attention = 3 * 4 * 4 * 16 * 1000 * 1000 / 2
    assert row.floors["target"]["tflop"] == pytest.approx((2 * weights * 1000 + attention) / 1e12)


def test_a_sparse_row(models):
    row = measured(models, "sparse", keep=0.2)
    assert row.stages.keys() == row.floors.keys() == {"draft", "score", "select", "target"} and row.method == "outrider"
    assert 0.2 <= row.kept < 0.25, "blocks have the recent 64 tokens at least"
    dense, sparse = (measured(models, mode).floors["target"]["tflop"] for mode in ("plain", "sparse"))
    assert sparse < dense
    scores = row.floors["score"]
    assert scores["gb"] == pytest.approx(1000 * 1000 / 2 / 64 * 2 * 2 * 4 / 1e9), "masses of 2 layers of 2 heads, fp32"
    assert scores["tflop"] == pytest.approx(1000 * 1000 / 2 * 2 * 2 * 2 * 16 / 1e12)


@pytest.mark.parametrize(
    "method, stages",
    [
        ("token-sparse", {"score", "select", "target"}),
        ("vertical-slash", {"score", "select", "target"}),
        ("spec-prefill", {"draft", "score", "select", "target"}),
    ],
)
def test_a_row_of_another_method(models, method, stages):
    row = measured(models, "sparse", method, keep=0.2)
    assert (row.mode, row.method, row.error) == ("sparse", method, None)
    assert row.stages.keys() == stages and not row.floors
    assert 0 < sum(row.stages.values()) <= 1e3 * row.seconds
    # 2 of 3 layers sparse; the last of 32 chunks of 32 tokens has 8, and seven of them are kept; blocks of 64
    kept = {"token-sparse": (1 + 2 * 0.2) / 3, "spec-prefill": (6 * 32 + 8) / 1000, "vertical-slash": 0.2}[method]
    assert row.kept == pytest.approx(kept, abs=0.01 if method == "vertical-slash" else 1e-9)


def test_every_chunk_is_read_once_behind_the_warm_up(models, monkeypatch):
    read = []
    monkeypatch.setattr(bench.Reading, "read", lambda self, start, clock: read.append(start))
    for mode in ("plain", "sparse"):
        read.clear()
        measured(models, mode)
        assert read == [0, 256, 768, 0, 256, 512, 768]
    read.clear()
    measured(models, "sparse", "token-sparse")
    assert read == [0, 0], "a prompt that is read whole"


def test_a_floor_is_the_larger_of_two_times():
    assert Work(flop=8e12, bytes=4e9).against(20.0, RATES) == {"tflop": 8.0, "gb": 4.0, "ms": 10.0, "percent": 50.0}
    assert Work(flop=8e9, bytes=4e12).against(2000.0, RATES)["ms"] == 1000.0
    assert Work(flop=1.0).against(1.0, {"stream_gb_s": None, "matmul_tflops": None})["percent"] is None


def test_what_fails_is_a_row_and_stops_nothing(monkeypatch):
    def broken(models, case, run, *given):
        if run.mode == "dense":
            raise RuntimeError("out of memory")
        return done(models, case, run, *given)

    done = bench.measure
    monkeypatch.setattr("outrider.bench.prefill_run.measure", broken)
    rows = list(measure_all(PrefillOptions(**SHAPE, mode=("dense", "plain")), "command", quiet))
    assert [(row.mode, row.error) for row in rows] == [("dense", "RuntimeError: out of memory"), ("plain", None)]
    assert all(row.conditions["command"] == "command" and row.conditions["pair"] == "tiny" for row in rows)


def test_the_command_writes_rows_and_shows_a_table(bench_command, tmp_path):
    outcome = bench_command("prefill", "--case", "tiny", "--device", "cpu", "--chunk", 256, "--block", 64)
    assert outcome.code == 0, outcome.err
    assert "tiny: 1000 tokens" in outcome.out and "select" in outcome.out
    lines = [json.loads(line) for line in (tmp_path / "prefill.jsonl").read_text().splitlines()]
    assert [(line["mode"], line["method"]) for line in lines] == [("plain", None), ("dense", None), ("sparse", "outrider")]
    assert {"device", "commit", "command", "stream_gb_s", "matmul_tflops", "block", "chunk"} <= lines[0]["conditions"].keys()


def test_methods_have_rows_of_their_own(bench_command, tmp_path):
    """A second run replaces what is about the same method, and what older lines, without the field, say of our own."""
    path = tmp_path / "prefill.jsonl"
    old = {"case": "tiny", "engine": "outrider", "kv_dtype": None, "seconds": 9.0}
    path.write_text("".join(json.dumps(old | {"mode": mode}) + "\n" for mode in ("sparse", "dense")))
    shape = "--case", "tiny", "--device", "cpu", "--chunk", 256, "--block", 64, "--mode", "sparse"
    outcome = bench_command("prefill", *shape, "--method", "vertical-slash", "--method", "outrider")
    assert outcome.code == 0, outcome.err
    assert "vertical-slash" in outcome.out
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["mode"], line.get("method")) for line in found] == [
        ("sparse", "outrider"),
        ("dense", None),
        ("sparse", "vertical-slash"),
    ]
    assert found[0]["seconds"] != 9.0 and found[1]["seconds"] == 9.0


def test_vllm_reads_prompts_that_it_does_not_know(vllm, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("outrider.bench.prefill_run.stream_rate", lambda device: 4000.0)
    monkeypatch.setattr("outrider.bench.prefill_run.matmul_rate", lambda device: 800.0)
    monkeypatch.setattr("outrider.bench.prefill_run.conditions", lambda device, command: {})
    given = PrefillOptions(case=("tiny",), engine=("vllm",), mode=("plain", "dense", "sparse"), peer_vllm=vllm)
    rows = list(measure_all(given, "", quiet))
    assert [(row.engine, row.mode, row.error) for row in rows] == [("vllm", "plain", None), ("vllm", "dense", None)]
    assert all(row.seconds >= 0.002 and row.conditions["vllm"] == "0.26.0" for row in rows)
    log = [json.loads(line) for line in (vllm / "log.jsonl").read_text().splitlines()]
    starts, calls = ([entry for entry in log if (name in entry)] for name in ("given", "rows"))
    assert [start["given"]["enable_prefix_caching"] for start in starts] == [False, False]
    assert ["speculative_config" in start["given"] for start in starts] == [False, True]
    assert [(call["rows"], call["length"], call["params"]["max_tokens"]) for call in calls] == [(1, 1000, 1)] * 8


def test_the_first_call_is_not_timed(monkeypatch):
    clock, costs = [0.0], [100.0, 3.0, 9.0, 4.0]

    def generate(number):
        clock[0] += costs[number]

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert first_token(generate) == 4.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"case": ("llama-8k",)}, "case: got 'llama-8k'; allowed: llama-32k, llama-128k"),
        ({"mode": ("exact",)}, "mode: got 'exact'; allowed: plain, dense, sparse"),
        ({"engine": ("transformers",)}, "engine: got 'transformers'; allowed: outrider, vllm"),
        ({"method": ("quest",)}, "method: got 'quest'; allowed: outrider, token-sparse, vertical-slash, spec-prefill"),
        (
            {"method": ("token-sparse",), "mode": ("plain",)},
            "method: got .*; allowed: nothing without engine outrider, mode sparse",
        ),
        ({"keep": 0.0}, "prefill-keep: got 0.0"),
        ({"block": 100}, "chunk: got 8192; allowed: a multiple of block = 100"),
        ({"device": "cpu"}, "device: got 'cpu'; allowed: cuda; cpu with --case tiny"),
        ({"kv_dtype": ("int4",)}, "kv-dtype: got 'int4'"),
        ({"engine": ("vllm",), "mode": ("sparse",)}, "mode: got 'sparse'; allowed: plain, dense for engine vllm"),
        ({"peer_vllm": "x"}, "peer-vllm: got 'x'; allowed: nothing without --engine vllm"),
        ({"peer_timeout": 0}, "peer-timeout: got 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        PrefillOptions(**options)


def test_runs_and_cases():
    found = PrefillOptions(kv_dtype=("auto", "fp8"), mode=("sparse", "plain"))
    assert {run.method for run in found.runs if run.mode == "sparse"} == {"outrider"}
    runs = [(run.mode, run.kv_dtype) for run in found.runs]
    assert runs == [("sparse", None), ("plain", None), ("sparse", "fp8"), ("plain", "fp8")]
    assert [case.name for case in found.cases] == ["llama-32k", "llama-128k"]
