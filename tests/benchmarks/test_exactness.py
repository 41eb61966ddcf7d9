"""Counting what of mode exact is the dense target's own, and what its guard finds."""

from __future__ import annotations

import pytest
from benchmarks.__main__ import run

from benchmarks import exactness, guard
from outrider.decoding import confirmation
from outrider.decoding.rounds import judge
from outrider.ops.token_verify import Verified

SHORT = {"sinks": 1, "recent": 2, "min_context": 8, "draft_recent": 4}


@pytest.fixture
def small(monkeypatch):
    """Settings for contexts of some tens of tokens."""
    made = [
        exactness.Setting(name="agreement", options=SHORT | {"keep": 0.2}),
        exactness.Setting(name="noise", options=SHORT | {"keep": 0.1, "exact_every": 5}, noise=True, slow=True),
        exactness.Setting(name="sampled", options=SHORT | {"keep": 0.1, "exact_every": 3}, sampled=True, slow=True),
    ]
    monkeypatch.setattr(exactness, "SETTINGS", made)
    monkeypatch.setattr(exactness, "SLOW", 2)


def compare(make_engine, make_pair, random_prompts):
    loaded = make_engine(make_pair("llama"))
    return list(exactness.compare(loaded, random_prompts([30, 40, 25]), 12, 2, lambda *step: None))


def test_every_token_is_the_dense_targets(small, make_engine, make_pair, random_prompts):
    rows = compare(make_engine, make_pair, random_prompts)
    assert [row["setting"] for row in rows] == ["agreement", "noise", "sampled"]
    assert [row["texts"] for row in rows] == [3, 2, 2], "slow ones have every second prompt"
    for row in rows:
        assert row["tokens"] == row["identical"] == 12 * row["texts"] and row["parted"] == []
        assert row["kept"] < 0.5
    assert rows[1]["accepted_per_round"] < 0.1, "a draft of noise is of no use"
    assert rows[1]["rolled_back"] > 0


def test_a_text_that_parts_is_counted_up_to_there(small, make_engine, make_pair, random_prompts, monkeypatch):
    """A judge that lets all tentative tokens pass makes of mode exact what mode sparse is."""

    def lenient(trace, logits, inputs):
        return Verified((trace.tokens >= 0).sum(-1), judge(trace, logits, inputs).next_token)

    accept = confirmation.accept
    monkeypatch.setattr(confirmation, "accept", lambda *given: accept(*given[:-1], lenient))
    row = compare(make_engine, make_pair, random_prompts)[0]
    assert row["parted"] and row["identical"] < row["tokens"]
    assert all(0 <= one["at"] < 12 and one["gap"] >= 0 for one in row["parted"])
    assert row["identical"] == row["tokens"] - sum(12 - one["at"] for one in row["parted"])


def test_the_guard_is_watched_with_good_lists_and_random_ones(make_engine, make_pair, random_prompts):
    loaded = make_engine(make_pair("llama"), min_context=8, keep=0.2)
    rows = list(guard.watch(loaded, {"a": random_prompts([60, 50])}, 16, 1, lambda *step: None))
    assert [(row["lists"], row["temperature"]) for row in rows] == [("aligned", 0.0), ("aligned", 0.8), ("random", 0.0)]
    for row in rows:
        assert row["audits"] > 4 and 0 <= row["disagreement"] <= 1 and 0 < row["recalled"] < 1
        assert len(row["audits_until_dense"]) == row["fallbacks"]


@pytest.mark.parametrize("command", ["exactness", "guard"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "--prompts: got 0; allowed: a whole number >= 1"),
        (["--tokens", "0"], "--tokens: got 0; allowed: a whole number >= 1"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: cannot be read"),
        (["--context", "5000"], "--context: got 5000; allowed: at most the 8 tokens of"),
        (["--output", "/nowhere/x.jsonl"], "--output: got '/nowhere/x.jsonl'; allowed: a file in a folder"),
    ],
)
def test_bad_input_is_refused(command, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night")
    given = arguments if "--text" in arguments else ["--text", "book.txt", *arguments]
    assert run([command, *given]) == 2
    assert message in capsys.readouterr().err
