"""What is compared with what, and that its numbers are those of `summarize`."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.eval.report.panels import labels, panels
from outrider.eval.report.read import read_results
from outrider.eval.rows import summarize

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def test_points_are_those_of_summarize():
    rows = read_results([RESULTS / "perplexity.jsonl"]).rows
    [panel] = panels(rows)
    assert [point.mean for point in panel.points] == summarize(rows)
    change, agreement = panel.figures
    assert (change.name, agreement.name) == ("delta_percent", "agreement")
    curve = panel.curves(change)["outrider"]
    means = sorted((m for m in summarize(rows) if m.method == "outrider"), key=lambda m: m.kv_read_fraction)
    assert [(p.read, p.value(change), p.interval(change)) for p in curve] == [
        (100 * m.kv_read_fraction, m.delta_percent, m.intervals["delta_percent"]) for m in means
    ]
    assert [p.value(agreement) for p in panel.curves(agreement)["sts"]] == pytest.approx(
        [100 * m.agreement for m in sorted((m for m in summarize(rows) if m.method == "sts"), key=lambda m: m.kv_read_fraction)]
    )
    assert (
        "dense" not in panel.curves(change) and panel.dense(change) == 0 and labels([panel]) == ["outrider", "sts", "specattn"]
    )


def test_methods_are_compared_on_the_texts_that_all_were_run_on(row):
    rows = [row(t, m, ppl=p) for t, m, p in [("a", "outrider", 21), ("b", "outrider", 40), ("a", "sts", 22), ("c", "sts", 50)]]
    [panel] = panels(rows)
    assert (panel.texts, panel.left_out) == (["a"], ["b", "c"])
    assert [point.mean.ppl for point in panel.points] == [21, 22]


def test_without_a_common_text_each_method_has_its_own(row):
    [panel] = panels([row("a", "outrider"), row("b", "outrider"), row("c", "sts")])
    assert panel.texts == [] and [point.mean.text for point in panel.points] == ["mean of 2", "mean of 1"]


def test_tasks_parts_and_contexts_are_panels_of_their_own(row):
    made = panels(
        [row(), row(context=128), row(task="ruler", part="single", recalled=3, asked=4), row(task="ruler", part="multi")]
    )
    assert [panel.name for panel in made] == ["perplexity-64", "perplexity-128", "ruler-single-64", "ruler-multi-64"]
    recall = next(figure for figure in made[2].figures if figure.name == "recall")
    assert made[2].points[0].value(recall) == 75


def test_other_conditions_and_kinds_of_budgets_are_curves_of_their_own(row):
    few = row().conditions | {"score_keys": "4bit"}
    [panel] = panels([row(), row(keep=0.05), row(conditions=few), row(keep=None, top_p=0.9)])
    assert labels([panel]) == ["outrider", "outrider (score keys 4bit)", "outrider (top-p)"]
    assert [len(points) for points in panel.curves(panel.figures[0]).values()] == [2, 1, 1]
