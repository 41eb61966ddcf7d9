"""`outrider eval`: tables on stdout, JSON lines in a file."""

from __future__ import annotations

import json
import os
import signal

import pytest

from outrider.cli.screen import Screen
from outrider.decoding.pair import identity
from outrider.eval.rows import append_rows
from outrider.guidance.controller import Controller, ControllerFile, save
from outrider.models import load_model

ROW = {
    *("task", "text", "method", "keep", "top_p", "context", "scored_tokens", "ppl", "ppl_dense", "delta_percent"),
    *("agreement", "recalled", "asked", "kept_fraction", "kv_read_fraction", "seconds"),
}


@pytest.fixture
def flags(pair, folder, alignment) -> list[str]:
    """What both tasks need."""
    models = [*pair, "--alignment", alignment, "--min-context", "8", "--recent", "4"]
    return [*models, "--text", str(folder / "text.txt"), "--text", str(folder / "other.txt")]


PERPLEXITY = ["eval", "perplexity", "--context", "160", "--scored-tokens", "12"]
FACTS = ["eval", "facts", "--context", "640", "--facts", "2", "--seed", "3"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_perplexity_appends_a_line_for_every_text_method_and_budget(outrider, flags, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"old": true}\n')
    methods = [flag for method in ("dense", "sts", "outrider") for flag in ("--method", method)]
    outcome = outrider(*PERPLEXITY, *flags, *methods, "--keep", "0.2", "--keep", "1", "--json", path)
    assert outcome.code == 0 and outcome.err == ""
    old, *rows = lines(path)
    assert old == {"old": True}
    cases = [("dense", None), ("sts", 0.2), ("sts", 1.0), ("outrider", 0.2), ("outrider", 1.0)]
    assert [(row["text"], row["method"], row["keep"]) for row in rows] == [(t, *c) for t in ("text", "other") for c in cases]
    for row in rows:
        assert set(row) >= ROW and row["task"] == "perplexity" and row["top_p"] is None
        assert (row["context"], row["scored_tokens"]) == (160, 12)
        if row["method"] == "dense" or row["keep"] == 1:
            assert abs(row["delta_percent"]) < 0.1
    assert {"text", "other", "mean of 2"} <= {line.strip() for line in outcome.out.splitlines()}
    assert f"{rows[1]['ppl']:.3f}" in outcome.out and "keep 0.2" in outcome.out and "recalled" not in outcome.out


def test_facts_counts_what_is_recalled(outrider, flags, tmp_path):
    path = tmp_path / "rows.jsonl"
    outcome = outrider(*FACTS, *flags, "--top-p", "0.9", "--json", path)
    assert outcome.code == 0, outcome.err
    rows = lines(path)
    assert [(row["task"], row["method"], row["top_p"], row["keep"]) for row in rows] == [("facts", "outrider", 0.9, None)] * 2
    assert all(set(row) >= ROW and row["asked"] == 2 and 0 <= row["recalled"] <= 2 for row in rows)
    assert "/2" in outcome.out and "/4" in outcome.out and "ppl" not in outcome.out


def test_default_is_outrider_at_a_tenth(outrider, flags):
    outcome = outrider(*PERPLEXITY, *flags[:-2])
    assert outcome.code == 0
    assert "outrider" in outcome.out and "keep 0.1" in outcome.out and "mean of" not in outcome.out


def test_dense_needs_no_alignment(outrider, pair, folder):
    assert outrider(*PERPLEXITY, *pair, "--text", folder / "text.txt", "--method", "dense").code == 0


def test_interrupt_keeps_the_rows_that_were_done(outrider, flags, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"

    def append_then_interrupt(path, rows, command):
        append_rows(path, rows, command)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("outrider.eval.rows.append_rows", append_then_interrupt)
    outcome = outrider(*PERPLEXITY, *flags, "--keep", "0.2", "--keep", "0.3", "--json", path)
    assert outcome.code == 130 and outcome.err == "outrider: interrupted\n"
    assert "text, interrupted" in outcome.out and len(lines(path)) == 1


def test_interrupt_before_the_first_row_leaves_no_file(outrider, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(Screen, "progress", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    outcome = outrider(*PERPLEXITY, *flags, "--json", tmp_path / "rows.jsonl")
    assert (outcome.code, outcome.out) == (130, "") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--method", "magic"], "method: got 'magic'; allowed: dense, outrider, sts, specattn"),
        (["--keep", "2"], "keep: got 2.0; allowed: a number in (0, 1]"),
        (["--keep", "0.1", "--top-p", "0.9"], "keep and top-p: got ((0.1,), (0.9,)); allowed: only one of the two"),
        (["-K", "0"], "K (draft-tokens): got 0; allowed: "),
        (["--score-keys", "8bit"], "score-keys: got '8bit'; allowed: auto, exact, 4bit, 2bit"),
        (["--score-keys", "4bit"], "score-keys: got '4bit'; allowed: exact"),
        (["--context", "100000"], "context: got 100000; allowed: "),
        (["--dtype", "int8"], "dtype: got 'int8'; allowed: "),
        (["--map", "joint+magic"], "alignment map: got 'joint+magic'; allowed"),
    ],
)
@pytest.mark.parametrize("task", [PERPLEXITY, FACTS], ids=["perplexity", "facts"])
def test_bad_options(fails, flags, task, wrong, message, tmp_path):
    assert fails(*task, *flags, *wrong, "--json", tmp_path / "rows.jsonl").startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_bad_numbers_of_one_task(fails, flags):
    assert fails(*PERPLEXITY, *flags, "--scored-tokens", "0").startswith("scored-tokens: got 0; allowed: ")
    assert fails(*FACTS, *flags, "--facts", "0").startswith("facts: got 0; allowed: ")


def test_bad_texts_and_places(fails, flags, pair, folder, tmp_path):
    assert "No such file" in fails(*PERPLEXITY, *flags, "--text", tmp_path / "none.txt")
    assert "at least 160" in fails(*PERPLEXITY, *flags, "--text", folder / "short.txt")
    assert fails(*PERPLEXITY, *flags, "--json", tmp_path / "none" / "rows.jsonl").startswith("json: got ")
    assert fails(*PERPLEXITY, *pair, "--text", folder / "text.txt").startswith("alignment: got None; allowed: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", [PERPLEXITY, FACTS], ids=["perplexity", "facts"])
def test_caches_in_8_bits_are_used_and_named(task, outrider, flags, tmp_path):
    path = tmp_path / "rows.jsonl"
    for kv_dtype in ("auto", "fp8"):
        assert outrider(*task, *flags[:-2], "--kv-dtype", kv_dtype, "--json", path).code == 0
    wide, narrow = lines(path)
    assert [row["conditions"]["kv_dtype"] for row in (wide, narrow)] == ["auto", "fp8"]
    if task is PERPLEXITY:
        assert wide["ppl_dense"] != narrow["ppl_dense"]
        assert narrow["ppl_dense"] == pytest.approx(wide["ppl_dense"], rel=0.1)


class TestDiagnose:
    FLAGS = ("eval", "diagnose", "--context", "120", "--scored-tokens", "12")

    def test_appends_lines_and_prints_tables_of_every_text_and_the_means(self, outrider, flags, tmp_path):
        path = tmp_path / "rows.jsonl"
        methods = [flag for method in ("dense", "outrider", "quest") for flag in ("--method", method)]
        outcome = outrider(*self.FLAGS, *flags, *methods, "--keep", "0.2", "--json", path)
        assert outcome.code == 0 and outcome.err == "", outcome.err
        rows = lines(path)
        lists = ["heads", "overlap", "overlap"]
        tasks = ["disagreement", "acceptance", *2 * ["disagreement", *lists, "acceptance"]]
        assert [(row["text"], row["task"]) for row in rows] == [(text, task) for text in ("text", "other") for task in tasks]
        assert all(row["conditions"]["command"].startswith("outrider") for row in rows)
        shown = [line.strip() for line in outcome.out.splitlines()]
        assert [line for line in shown if line in ("text", "other", "mean of 2")] == ["text", "other", "mean of 2"]
        heads = rows[3]["recall"]
        recall = sum(map(sum, heads)) / sum(map(len, heads))
        lowest, layer, head = min((value, layer, head) for layer, row in enumerate(heads) for head, value in enumerate(row))
        assert f"{recall:.3f}" in outcome.out and f"{lowest:.3f} (layer {layer}, head {head})" in outcome.out
        assert f"{100 * rows[2]['disagreement']:.1f}%" in outcome.out
        assert " ".join(f"{share:.2f}" for share in rows[6]["by_position"]) in outcome.out

    def test_interrupt_keeps_what_was_done(self, outrider, flags, tmp_path, monkeypatch):
        path = tmp_path / "rows.jsonl"

        def append_then_interrupt(path, rows, command):
            append_rows(path, rows, command)
            os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr("outrider.eval.rows.append_rows", append_then_interrupt)
        outcome = outrider(*self.FLAGS, *flags, "--keep", "0.2", "--json", path)
        assert outcome.code == 130 and outcome.err == "outrider: interrupted\n"
        assert "text, interrupted" in outcome.out and [row["task"] for row in lines(path)] == ["disagreement"]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (["--method", "magic"], "method: got 'magic'; allowed: dense, outrider, sts, specattn"),
            (["--scored-tokens", "5"], "scored-tokens: got 5; allowed: 6 .. context - 1 = 119"),
            (["--min-context", "500"], "min-context: got 500; allowed: at most 107, "),
            (["--context", "100000"], "context: got 100000; allowed: "),
        ],
    )
    def test_bad_options(self, fails, flags, wrong, message, tmp_path):
        assert fails(*self.FLAGS, *flags, *wrong, "--json", tmp_path / "rows.jsonl").startswith(message)
        assert list(tmp_path.iterdir()) == []


