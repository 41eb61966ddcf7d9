"""Result files: a row takes the place of the old one about the same thing."""

from __future__ import annotations

import json

import pytest

from outrider.bench.results import Row, drafting_of, replace_rows


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


def test_rows_scored_otherwise_stand_beside_each_other(tmp_path):
    """Older lines do not say what scoring read: exact keys, where it took place."""
    path = tmp_path / "decode.jsonl"
    old = [row(), row(mode="plain", drafting=None), row(mode="dense", drafting="dense")]
    path.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "scoring"}) + "\n" for one in old))
    replace_rows(path, [row(rate=2.0) | {"scoring": "4bit"}, row(mode="plain", drafting=None, rate=3.0)])
    replace_rows(path, [row(rate=4.0) | {"scoring": "exact"}, row(rate=5.0) | {"scoring": "2bit"}])
    replace_rows(path, [row(rate=6.0) | {"scoring": "4bit"}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["mode"], drafting_of(x), x["tokens_per_second"]) for x in lines] == [
        ("sparse", "dense", 4.0),
        ("plain", "", 3.0),
        ("dense", "dense", 1.0),
        ("sparse", "dense, 4bit keys", 6.0),
        ("sparse", "dense, 2bit keys", 5.0),
    ]


def test_a_file_that_cannot_be_read_is_left_alone(tmp_path):
    path = tmp_path / "decode.jsonl"
    path.write_text("no json\n")
    with pytest.raises(json.JSONDecodeError):
        replace_rows(path, [row()])
    assert path.read_text() == "no json\n"
