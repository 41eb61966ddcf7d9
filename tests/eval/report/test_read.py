"""Results files: what is read, and how each bad one is named."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from outrider.errors import ResultsError
from outrider.eval.report.read import TASKS, read_results

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
HEADS = {
    "task": "heads", "text": "a", "method": "outrider", "keep": 0.1, "top_p": None, "context": 64, "layers": [0, 2],
    "recall": [[0.5, 1.0], [0.25, 0.0]], "conditions": {"target": "tiny 01", "draft": "small 02"},
}  # fmt: skip
ROUND = {
    "cached": 2, "drafted": [5, 6], "drafted_pieces": ["e", "f"], "accepted": 1, "next": 7, "next_piece": "g",
    "lists": [[base64.b64encode(b"\x03").decode()]],
}  # fmt: skip
TRACE = {
    "task": "trace", "text": "a", "method": "sts", "keep": 0.1, "top_p": None, "prompt_tokens": 3, "tokens": [1, 2, 3, 5, 7],
    "pieces": ["a", "b", "c", "e", "g"], "layers": [1], "rounds": [ROUND], "all_rounds": 4,
    "conditions": {"target": "tiny 01", "draft": "small 02", "graphs": False},
}  # fmt: skip


@pytest.mark.parametrize("name", ["perplexity", "facts", "score-keys"])
def test_the_project_s_own_results_are_read(name):
    path = RESULTS / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = read_results([path]).rows
    assert [(row.text, row.method, row.keep, row.kv_read_fraction) for row in rows] == [
        (line["text"], line["method"], line["keep"], line["kv_read_fraction"]) for line in lines
    ]


def test_all_kinds_of_lines_are_read(row, write):
    more = {"text": "a", "method": "sts", "keep": None, "top_p": 0.9, "context": 64, "conditions": HEADS["conditions"]}
    overlap = {"task": "overlap", "between": "rounds", "layers": [0], "overlap": [[0.5]]} | more
    accepted = {"task": "acceptance", "by_position": [0.9, 0.5], "rounds": 12} | more
    disagreed = {
        "task": "disagreement",
        "kept_fraction": 0.1,
        "kv_read_fraction": 0.2,
        "disagreement": 0.2,
        "scored_tokens": 9,
    } | more
    results = read_results([write([row(), HEADS, overlap, accepted, disagreed, TRACE])])
    assert [type(one).__name__ for one in results.diagnostics] == ["Heads", "Overlap", "Acceptance", "Disagreement"]
    assert (len(results.rows), len(results.traces)) == (1, 1)
    assert results.traces[0].rounds[0].drafted == [5, 6] and results.rows[0] == row()


def sweep(folder, version=1, names=("one", "two"), rows=()):
    (folder / "rows").mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"version": version}))
    for name, line in zip(names, rows, strict=False):
        (folder / "rows" / f"{name}.jsonl").write_text(json.dumps(line.as_dict()) + "\n")
    return folder


def test_a_sweep_is_its_rows(row, tmp_path):
    folder = sweep(tmp_path / "s", rows=[row("a"), row("b")])
    assert [one.text for one in read_results([folder]).rows] == ["a", "b"]


def refused(*paths) -> str:
    with pytest.raises(ResultsError) as caught:
        read_results(list(paths))
    return str(caught.value)


def test_bad_folders_are_named(row, tmp_path):
    assert "a folder without sweep.json; allowed: files" in refused(tmp_path)
    assert "sweep.json, field version: got 99; allowed: 1" in refused(sweep(tmp_path / "new", version=99, rows=[row()]))
    assert "nothing to draw, no rows yet" in refused(sweep(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text("{")
    assert "sweep.json: cannot be read" in refused(tmp_path / "broken")


def test_bad_files_are_named(row, write, tmp_path):
    assert "gone.jsonl: cannot be read (No such file" in refused(tmp_path / "gone.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"task": "\xe9"}')
    assert "latin.jsonl: not UTF-8 (at offset 10)" in refused(tmp_path / "latin.jsonl")
    assert "nothing to draw, no lines" in refused(write([], "none.jsonl"))
    path = write([row()], "cut.jsonl")
    path.write_text(path.read_text() + '{"task": "perpl')
    assert "cut.jsonl, line 2: not JSON" in refused(path)
    assert "list.jsonl, line 1: got list; allowed: one JSON object a line" in refused(write([[1]], "list.jsonl"))


@pytest.mark.parametrize("task", ["decode", None, 3])
def test_unknown_tasks_are_refused(write, row, task):
    said = refused(write([row(), {"task": task}]))
    assert f"line 2, field task: got {task!r}; allowed: {', '.join(TASKS)}" in said


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("kv_read_fraction", "much", "got 'much'; allowed: a finite number"),
        ("ppl", float("inf"), "got inf; allowed: a finite number or null"),
        ("ppl", float("nan"), "allowed: a finite number or null"),
        ("context", True, "got True; allowed: a whole number"),
        ("context", 1.5, "got 1.5; allowed: a whole number"),
        ("text", None, "got None; allowed: text"),
        ("conditions", [], "got []; allowed: an object"),
        ("conditions", {}, "got no target; allowed"),
        ("intervals", {"f1": [1]}, ".f1: got [1]; allowed: a list of a finite number"),
        ("other", 1, "got 'an unknown field'; allowed: task, text"),
    ],
)
def test_bad_fields_of_rows_are_named(write, row, field, value, said):
    message = refused(write([row(), row("b").as_dict() | {field: value}]))
    assert f"line 2, field {field}" in message and said in message


def test_missing_fields_are_named(write, row):
    line = row().as_dict()
    del line["method"]
    assert "line 1, field method: got 'nothing'; allowed: text" in refused(write([line]))


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("recall", [[0.5, 1.0]], "got '1 layers'; allowed: one list for each of 2 layers"),
        ("recall", [[0.5], [0.5, 1.0]], "equally many heads in every layer"),
        ("recall", [[0.5, 1.2], [0, 0]], "got 1.2; allowed: shares in 0 .. 1"),
        ("layers", "all", "got 'all'; allowed: a list of a whole number"),
    ],
)
def test_bad_diagnostics_are_named(write, field, value, said):
    message = refused(write([HEADS | {field: value}]))
    assert f"line 1, field {field}" in message and said in message


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"pieces": ["a"]}, "field pieces: got '1 of them'; allowed: one for each of 5 tokens"),
        ({"prompt_tokens": 6}, "field prompt_tokens: got 6; allowed: 1 .. 5"),
        ({"rounds": []}, "field rounds: got 'none'; allowed: at least one"),
        ({"rounds": [ROUND, ROUND]}, "field rounds, round 2, cached: got 2; allowed: 4"),
        ({"rounds": [ROUND | {"accepted": 3}]}, "round 1, accepted: got 3; allowed: 0 .. 2"),
        ({"rounds": [ROUND | {"lists": []}]}, "round 1, lists: got '0 layers'; allowed: 1 layers"),
        ({"rounds": [ROUND | {"lists": [["AwM="]]}]}, "lists: got 'AwM='; allowed: base64 of 1 bytes"),
        ({"rounds": [ROUND | {"lists": [["</x>"]]}]}, "lists: got '</x>'; allowed: base64"),
    ],
)
def test_bad_traces_are_named(write, changed, said):
    assert said in refused(write([TRACE | changed]))


def test_models_are_not_mixed(write, row):
    other = row("b").as_dict() | {"conditions": {"target": "huge 03", "draft": "small 02"}}
    said = refused(write([row()]), write([other], "other.jsonl"))
    assert (
        "target: got 'tiny 01'" in said
        and "'huge 03'" in said
        and "rows.jsonl, line 1" in said
        and "other.jsonl, line 1" in said
    )


def test_a_row_said_twice_counts_once_and_two_results_are_refused(write, row):
    assert len(read_results([write([row(), row(seconds=9.0)])]).rows) == 1
    said = refused(write([row(), row(ppl=22.0)]))
    assert "line 2, field ppl: got 22.0 where" in said and "line 1 has 21.0" in said
    keys = row().conditions | {"score_keys": "4bit"}
    assert len(read_results([write([row(), row(ppl=22.0, conditions=keys)])]).rows) == 2
