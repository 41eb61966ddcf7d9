"""`outrider eval ruler` and `outrider eval qa`: answers that are generated; intervals in the closing tables."""

from __future__ import annotations

import json
import re

import pytest


@pytest.fixture(scope="module")
def novel(folder, book):
    path = folder / "novel.txt"
    path.write_text(book[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tales(folder):
    path = folder / "tales.jsonl"
    records = [
        {"tale": ["Once there was a king.", f"He had {n} stones."], "asked": [{"q": "Who had stones?", "a": ["a king"]}] * 2}
        for n in ("two", "three", "four")
    ]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.fixture
def flags(pair, alignment) -> list[str]:
    return [*pair, "--alignment", alignment, "--min-context", "8", "--recent", "4"]


FIELDS = ["--context-field", "tale", "--question-field", "asked.q", "--answers-field", "asked.a"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ruler_runs_every_family(outrider, flags, novel, tmp_path, monkeypatch):
    for tokens in ("needles.RULER_TOKENS", "tracing.TOKENS", "counting.COMMON_TOKENS", "counting.FREQUENT_TOKENS"):
        monkeypatch.setattr(f"outrider.eval.ruler.{tokens}", 5)
    path = tmp_path / "rows.jsonl"
    outcome = outrider("eval", "ruler", *flags, "--text", novel, "--context", 1900, "--samples", 1, "--json", path)
    assert outcome.code == 0 and outcome.err == "", outcome.err
    rows = lines(path)
    families = ["single", "multi-key", "multi-value", "multi-query", "variable-tracking", "common-words", "frequent-words"]
    assert [(row["part"], row["method"]) for row in rows] == [(f, m) for f in families for m in ("dense", "outrider")]
    assert {(row["task"], row["text"], row["context"]) for row in rows} == {("ruler", "novel 1", 1900)}
    assert [row["asked"] for row in rows[::2]] == [1, 1, 4, 4, 5, 10, 3] and rows[0]["conditions"]["style"] == "ruler"
    assert all(family in outcome.out for family in families) and "/10" in outcome.out and "[" not in outcome.out


def test_ruler_shows_intervals_over_samples(outrider, flags, novel):
    options = ["--context", 500, "--samples", 3, "--family", "single", "--style", "facts"]
    outcome = outrider("eval", "ruler", *flags, "--text", novel, *options)
    assert outcome.code == 0, outcome.err
    assert "mean of 3" in outcome.out and len(re.findall(r"\d/3 \[\d+%, \d+%\]", outcome.out)) == 2


def test_qa_scores_and_shows_intervals(outrider, flags, tales, novel, tmp_path):
    path = tmp_path / "rows.jsonl"
    options = ["--data", tales, *FIELDS, "--context", 300, "--max-new-tokens", 6, "--json", path]
    outcome = outrider("eval", "qa", *flags, *options, "--documents", 2, "--plant-in", novel)
    assert outcome.code == 0 and outcome.err == "", outcome.err
    rows = lines(path)
    assert [(row["text"], row["method"]) for row in rows] == [(f"tales {n}", m) for n in (1, 2) for m in ("dense", "outrider")]
    assert all(row["task"] == "qa" and row["asked"] == 2 and 0 <= row["f1"] <= 1 and 0 <= row["rouge_l"] <= 1 for row in rows)
    assert rows[0]["conditions"]["plant_in"] == "novel"
    assert all(word in outcome.out for word in ("token F1", "ROUGE-L", "questions", "mean of 2", " ["))
    assert "recalled" not in outcome.out


def test_perplexity_shows_paired_intervals(outrider, flags, folder):
    texts = ["--text", folder / "text.txt", "--text", folder / "other.txt"]
    outcome = outrider("eval", "perplexity", *flags, *texts, "--context", 160, "--scored-tokens", 12)
    assert outcome.code == 0
    means = outcome.out.split("mean of 2")[1]
    assert re.search(r"[+-]\d+\.\d\d% \[-?\d+\.\d, -?\d+\.\d\]", means)
    assert "%] " not in outcome.out.split("mean of 2")[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--family", "haystack"], "family: got 'haystack'; allowed: single, multi-key, multi-value, multi-query, variable-"),
        (["--style", "poem"], "style: got 'poem'; allowed: facts, ruler"),
        (["--samples", "0"], "samples: got 0; allowed: a whole number >= 1"),
    ],
)
def test_bad_options_of_ruler_are_refused_before_models_are_looked_for(fails, novel, wrong, message):
    assert fails("eval", "ruler", "--target", "nowhere", "--draft", "nowhere", "--text", novel, *wrong).startswith(message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--context-field", "text"], ", line 1, field text: missing; allowed: one of 'tale', 'asked'"),
        (["--answers-field", "asked.answers"], ", line 1, field asked.answers: missing; allowed: one of 'q', 'a'"),
        (["--documents", "0"], "documents: got 0; allowed: a whole number >= 1"),
        (["--questions", "0"], "questions: got 0; allowed: a whole number >= 1"),
        (["--max-new-tokens", "0"], "max-new-tokens: got 0; allowed: a whole number >= 1"),
        (["--plant-in", "none.txt"], "--plant-in none.txt: cannot be read (No such file or directory)"),
        (["--data", "tales.csv"], "data: got 'tales.csv'; allowed: .jsonl"),
    ],
)
def test_bad_options_of_qa_are_refused_before_models_are_looked_for(fails, tales, wrong, message):
    given = ["--target", "nowhere", "--draft", "nowhere", "--data", tales, *FIELDS]
    assert fails("eval", "qa", *given, *wrong).removeprefix(f"--data {tales}").startswith(message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--context", "100000"], "context: got 100000; allowed: "),
        (["--context", "40"], "context: got 40; allowed: at least "),
        (["--method", "magic"], "method: got 'magic'; allowed: dense, outrider, sts, specattn"),
        (["--score-keys", "8bit"], "score-keys: got '8bit'; allowed: auto, exact, 4bit, 2bit"),
    ],
)
def test_bad_options_of_ruler_that_depend_on_the_pair(fails, flags, novel, wrong, message, tmp_path):
    given = [*flags, "--text", novel, "--context", 900, "--json", tmp_path / "rows.jsonl"]
    assert fails("eval", "ruler", *given, *wrong).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_families(outrider):
    from outrider.eval.ruler.families import FAMILIES

    text = re.sub(r"[\s│]+", " ", outrider("eval", "ruler", "--help").out)
    assert all(family in text for family in FAMILIES)
