"""Result rows: appended whole, read back, averaged."""

from __future__ import annotations

import json

import pytest

from outrider.errors import OptionError
from outrider.eval.rows import Row, append_rows, check_rows_path, summarize


def row(text: str, method: str = "outrider", keep: float | None = 0.1, ppl: float = 20.0, **fields) -> Row:
    fields = {"ppl_dense": 20.0, "delta_percent": 100 * (ppl / 20 - 1), "agreement": 0.9} | fields
    return Row(
        task="perplexity", text=text, method=method, keep=keep, top_p=None, context=64, scored_tokens=8, ppl=ppl, **fields
    )


def test_rows_are_appended_as_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [row("a"), row("b")])
    append_rows(path, [row("c", recalled=3, asked=4)], command="outrider eval")
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["text"] for line in read] == ["a", "b", "c"]
    assert read[2]["recalled"] == 3
    assert read[2]["conditions"] == {"command": "outrider eval"}
    assert {"task", "method", "keep", "top_p", "context", "scored_tokens", "ppl", "ppl_dense", "delta_percent"} <= read[
        0
    ].keys()
    assert {"agreement", "recalled", "asked", "kept_fraction", "kv_read_fraction", "seconds"} <= read[0].keys()


def test_path_is_checked_without_leaving_a_file(tmp_path):
    check_rows_path(tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()
    (tmp_path / "old.jsonl").write_text("{}\n")
    check_rows_path(tmp_path / "old.jsonl")
    assert (tmp_path / "old.jsonl").read_text() == "{}\n"
    with pytest.raises(OptionError, match=r"json: got .*missing"):
        check_rows_path(tmp_path / "missing" / "rows.jsonl")
    with pytest.raises(OptionError, match="json"):
        check_rows_path(tmp_path)


def test_means_are_over_texts_by_method_and_budget():
    rows = [row("a", ppl=20), row("a", keep=0.05, ppl=30), row("b", ppl=22), row("b", keep=0.05, ppl=31)]
    means = summarize(rows)
    assert [(mean.text, mean.keep, mean.ppl) for mean in means] == [("mean of 2", 0.1, 21), ("mean of 2", 0.05, 30.5)]
    assert means[0].delta_percent == pytest.approx(5)
    assert means[0].scored_tokens == 16
    assert means[0].recalled is None
    facts = summarize([row("a", recalled=1, asked=2), row("b", recalled=2, asked=2)])
    assert (facts[0].recalled, facts[0].asked) == (3, 4)


def test_parts_of_a_task_are_kept_apart():
    means = summarize([row("a", part="single"), row("a", part="multi-key"), row("b", part="single")])
    assert [(mean.part, mean.text) for mean in means] == [("single", "mean of 2"), ("multi-key", "mean of 1")]


def test_intervals_are_over_documents():
    [mean] = summarize([row("a", ppl=20.2, recalled=1, asked=2), row("b", ppl=20.6, recalled=2, asked=2, agreement=0.8)])
    assert mean.delta_percent == pytest.approx(2)
    assert {name: pytest.approx(interval) for name, interval in mean.intervals.items()} == {
        "delta_percent": (1, 3),
        "agreement": (0.8, 0.9),
        "recall": (0.5, 1),
    }
    assert json.loads(json.dumps(mean.as_dict()))["intervals"]["recall"] == [0.5, 1]
    [scored] = summarize([row("a", f1=0.5, rouge_l=0.25), row("b", f1=0.7, rouge_l=0.35)])
    assert (scored.f1, scored.rouge_l) == (pytest.approx(0.6), pytest.approx(0.3))
    assert scored.intervals["f1"] == pytest.approx((0.5, 0.7)) and scored.intervals["rouge_l"] == pytest.approx((0.25, 0.35))


def test_one_document_has_no_interval_nor_has_dense_against_itself():
    assert summarize([row("a", recalled=1, asked=2)])[0].intervals == {}
    rows = [row(text, method="dense", keep=None, recalled=2, asked=4) for text in "ab"]
    assert summarize(rows)[0].intervals == {"recall": (0.5, 0.5)}
