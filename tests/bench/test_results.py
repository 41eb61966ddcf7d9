"""Result files: a row takes the place of the old one about the same thing."""

from __future__ import annotations

import json

import pytest

from outrider.bench.results import Row, replace_rows


def row(case="a", engine="outrider", mode="sparse", drafting="dense", rate=1.0) -> dict:
    made = Row(case=case, engine=engine, mode=mode, drafting=drafting, context=10, batch=1, tokens_per_second=rate)
    return made.as_dict()


def test_rows_replace_those_about_the_same(tmp_path):
    path = tmp_path / "decode.jsonl"
    replace_rows(path, [row(), row(drafting="sparse"), row(mode="plain", drafting=None), row(engine="vllm")])
    replace_rows(path, [row(drafting="sparse", rate=2.0), row(case="b"), row(mode="plain", drafting=None, rate=3.0)])
    replace_rows(path, [row() | {"kv_dtype": "fp8"}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["case"], x["engine"], x["mode"], x["drafting"], x.get("kv_dtype"), x["tokens_per_second"]) for x in lines] == [
        ("a", "outrider", "sparse", "dense", None, 1.0),
        ("a", "outrider", "sparse", "sparse", None, 2.0),
        ("a", "outrider", "plain", None, None, 3.0),
        ("a", "vllm", "sparse", "dense", None, 1.0),
        ("b", "outrider", "sparse", "dense", None, 1.0),
        ("a", "outrider", "sparse", "dense", "fp8", 1.0),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["decode.jsonl"]


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path):
    path = tmp_path / "decode.jsonl"
    path.write_text("no json\n")
    with pytest.raises(json.JSONDecodeError):
        replace_rows(path, [row()])
    assert path.read_text() == "no json\n"
