"""Diagnostics as pictures: which lines become one picture, and what is drawn in it."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from outrider.eval.diagnose.rows import Acceptance, Disagreement, Heads, Overlap
from outrider.eval.report.heads import plots
from outrider.eval.report.plot import ON_WHITE

ABOUT = {"method": "outrider", "keep": 0.1, "top_p": None, "context": 64, "conditions": {}}
REST = {"kv_read_fraction": 1.0, "scored_tokens": 9}


def axes_of(plot):
    figure = Figure(layout="constrained")
    plot.draw(figure, ON_WHITE)
    return figure.axes[0]


def lines_of(plot):
    found = [(line.get_label(), line.get_xdata(), line.get_ydata()) for line in axes_of(plot).get_lines()]
    return {label: [pytest.approx(point) for point in zip(x, y, strict=True)] for label, x, y in found}


def test_a_map_is_the_mean_over_texts():
    common = ABOUT | {"layers": [2, 5]}
    recalls = ([[0.5, 1.0, 0.25], [0.75, 0.5, 1.0]], [[0.5, 0.0, 0.75], [0.25, 0.0, 0.5]])
    lines = [Heads(text=text, recall=recall, **common) for text, recall in zip("ab", recalls, strict=True)]
    first, other = plots([*lines, Heads(text="a", recall=recalls[0], **(common | {"keep": 0.05}))])
    assert first.title == "outrider, keep 10%, 64 tokens: share of attention mass in the list"
    assert first.note == "Mean of 2 texts (a, b). Mean 0.500; lowest 0.250, layer 5, query head 1."
    assert other.note.startswith("a. Mean 0.667; lowest 0.250, layer 2, query head 2")
    axes = axes_of(first)
    assert axes.collections[0].get_array().tolist() == [[0.5, 0.5, 0.5], [0.5, 0.25, 0.75]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["2", "5"]
    assert [text.get_text() for text in axes.texts] == [".50", ".50", ".50", ".50", ".25", ".75"]


def test_overlaps_with_rounds_and_with_the_target_are_maps_of_their_own():
    common = ABOUT | {"method": "sts", "keep": None, "top_p": 0.9, "layers": [0], "overlap": [[0.5]]}
    made = plots([Overlap(text="a", between=between, **common) for between in ("rounds", "draft and target")])
    assert [plot.title for plot in made] == [
        "sts, top-p 0.9, 64 tokens: overlap of lists, rounds",
        "sts, top-p 0.9, 64 tokens: overlap of lists, draft and target",
    ]


def test_acceptance_and_disagreement_are_means_over_texts():
    shares = [
        Acceptance(**ABOUT | {"method": "sts"}, text=t, by_position=p, rounds=4)
        for t, p in (("a", [1, 0.5]), ("b", [0.5, 0.5]))
    ]
    points = [("sts", 0.1, 0.1, 0.2), ("sts", 0.1, 0.12, 0.4), ("sts", 0.05, 0.05, 0.6), ("outrider", 0.1, 0.1, 0.1)]
    misses = [
        Disagreement(
            **ABOUT | {"method": m, "keep": k}, text="a", kept_fraction=f, kv_read_fraction=1.0, disagreement=d, scored_tokens=9
        )
        for m, k, f, d in points
    ]
    accepted, disagreed = plots([*misses, *shares])
    assert lines_of(accepted) == {"sts, keep 10%": [(1, 75), (2, 50)]}
    assert lines_of(disagreed) == {"sts": [(5, 60), (11, 30)], "outrider": [(10, 10)]}
