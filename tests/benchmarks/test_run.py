"""A run: correctness first, peers beside, rows in their file; what fails is said and written nowhere."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from benchmarks.__main__ import run_cases
from benchmarks.kernels import show
from benchmarks.kernels.attention_mass import AttentionMass
from benchmarks.kernels.rows import STREAM, Row, best_peer, replace_rows
from benchmarks.kernels.run import measure
from benchmarks.kernels.sparse_attention import SparseAttention
from benchmarks.kernels.token_select import TokenSelect
from benchmarks.kernels.unlisted_mass import UnlistedMass
from benchmarks.peers import Peer

from outrider.cli.screen import Screen

TINY = {"S": 200, "B": 1, "Hq": 8, "Hkv": 2, "D": 16}


def row(id="a", backend="triton", us=10.0, **changes) -> Row:
    made = Row(
        id=id, backend=backend, us=us, us_min=us - 1, us_chained=us - 2, gb=0.04, gb_s=4000.0, stream_fraction=0.9,
        key_fraction=None, peers={"P": 20.0}, peers_chained={"P": 19.0}, ratio=2.0, error=1e-3, conditions={"torch": "2.11"},
    )  # fmt: skip
    return replace(made, **changes)


def test_every_case_gives_a_row(case, make_bench, notes, clock):
    timer = clock([8.0])
    rows, well = measure(case, make_bench(timer))
    assert well and len(rows) == 1
    made = rows[0]
    assert (made.id, made.backend, made.us, made.us_min, made.us_chained) == (case.id, "reference", 8.0, 7.0, 8.0)
    assert made.error <= case.tolerance
    assert made.gb == case.fewest_bytes(case.inputs(torch.device("cpu"))) / 1e9
    assert made.gb_s == pytest.approx(made.gb / 8e-6)
    assert made.stream_fraction == pytest.approx(made.gb_s / 4000)
    operations = case.operations(case.inputs(torch.device("cpu")))
    assert made.tflop_s == (None if operations is None else pytest.approx(operations / 8e6))
    assert made.conditions == {"stream_gb_s": 4000.0}
    assert set(timer.asked) == {1, 8}
    assert not any("FAILED" in note for note in notes)
    left_out = {peer.name for peer in case.peers() if peer.needs}
    assert {note.split("peer ")[1].split(" left")[0] for note in notes} == left_out
    assert {*made.peers} - {STREAM} == {*made.peers_chained} == {peer.name for peer in case.peers() if not peer.needs}


def test_peers_are_timed_and_compared(make_bench, clock):
    rows, _ = measure(TokenSelect(id="x", R=8, S=1000), make_bench(clock([30.0, 28.0, 10.0, 9.0])))
    assert rows[0].peers == {"torch.topk": 30.0}
    assert rows[0].peers_chained == {"torch.topk": 28.0}
    assert (rows[0].us, rows[0].us_chained, rows[0].ratio) == (10.0, 9.0, 3.0)


def test_reading_the_keys_is_shown_and_is_no_peer(make_bench, clock):
    case = AttentionMass(id="x", **TINY)
    rows, _ = measure(case, make_bench(clock([30.0, 28.0, 10.0, 9.0])))
    stream = case.key_bytes(case.inputs(torch.device("cpu"))) / 4000e9 * 1e6
    assert rows[0].peers == {"torch": 30.0, STREAM: pytest.approx(stream)}
    assert rows[0].key_fraction == pytest.approx(stream / 10)
    assert rows[0].ratio == 3.0
    assert best_peer({STREAM: 1.0}) is None


def test_what_cannot_be_captured_is_named_so(make_bench, clock):
    rows, _ = measure(TokenSelect(id="x", R=8, S=1000), make_bench(clock(graph=False)))
    assert [*rows[0].peers] == ["torch.topk (eager)"]


def test_a_quick_run_has_no_chains(make_bench, clock):
    timer = clock()
    rows, _ = measure(TokenSelect(id="x", R=8, S=1000), make_bench(timer, chained=False))
    assert rows[0].us_chained is None and rows[0].peers_chained == {} and timer.asked == [1, 1]


@dataclass(frozen=True, kw_only=True)
class Wrong(SparseAttention):
    def run(self, inputs, backend):
        right = SparseAttention.run(self, inputs, "reference")
        if backend == "cuda":
            raise ValueError("backend: 'cuda' cannot run this call: head dim 16")
        if backend == "auto":
            raise RuntimeError("illegal memory access")
        return right * 1.5 if backend == "triton" else right


def test_a_wrong_result_makes_no_row_and_is_never_timed(make_bench, notes, clock):
    timer = clock()
    rows, well = measure(Wrong(id="x", **TINY), make_bench(timer, backends=["triton"]))
    assert (rows, well, timer.asked) == ([], False, [])
    assert notes == ["x: triton FAILED: wrong result: error 0.5, allowed 0.01"]


def test_one_backend_does_not_stop_the_others(make_bench, notes):
    rows, well = measure(Wrong(id="x", **TINY), make_bench(backends=["triton", "cuda", "auto", "reference"]))
    assert [made.backend for made in rows] == ["reference"] and not well
    assert "x: left out: backend: 'cuda' cannot run this call: head dim 16" in notes
    assert "x: auto FAILED: RuntimeError: illegal memory access" in notes


def test_a_backend_that_does_not_take_the_case_is_no_failure(make_bench):
    assert measure(Wrong(id="x", **TINY), make_bench(backends=["cuda"])) == ([], True)
    assert measure(UnlistedMass(id="x", R=8, S=200), make_bench(backends=["cuda"])) == ([], True)  # has no such backend


def fails(inputs):
    raise RuntimeError("no kernel image")


@dataclass(frozen=True, kw_only=True)
class Compared(TokenSelect):
    def peers(self):
        return [
            Peer(name="broken", prepare=fails),
            Peer(name="wrong", prepare=lambda inputs: lambda: 0, error=lambda inputs, output: 0.7),
            Peer(name="nan", prepare=lambda inputs: lambda: 0, error=lambda inputs, output: float("nan")),
            Peer(name="absent", prepare=fails, needs="--peer-fa3"),
            Peer(name="fine", prepare=lambda inputs: lambda: 0),
        ]


def test_a_failing_peer_is_said_and_left_out(make_bench, notes):
    rows, well = measure(Compared(id="x", R=8, S=1000), make_bench(missing={"--peer-fa3": "--peer-fa3 not given"}))
    assert well and [*rows[0].peers] == ["fine"]
    assert notes == [
        "x: peer broken FAILED: RuntimeError: no kernel image",
        "x: peer wrong FAILED: RuntimeError: wrong result: error 0.7, allowed 0.02",
        "x: peer nan FAILED: RuntimeError: wrong result: error nan, allowed 0.02",
        "x: peer absent left out: --peer-fa3 not given",
    ]


def test_rows_replace_those_of_their_case_and_backend(tmp_path):
    path = tmp_path / "kernels.jsonl"
    replace_rows(path, [row("a"), row("b"), row("b", "cuda")])
    replace_rows(path, [row("c"), row("b", us=7.0)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["id"], line["backend"], line["us"]) for line in lines] == [
        ("a", "triton", 10.0),
        ("b", "triton", 7.0),
        ("b", "cuda", 10.0),
        ("c", "triton", 10.0),
    ]
    needed = "id backend us us_min us_chained gb gb_s stream_fraction peers peers_chained ratio error conditions"
    assert {*needed.split(), "key_fraction", "tflop_s"} == {*lines[0]}
    assert [file.name for file in tmp_path.iterdir()] == ["kernels.jsonl"]


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path):
    path = tmp_path / "kernels.jsonl"
    path.write_text("no json\n")
    with pytest.raises(json.JSONDecodeError):
        replace_rows(path, [row()])
    assert path.read_text() == "no json\n"


def test_a_whole_run(tmp_path, make_bench, notes, clock, capsys):
    path = tmp_path / "kernels.jsonl"
    cases = [TokenSelect(id="token_select-x", R=8, S=1000), AttentionMass(id="attention_mass-x", **TINY)]
    assert run_cases(cases, make_bench(clock([30.0, 28.0, 10.0, 9.0])), path, Screen())
    shown = capsys.readouterr().out
    assert "stream_gb_s   4000" in shown
    assert "token_select: us, single / chained" in shown and "attention_mass: us, single / chained" in shown
    assert "10.0 / 9.00" in shown and "30.0 / 28.0" in shown and "3.00x" in shown and "K of stream" in shown
    assert len(path.read_text().splitlines()) == 2
    assert any(note.startswith("token_select-x reference: 10.0 us, ") and "torch.topk 30.0" in note for note in notes)
    assert not run_cases([Wrong(id="x", **TINY)], make_bench(backends=["triton"]), path, Screen())
    assert len(path.read_text().splitlines()) == 2


def test_operations_have_a_column_where_they_are_counted():
    counted, other = show.tables([row(tflop_s=412.3), row(id="b")], {"a": "chunk_attention", "b": "token_select"})
    headers = [str(column.header) for column in counted.columns]
    assert next(iter(counted.columns[headers.index("TFLOP/s")].cells)).plain == "412"
    assert "TFLOP/s" not in [str(column.header) for column in other.columns]


def test_figures_are_short():
    assert [show.number(x) for x in (5.038, 31.52, 141.4, 4386.2)] == ["5.04", "31.5", "141", "4386"]
    assert show.times(None, None) == "-" and show.times(5.0, None) == "5.00"
