"""`outrider generate --trace` and `outrider report`: files that come whole or not at all, and every bad input."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from outrider.eval.report.read import read_results

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHORT = ["--max-new-tokens", "8", "--ignore-eos", "--min-context", "8", "--recent", "4", "--keep", "0.3"]


@pytest.fixture
def generate(outrider, pair, folder, alignment):
    """Run `outrider generate` behind 100 tokens of a text."""
    flags = [*pair, "--alignment", alignment, "--prompt-file", str(folder / "text.txt"), "--prompt-tokens", "100", *SHORT]
    return lambda *more: outrider("generate", *flags, *more)


def test_a_trace_becomes_a_page(generate, outrider, tmp_path):
    trace, stats = tmp_path / "trace.jsonl", tmp_path / "stats.json"
    outcome = generate("--mode", "dense", "--mode", "sparse", "--trace", trace, "--stats-json", stats)
    assert outcome.code == 0, outcome.err
    [line] = read_results([trace]).traces
    sparse = json.loads(stats.read_text())[1]
    assert (len(line.rounds), sum(one.accepted for one in line.rounds)) == (sparse["rounds"], sparse["accepted"])
    assert (line.text, line.prompt_tokens, line.method, line.keep) == ("text", 100, "outrider", 0.3)
    assert line.conditions.keys() >= {"target", "draft", "graphs", "command"}
    done = outrider("report", trace, "--output", tmp_path / "page")
    assert done.code == 0 and done.out.split() == f"wrote {tmp_path / 'page' / 'index.html'} and 0 figures beside it".split()
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["index.html"]


def test_prompts_are_told_apart_and_rounds_are_limited(outrider, pair, alignment, folder, tmp_path):
    flags = [*pair, "--alignment", alignment, *SHORT, "--trace", tmp_path / "t", "--trace-rounds", "1"]
    prompts = ["--prompt", "the old house walked toward the river", "--prompt-file", folder / "short.txt"]
    assert outrider("generate", *flags, *prompts).code == 0
    lines = read_results([tmp_path / "t"]).traces
    assert [(line.text, len(line.rounds), line.all_rounds > 1) for line in lines] == [("prompt 1", 1, True), ("short", 1, True)]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--mode", "dense"], "mode (of a trace): got 'dense'; allowed: sparse, once"),
        (["--trace-rounds", "0"], "trace-rounds: got 0; allowed: a whole number >= 1"),
        (["--device", "cuda"], "trace: got"),
    ],
)
def test_what_cannot_be_traced_is_said_before_any_work(fails, tmp_path, flags, said):
    assert said in fails("generate", "--prompt", "x", "--trace", tmp_path / "t", *flags)
    assert not (tmp_path / "t").exists()


def test_a_trace_that_cannot_be_written_is_said_before_any_work(fails, tmp_path):
    assert "trace: got" in fails("generate", "--prompt", "x", "--trace", tmp_path / "gone" / "t")


def test_results_become_a_page_and_pictures(outrider, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("old")
    rows = [json.loads(line) for line in (RESULTS / "perplexity.jsonl").read_text().splitlines()]
    rows = [row | {"keep": None, "top_p": 1 - row["keep"]} for row in rows if row["method"] == "specattn"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outrider("report", tmp_path / "rows.jsonl", "--output", tmp_path / "out").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.html",
        "perplexity-16384-agreement.png",
        "perplexity-16384-delta_percent.png",
    ]
    assert "top-p 0.95" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_bad_inputs_leave_nothing(fails, tmp_path):
    out = tmp_path / "out"
    assert "gone.jsonl: cannot be read" in fails("report", tmp_path / "gone.jsonl", "--output", out)
    (tmp_path / "empty").write_text("")
    assert "nothing to draw" in fails("report", tmp_path / "empty", "--output", out)
    decode = RESULTS / "decode.jsonl"
    assert f"{decode}, line 1, field task: got None; allowed: perplexity" in fails("report", decode, "--output", out)
    assert not out.exists()
    assert "output: got" in fails("report", decode, "--output", tmp_path / "empty")
    assert "output: got" in fails("report", decode, "--output", tmp_path / "missing" / "out")
    assert "Missing" in fails("report", "--output", out) and "Missing" in fails("report", decode)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_closed_folder_is_refused(fails, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "output: got" in fails("report", RESULTS / "facts.jsonl", "--output", tmp_path / "closed")


def test_an_interrupted_run_leaves_the_old_page(outrider, tmp_path, monkeypatch):
    """Files are replaced in one step, and the page comes last."""
    (tmp_path / "index.html").write_text("old")
    (tmp_path / "a").write_text("")
    monkeypatch.setattr("outrider.eval.report.page.make", lambda *_: {"a.png": b"picture", "index.html": b"new"})
    replaced = []

    def replace(source, target):
        if Path(target).name == "index.html":
            raise KeyboardInterrupt
        replaced.append(Path(target).name)
        os.rename(source, target)

    monkeypatch.setattr("outrider.cli.files.os.replace", replace)
    assert outrider("report", tmp_path / "a", "--output", tmp_path).code == 130
    assert (tmp_path / "index.html").read_text() == "old" and replaced == ["a.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.png", "index.html"]
