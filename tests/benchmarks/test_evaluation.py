"""The project's sweep as lines and tables: what belongs together stays together, and the best is told from its noise."""

from __future__ import annotations

import json

import pytest
from benchmarks.__main__ import run

from benchmarks import evaluation
from outrider.eval.rows import Row


def line(method, keep, ppl, **fields):
    base = {"task": "perplexity", "method": method, "keep": keep, "top_p": None, "ppl": ppl, "ppl_dense": [10.0] * len(ppl)}
    return base | {"kv_read_fraction": [0.25] * len(ppl), "agreement": [0.9] * len(ppl)} | fields


@pytest.fixture
def folder(tmp_path):
    """A sweep's folder: two texts, two methods, one of which has two budgets."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "sweep.json").write_text("{}", encoding="utf-8")
    for number, text in enumerate(("two", "one")):
        rows = [
            Row(task="perplexity", text=text, method=method, keep=keep, top_p=None, context=64, scored_tokens=8,
                ppl=12.0 + number, ppl_dense=10.0, agreement=0.5, conditions={"device": "x"})
            for method, keep in (("dense", None), ("sts", 0.1), ("sts", 0.05))
        ]  # fmt: skip
        (tmp_path / "rows" / f"{text}.jsonl").write_text("".join(json.dumps(row.as_dict()) + "\n" for row in rows), "utf-8")
    return tmp_path


def test_lines_hold_all_texts_in_order(folder, tmp_path):
    output = tmp_path / "lines.jsonl"
    assert run(["evaluation", str(folder), "--commit", "abc", "--output", str(output)]) == 0
    found = [json.loads(one) for one in output.read_text(encoding="utf-8").splitlines()]
    assert [(one["method"], one["keep"]) for one in found] == [("dense", None), ("sts", 0.1), ("sts", 0.05)]
    assert {tuple(one["texts"]) for one in found} == {("one", "two")} and found[1]["ppl"] == [13.0, 12.0]
    assert found[1]["conditions"] == {
        "device": "x", "commit": "abc", "command": "outrider eval sweep benchmarks/evaluation.yaml",
    }  # fmt: skip
    assert "recalled" not in found[1]
    assert run(["evaluation", str(tmp_path), "--commit", "abc", "--output", str(output)]) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == 3, "lines about the same are replaced"


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert run(["evaluation", str(tmp_path / "none"), "--commit", "abc"]) == 2
    assert "allowed: a folder that `outrider eval sweep` has made" in capsys.readouterr().err


def test_the_best_and_what_noise_hides_are_bold():
    """Paired by text: who loses a little on every text is out, who loses much on one and wins on others is not."""
    lines = [
        line("oracle", 0.1, [10.0, 10.0, 10.0, 10.0]),
        line("best", 0.1, [10.1, 10.5, 11.0, 12.0]),
        line("close", 0.1, [10.0, 10.9, 10.9, 12.1]),
        line("worse", 0.1, [10.2, 10.6, 11.1, 12.1]),
        line("dense", None, [10.0] * 4),
        line("best", 0.05, [11.0] * 4),
    ]
    header, *rows = evaluation.by_budget(lines, "perplexity")
    assert header == ["method", "10%", "5%"]
    assert rows == [
        ["oracle", "+0.00%", ""],
        ["best", "**+9.00%**", "**+10.00%**"],
        ["close", "**+9.75%**", ""],
        ["worse", "+10.00%", ""],
    ]
    assert evaluation.by_budget(lines, "kv_read_fraction")[2] == ["best", "25.0%", "25.0%"]


def test_recall_is_added_up_by_context():
    facts = {"task": "facts", "recalled": [3, 4], "asked": [4, 4]}
    lines = [line("sts", 0.1, [1, 1], context=context, **facts) for context in (16384, 32768)]
    lines.append(line("twilight", None, [1, 1], context=16384, **(facts | {"top_p": 0.95})))
    assert evaluation.recalled(lines, "context") == [
        ["method", "budget", "KV bytes read", "16,384", "32,768"],
        ["sts", "10%", "25.0%", "7/8", "7/8"],
        ["twilight", "p = 0.95", "25.0%", "7/8", ""],
    ]