def test_a_controller_comes_from_a_file(outrider, fails, flags, folder, tmp_path):
    """Read by method adore, which needs it."""
    target, path = load_model(str(folder / "target")), tmp_path / "controller.safetensors"
    made = Controller(target.module.get_input_embeddings().weight.shape[1], width=4)
    save(ControllerFile(target=identity(target), text="none", text_digest="", tokens=0, controller=made), path)
    method = [*flags, "--method", "adore", "--keep", "0.2"]
    for command in (PERPLEXITY, FACTS):
        complaint = fails(*command, *method)
        assert complaint.startswith("controller: got None; allowed: a file made by `recipes/adore` for this target")
        outcome = outrider(*command, *method, "--controller", path, "--json", tmp_path / "rows.jsonl")
        assert outcome.code == 0, outcome.err
    rows = lines(tmp_path / "rows.jsonl")
    assert {(row["method"], row["task"]) for row in rows} == {("adore", "perplexity"), ("adore", "facts")}
    assert "cannot be read" in fails(*PERPLEXITY, *method, "--controller", tmp_path / "none.safetensors")


def test_channels_come_from_a_file(outrider, fails, flags, pair, folder, tmp_path):
    """Written by `calibrate --channels`, read by method double-sparsity, which needs them."""
    path = tmp_path / "channels.json"
    method = [*flags, "--method", "double-sparsity", "--keep", "0.2"]
    assert fails(*PERPLEXITY, *method).startswith("channels: got None; allowed: a file made by `outrider calibrate --channels`")
    calibrate = ["calibrate", *pair, "--text", folder / "text.txt", "--tokens", "256", "--rounds", "8", "--channels", path]
    assert "another file than --out" in fails(*calibrate, "--out", path)
    outcome = outrider(*calibrate, "--out", tmp_path / "alignment.json")
    assert outcome.code == 0 and str(path) in outcome.out.replace("\n", "")
    outcome = outrider(*PERPLEXITY, *method, "--channels", path, "--json", tmp_path / "rows.jsonl")
    assert outcome.code == 0, outcome.err
    assert {row["method"] for row in lines(tmp_path / "rows.jsonl")} == {"double-sparsity"}
    assert "cannot be read" in fails(*PERPLEXITY, *method, "--channels", tmp_path / "none.json")


