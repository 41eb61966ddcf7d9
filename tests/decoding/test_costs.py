"""What rounds cost: planes through what was measured, and measurements that leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.config import SamplingParams
from outrider.decoding import costs
from outrider.decoding.choice import PLAIN, Choice
from outrider.decoding.costs import Costs, Plane
from outrider.decoding.graphs import Stages
from outrider.decoding.prefill import late_widths, prefill, read_late
from outrider.decoding.rehearsal import rehearse, warm_up
from outrider.decoding.runner import Runner

COEFFICIENTS = st.floats(0, 1)


@given(a=COEFFICIENTS, b=COEFFICIENTS, c=COEFFICIENTS, d=COEFFICIENTS, rows=st.integers(1, 16), cached=st.integers(100, 9999))
def test_a_plane_is_exact_where_costs_are_one(a, b, c, d, rows, cached):
    def cost(rows, cached):
        return a + b * rows + (c + d * rows) * cached

    plane = Plane({(r, s): cost(r, s) for r in (1, 8) for s in (500, 4000)})
    assert plane.at(rows, cached) == pytest.approx(cost(rows, cached)) or cached < 500  # where it may be cut off


def test_a_plane_never_falls():
    """Noise may make a longer cache look cheaper."""
    plane = Plane({(1, 1000): 2.0, (1, 9000): 1.9, (4, 1000): 1.5, (4, 9000): 3.0})
    assert [plane.at(1, 0), plane.at(1, 5000), plane.at(1, 99_000)] == [2.0, 2.0, 2.0]
    assert plane.at(4, 1000) == plane.at(1, 1000) == 2.0 and plane.at(4, 17_000) == pytest.approx(4.5)
    assert Plane({(1, 1): 3.0}).at(9, 9999) == 3.0
    assert Plane({(1, 1000): 1.0, (1, 2000): 3.0}).at(1, 0) == 0.5, "nothing is free"


READING = {10: Plane({(1, 1): 1.0}), 100: Plane({(1, 1): 2.0})}


def test_other_widths_are_between_plain_and_measured_rounds():
    planes = {name: Plane({(1, 1): ms}) for name, ms in {"plain": 8.0, "propose": 5.0, "dense": 10.0, "sparse": 5.0}.items()}
    rounds = {
        "plain": {"verify": planes["plain"]},
        **{mode: {"propose": planes["propose"], "verify": planes[mode]} for mode in ("dense", "sparse")},
    }
    made = Costs(rounds=rounds, k=4, confirmations={32: Plane({(1, 1): 12.0})}, reading=READING, tail=6)
    assert made.round(PLAIN, 1, 1) == 8
    assert made.round(Choice("dense", 4), 1, 1) == 15
    assert made.round(Choice("dense", 2), 1, 1) == pytest.approx(3 + 9)
    assert made.round(Choice("exact", 2), 1, 1) == pytest.approx(3 + 4.5)
    assert made.confirm(16, 1, 1) == 14, "never less than a plain round and a draft's steps"
    longer = replace(made, confirmations={16: Plane({(1, 1): 16.0}), 32: Plane({(1, 1): 18.0})})
    assert [longer.confirm(tokens, 1, 1) for tokens in (8, 16, 24, 32, 64)] == pytest.approx([15, 16, 17, 18, 22])
    unscored = replace(made, steps={"plain": 0, "dense": 4, "sparse": 5})
    assert unscored.round(Choice("dense", 2), 1, 1) == pytest.approx(2.5 + 9), "half the steps"
    assert unscored.round(Choice("exact", 2), 1, 1) == made.round(Choice("exact", 2), 1, 1)
    assert [made.read(n, 500) for n in (0, 1, 10, 55, 100, 300, 310)] == [0, 2, 2, 3, 2, 6, 8], "few tokens take a while"


@pytest.mark.parametrize("mode", ["plain", "dense", "sparse", "exact", "auto"])
def test_every_mode_can_be_measured(mode, make_pair, make_engine, random_prompts):
    """And what was measured changes no text."""
    pair, prompts = make_pair("llama"), random_prompts([60, 41, 20])
    engine = make_engine(pair, mode=mode, batch_size=2)
    plain = [result.token_ids for result in engine.generate(prompts, SamplingParams(max_new_tokens=12))]
    inner = engine._engine
    inner._predicts, inner._costs = True, None
    results = engine.generate(prompts, SamplingParams(max_new_tokens=12))
    assert [result.token_ids for result in results] == plain
    found = inner._costs
    wanted = {"exact": {"plain", "sparse"}, "auto": {"plain", "dense", "sparse"}}.get(mode, {mode})
    assert set(found.rounds) == wanted and (found.rows, found.cached) == (2, 72)
    assert list(found.confirmations) == ([16, 32] if mode in ("exact", "auto") else [])
    assert (not found.reading) == (mode == "plain")
    for choice in [Choice(name, 3) if name != "plain" else PLAIN for name in wanted]:
        assert 0 < found.round(choice, 1, 60) <= found.round(choice, 2, 60)
    for result in results:
        statistics = result.statistics
        spent = sum(statistics.seconds.values()) - statistics.seconds["prefill"]
        assert statistics.predicted_seconds > 0.05 * spent
        assert sum(statistics.chosen.values()) == statistics.rounds


@pytest.mark.parametrize("mode", ["sparse", "exact", "auto"])
def test_rounds_are_measured_as_they_will_run(mode, make_pair, make_engine, random_prompts, monkeypatch):
    """A kind that nobody has rehearsed would be captured behind a prompt."""
    measured, run = set(), set()
    monkeypatch.setattr(costs, "rehearse", lambda runner, kind, cached: measured.add(kind) or rehearse(runner, kind, cached))
    launch = Runner.launch
    monkeypatch.setattr(Runner, "launch", lambda self, running, kind, due: run.add(kind) or launch(self, running, kind, due))
    engine = make_engine(make_pair("llama"), mode=mode)
    engine._engine._predicts = True
    engine.generate(random_prompts([50]), SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert {kind for kind in run if kind.k in (0, 3)} <= measured and any(kind.sparse for kind in measured)
    assert all(kind.holds == (mode != "sparse") for kind in measured if kind.sparse and not kind.reads_all)


@pytest.mark.parametrize("options", [{"mode": "dense"}, {"mode": "exact"}, {"mode": "sparse"}, {"guard_every": 2}], ids=str)
def test_what_rounds_need_is_captured_before_the_first_prompt(options, make_pair, make_engine, random_prompts, monkeypatch):
    """Every stage has run twice by then: as it is, and to be captured."""
    ran, rehearsed = [], []

    def warm(runner, *given):
        assert ran == []
        runner.stages.capture = True
        warm_up(runner, *given)
        runner.stages.capture = False
        rehearsed.extend(ran)
        ran.clear()

    monkeypatch.setattr(Stages, "run", lambda self, name, function: ran.append(name) or function())
    monkeypatch.setattr("outrider.decoding.loop.warm_up", warm)
    engine = make_engine(make_pair("llama"), **({"mode": "sparse", "guard_tolerance": 1.0} | options))
    engine.generate(random_prompts([50]), SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert {"propose", "verify", "accept"} <= set(ran) and ("audit" in ran) == ("guard_every" in options)
    assert {name for name in ran if rehearsed.count(name) < 2} == set()


def test_costs_are_measured_once_and_again_for_more(make_pair, make_engine, random_prompts, monkeypatch):
    measured = []
    monkeypatch.setattr(costs, "rehearse", lambda *given: measured.append(given) or rehearse(*given))
    engine, params = make_engine(make_pair("llama"), mode="auto", batch_size=2), SamplingParams(max_new_tokens=4)

    def count(lengths):
        measured.clear()
        engine.generate(random_prompts(lengths), params)
        return len(measured)

    assert count([50]) > 0 == count([50])
    assert count([30]) == 0, "shorter ones are on the same line"
    assert count([50, 50]) > 0 == count([70, 20]), "two rows are more than one"
    assert count([200]) > 0, "a line through points so near each other would not reach that far"


def test_measuring_tells_its_progress(make_pair, make_engine, random_prompts):
    seen = []
    engine = make_engine(make_pair("llama"), mode="auto")
    engine.generate(random_prompts([50]), SamplingParams(max_new_tokens=4), progress=lambda *one: seen.append(one))
    told = [(done, of) for what, done, of in seen if what == "measure rounds"]
    assert told == [(done, 6) for done in range(7)], "plain, dense, sparse, two confirmations, a chunk of a prompt"


@pytest.mark.parametrize("fills_up", [True, False])
def test_who_catches_up_reads_all_rows_at_once(fills_up, make_pair, random_prompts):
    assert late_widths(2048) == [64, 128, 256, 512, 1024, 2048] and late_widths(100) == [64, 100] and late_widths(40) == [40]
    _, draft = make_pair("llama")
    texts, seen = random_prompts([250, 250, 250]), []
    whole, late = draft.new_cache(3, 256), draft.new_cache(3, 256)
    prefill(draft, whole, torch.tensor(texts), 256)
    forward = draft.forward

    def spy(tokens, *given, **options):
        seen.append(tuple(tokens.shape))
        return forward(tokens, *given, **options)

    draft.forward = spy
    done = [0, 0, 0]
    for behind in ([3, 0, 1], [30, 101, 0], [100, 99, 2], [0, 0, 50], [60, 1, 0], [0, 49, 0], [57, 0, 197]):
        missing = [text[start : start + count] for text, start, count in zip(texts, done, behind, strict=True)]
        read_late(draft, late, missing, 100, fills_up=fills_up)
        done = [start + count for start, count in zip(done, behind, strict=True)]
        assert late.lengths.tolist() == done
    assert done == [250] * 3
    # rows that lack more than a chunk are read one by one, and where the cache has no room for all
    singly, rows = [(1, 30), (1, 100), (1, 1)], [(1, 60), (1, 1)]
    first, middle, last = (64, [(1, 50)], [(1, 49)]) if fills_up else (3, [(3, 50)], [(3, 49)])
    assert seen == [(3, first), *singly, (3, 100), *middle, *rows, *last, (1, 57), (1, 100), (1, 97)]
    for layer in range(len(draft.spec.layers)):
        torch.testing.assert_close(late.keys(layer)[:, :250], whole.keys(layer)[:, :250], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(late.values(layer)[:, :250], whole.values(layer)[:, :250], rtol=1e-4, atol=1e-5)
