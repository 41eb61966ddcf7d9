"""`outrider calibrate`: a whole alignment file, or none."""

from __future__ import annotations

import os
import signal

import pytest

from outrider.cli.screen import Screen
from outrider.guidance.alignment import load

SMALL = ["--tokens", "256", "--rounds", "6"]


@pytest.fixture
def flags(pair, folder, tmp_path) -> list[str]:
    """A complete command line; the alignment would go to tmp_path/alignment.json."""
    return ["calibrate", *pair, "--text", str(folder / "text.txt"), "--out", str(tmp_path / "alignment.json"), *SMALL]


def test_writes_the_maps_asked_for_and_their_quality(outrider, flags, tmp_path):
    outcome = outrider(*flags, "--maps", "joint+recall, monotone+average", "--queries-per-round", "3", "--keep", "0.2")
    assert outcome.code == 0, outcome.err
    file = load(tmp_path / "alignment.json", target=None, draft=None)
    assert list(file.maps) == ["joint+recall", "monotone+average"]
    assert (file.tokens, file.rounds, file.queries_per_round, file.keep, file.text) == (256, 6, 3, 0.2, "text")
    for name, entry in file.maps.items():
        assert name in outcome.out
        for figure, value in entry.quality.items():
            assert figure in outcome.out and f"{value:.4f}" in outcome.out
    assert "wrote" in outcome.out and outcome.err == ""


def test_interrupt_leaves_no_file(outrider, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(Screen, "progress", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    outcome = outrider(*flags)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "outrider: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_keeps_the_old_file(outrider, flags, tmp_path, monkeypatch):
    (tmp_path / "alignment.json").write_text("old")
    monkeypatch.setattr(Screen, "progress", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert outrider(*flags).code == 130
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_place_is_checked_before_any_work(fails, flags, tmp_path, monkeypatch):
    monkeypatch.setattr("outrider.decoding.pair.load_pair", lambda *_, **__: pytest.fail("work was done"))
    message = fails(*flags, "--out", tmp_path / "none" / "alignment.json")
    assert message.startswith("out: got ") and "allowed: a file in a folder that can be written" in message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--maps", "joint+magic"], "maps: got 'joint+magic'; allowed: "),
        (["--maps", ""], "maps: got ''; allowed: "),
        (["--keep", "0"], "keep: got 0.0; allowed: "),
        (["--rounds", "1"], "rounds: got 1; allowed: "),
        (["--tokens", "100000"], "tokens: got 100000; allowed: "),
        (["--queries-per-round", "0"], "queries-per-round: got 0; allowed: "),
        (["--prefill-chunk", "0"], "prefill-chunk: got 0; allowed: "),
        (["--backend", "magic"], "backend: got 'magic'; allowed: "),
    ],
)
def test_bad_options(fails, flags, tmp_path, wrong, message):
    assert fails(*flags, *wrong).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_bad_texts(fails, flags, folder, tmp_path):
    assert "No such file" in fails(*flags, "--text", tmp_path / "none.txt")
    message = fails(*flags, "--text", folder / "short.txt")
    assert message.startswith("text short: got ") and "at least" in message
    assert list(tmp_path.iterdir()) == []