PREFILL = ["eval", "prefill", "--context", "640", "--scored-tokens", "100", "--continued", "40", "--facts", "2"]
BLOCKS = ["--prefill-chunk", "64", "--prefill-block", "16", "--prefill-min-context", "64"]


def test_prefill_appends_a_line_for_every_part(outrider, flags, tmp_path):
    path = tmp_path / "rows.jsonl"
    outcome = outrider(*PREFILL, *BLOCKS, *flags, "--method", "dense", "--method", "outrider", "--keep", "0.2", "--json", path)
    assert outcome.code == 0 and outcome.err == ""
    rows = lines(path)
    parts = ("prompt", "continuation", "facts")
    assert [(r["text"], r["method"], r["part"]) for r in rows] == [
        (text, method, part) for text in ("text", "other") for method in ("dense", "outrider") for part in parts
    ]
    assert all(0.18 < row["kept_fraction"] < 0.25 for row in rows if row["method"] == "outrider")
    assert rows[0]["conditions"]["prefill_block"] == 16
    assert "continuation" in outcome.out


def test_prefill_reads_as_others_do(outrider, flags, tmp_path):
    path = tmp_path / "rows.jsonl"
    methods = ("token-sparse", "vertical-slash", "spec-prefill")
    chosen = [word for method in methods for word in ("--method", method)]
    outcome = outrider(*PREFILL, *BLOCKS, *flags, *chosen, "--keep", "0.4", "--keep", "0.8", "--json", path)
    assert outcome.code == 0 and outcome.err == ""
    kept = {(row["method"], row["keep"]): row["kept_fraction"] for row in lines(path) if row["part"] == "facts"}
    assert kept.keys() == {(method, keep) for method in methods for keep in (0.4, 0.8)}
    assert all(kept[method, 0.4] < kept[method, 0.8] < 1 for method in methods)
    assert all(method in outcome.out for method in methods)


def test_prefill_refuses_what_it_cannot_do(outrider, flags):
    for more, message in (
        (["--method", "quest"], "method: got 'quest'; allowed: dense, outrider"),
        (["--prefill-chunk", "40"], "prefill-chunk: got 40; allowed: a multiple of prefill-block = 16"),
    ):
        outcome = outrider(*PREFILL, *BLOCKS, *flags, *more)
        assert outcome.code == 2 and message in outcome.err
