"""The draft's agreement with the target by what it reads."""

from __future__ import annotations

import torch

from benchmarks import drafting
from outrider.bench.results import replace_rows


def test_readings_are_compared_at_the_same_positions(make_pair, random_prompts, monkeypatch):
    """A draft that is the target agrees wherever it reads all; lists that hold everything change nothing."""
    readings = drafting.Reading(), drafting.Reading(keep=1.0, recent=200), drafting.Reading(keep=0.01, recent=2)
    monkeypatch.setattr(drafting, "READINGS", readings)
    [tokens] = random_prompts([120])
    target, _ = make_pair("llama", "same")
    rows = drafting.compare((target, target), tokens, 50, 4, lambda *step: None)
    assert [row["reads"] for row in rows] == ["dense", "100% and 200 recent", "1% and 2 recent"]
    assert [row["agreement"] for row in rows[:2]] == [1.0, 1.0]
    assert rows[0]["by_position"] == [1.0] * 4
    assert len(rows[2]["by_position"]) == 4


def test_a_draft_is_judged_by_the_dense_targets_choice(make_pair, random_prompts):
    [tokens] = random_prompts([60])
    target, draft = make_pair("llama")
    [row] = [row for row in drafting.compare((target, draft), tokens, 20, 3, lambda *step: None) if row["reads"] == "dense"]
    wanted, drafted = (
        model.forward(torch.tensor([tokens]), model.new_cache(1, 64)).logits[0, 40:] for model in (target, draft)
    )
    assert row["agreement"] == float((wanted.argmax(-1) == drafted.argmax(-1)).double().mean())


def test_rows_of_the_same_text_and_reading_are_replaced(tmp_path):
    rows = [{"text": "a", "reads": "dense", "agreement": n, "conditions": {}} for n in (1, 2)]
    for row in rows:
        replace_rows(tmp_path / "rows.jsonl", [row], ("text", "reads"))
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 1
