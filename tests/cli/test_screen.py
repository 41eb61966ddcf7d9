"""Progress is for terminals; piped text stays text."""

from __future__ import annotations

import io
import sys

import pytest

from outrider.cli.screen import Screen
from outrider.cli.tables import evaluation_table, quality_table, run_table
from outrider.decoding.statistics import STAGES, Statistics
from outrider.eval.rows import Row
from outrider.guidance.alignment import AlignmentFile, AlignmentMap, ModelIdentity
from outrider.types import Alignment


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def streams(monkeypatch):
    """Make stdout and stderr a terminal or not; returns (screen, stdout, stderr)."""

    def make(*, stdout: bool, stderr: bool):
        monkeypatch.setenv("TERM", "xterm")
        pair = [Terminal() if terminal else io.StringIO() for terminal in (stdout, stderr)]
        monkeypatch.setattr(sys, "stdout", pair[0])
        monkeypatch.setattr(sys, "stderr", pair[1])
        return Screen(), *pair

    return make


def test_notes_leave_piped_text_alone(streams):
    screen, out, err = streams(stdout=False, stderr=False)
    screen.heading("dense")
    screen.write("text")
    screen.note("a table")
    assert out.getvalue() == "text"
    assert "dense" in err.getvalue() and "a table" in err.getvalue()


def test_notes_follow_text_to_the_terminal(streams):
    screen, out, err = streams(stdout=True, stderr=True)
    screen.heading("dense")
    screen.note("a table")
    assert "dense" in out.getvalue() and "a table" in out.getvalue() and err.getvalue() == ""


def test_progress_stays_out_of_pipes(streams):
    screen, out, err = streams(stdout=True, stderr=False)
    with screen.waiting("loading"), screen.working():
        screen.progress("prefill", 1, 2)
    assert out.getvalue() == err.getvalue() == ""


def test_progress_may_say_more(streams):
    screen, _, err = streams(stdout=True, stderr=True)
    with screen.working():
        screen.progress("cells", 1, 3, note="facts [one], 2 min left")
        screen.progress("cells", 2, 3, note="facts two, 1 min left")
    assert "facts [one], 2 min left" in err.getvalue() and "facts two, 1 min left" in err.getvalue()
    assert err.getvalue().count("cells") >= 2


def test_progress_on_the_terminal_does_not_swallow_text(streams):
    screen, out, err = streams(stdout=False, stderr=True)
    with screen.waiting("loading [models]"):
        screen.write("more ")
    with screen.working():
        screen.progress("prefill [target]", 1, 2)
        screen.write("text")
        screen.progress("generate", 5, 9)
    assert out.getvalue() == "more text"
    assert all(word in err.getvalue() for word in ("loading [models]", "prefill [target]", "generate"))


def test_progress_ends_with_the_work_or_an_error(streams):
    screen, *_ = streams(stdout=False, stderr=True)
    screen.progress("prefill", 2, 2)
    assert screen._bar is None
    with pytest.raises(KeyboardInterrupt), screen.working():
        screen.progress("prefill", 1, 2)
        raise KeyboardInterrupt
    assert screen._bar is None


def test_run_table_has_a_column_per_mode(streams):
    dense = Statistics(mode="dense", method=None, generated_tokens=8, decode_seconds=2.0)
    sparse = Statistics(mode="sparse", method="sts", rounds=4, accepted=6, listed=5.0, cached=50, audited=8, agreed=6)
    screen, out, _ = streams(stdout=False, stderr=False)
    screen.show(run_table([dense, sparse]))
    lines = {line.strip().partition("  ")[0]: line.split()[-1] for line in out.getvalue().splitlines() if line.strip()}
    assert "sparse (sts)" in out.getvalue() and "6 of 8 (75.0%)" in out.getvalue() and "4.0" in out.getvalue()
    assert lines["kept fraction"] == "10.0%" and lines["accepted tokens per round"] == "1.50"
    assert {f"seconds: {stage}" for stage in STAGES if stage not in ("confirm", "audit")} <= lines.keys()
    assert "seconds: confirm" not in lines and "tentative tokens" not in lines, "nothing was confirmed"


def test_run_table_says_what_became_of_tentative_tokens(streams):
    dense = Statistics(mode="dense", method=None, generated_tokens=8, decode_seconds=2.0)
    exact = Statistics(mode="exact", method="sts", tentative=30, confirmed=24, rolled_back=6, confirmations=3)
    screen, out, _ = streams(stdout=False, stderr=False)
    screen.show(run_table([dense, exact]))
    lines = {line.strip().partition("  ")[0]: line.split()[-2:] for line in out.getvalue().splitlines() if line.strip()}
    assert lines["tentative tokens"] == ["-", "30"] and lines["dense forwards that confirm"] == ["-", "3"]
    assert lines["of these confirmed"] == ["-", "24"] and lines["rolled back"] == ["-", "6"]
    assert "seconds: confirm" in lines


def test_names_of_users_are_no_markup(streams):
    row = Row(
        task="perplexity", text="[bold]book[/x]", method="[red]", keep=0.1, top_p=None, context=9, scored_tokens=3, ppl=2.0
    )
    screen, out, _ = streams(stdout=False, stderr=False)
    screen.show(evaluation_table(row.text, [row]))
    assert "[bold]book[/x]" in out.getvalue() and "[red]" in out.getvalue() and "keep 0.1" in out.getvalue()
    assert "recalled" not in out.getvalue()


def test_quality_table_has_every_map_and_figure(streams):
    import torch

    entry = Alignment(sources=torch.zeros(1, 1, 1, 2, dtype=torch.int64))
    who = ModelIdentity("a", "b")
    maps = {"joint+recall": {"recall": 0.5}, "monotone+average": {"recall": 0.25, "kl": 1.5}}
    built = {name: AlignmentMap(*name.split("+"), entry, quality) for name, quality in maps.items()}
    file = AlignmentFile(who, who, "book", "d", 256, 8, 5, 0.05, built)
    screen, out, _ = streams(stdout=False, stderr=False)
    screen.show(quality_table(file))
    assert all(word in out.getvalue() for word in ("joint+recall", "0.5000", "kl", "1.5000", "8 rounds of 5 queries"))
