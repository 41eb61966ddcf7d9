"""Rounds that begin before the last one's tokens are read, as on a GPU: the same texts as one round after the other.

On a CPU a round is over once it is launched, so nothing is gained; what the host knows, and when, is the same.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from outrider.config import SamplingParams
from outrider.decoding.choice import PLAIN
from outrider.decoding.chooser import Fastest
from outrider.decoding.drafting import DraftLists
from outrider.decoding.loop import Loop
from outrider.decoding.runner import Runner
from outrider.models import LanguageModel

LENGTHS = [40, 23, 61, 35, 52]
STARVED = {"keep": 0.05, "sinks": 0, "recent": 0}


@pytest.fixture
def ahead(monkeypatch):
    """Launches ahead from now on; returns the list of them: whether what is under way, and what is launched, confirms."""
    made, launched = Runner.__init__, []
    launch = Loop._launch_behind

    def build(self, *given, **options):
        made(self, *given, **options)
        self.launches_ahead = True

    def spy(self, flight):
        found = launch(self, flight)
        if found is not None:
            launched.append((flight.confirms, found.confirms))
        return found

    def begin():
        monkeypatch.setattr(Runner, "__init__", build)
        monkeypatch.setattr(Loop, "_launch_behind", spy)
        return launched

    return begin


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "plain"},
        {"mode": "dense", "draft_tokens": 2},
        {"mode": "sparse"},
        {"mode": "sparse", "min_context": 50},
        {"mode": "exact"},
        {"mode": "exact", "exact_every": 3, "min_context": 50},
        {"mode": "exact", "exact_every": 8, **STARVED},
    ],
    ids=str,
)
def test_texts_are_those_of_one_round_after_the_other(temperature, options, ahead, make_pair, make_engine, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts(LENGTHS)
    params = [
        SamplingParams(max_new_tokens=30 - 3 * i, temperature=temperature, seed=i, ignore_eos=i % 2 == 0)
        for i in range(len(prompts))
    ]
    wanted = make_engine(pair, batch_size=2, **options).generate(prompts, params)
    launched = ahead()
    found = make_engine(pair, batch_size=2, **options).generate(prompts, params)
    for one, other in zip(found, wanted, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.statistics.generated_tokens == other.statistics.generated_tokens
    assert len(launched) > 5
    confirming = {(False, True), (True, False)} if options["mode"] == "exact" else set()
    assert set(launched) - {(False, False)} == confirming


@pytest.mark.parametrize("mode", ["plain", "dense", "sparse", "exact"])
def test_texts_that_end_while_a_round_is_under_way(mode, ahead, make_pair, make_engine, random_prompts):
    """By an end of text, which nobody expects: one row, the only one, and rows in a batch."""
    (target, draft), prompts = make_pair("llama"), random_prompts(LENGTHS)
    params = SamplingParams(max_new_tokens=30)
    plain = make_engine((target, draft), mode="plain").generate(prompts, params)
    eos = tuple({one.token_ids[8 + i] for i, one in enumerate(plain)})
    ending = LanguageModel(target.module, None, replace(target.spec, eos_tokens=eos)), draft
    wanted = make_engine(ending, mode=mode).generate(prompts, params)
    assert {one.finish_reason for one in wanted} == {"eos"}
    ahead()
    for batch in (1, 2, 5):
        found = make_engine(ending, mode=mode, batch_size=batch).generate(prompts, params)
        assert [one.token_ids for one in found] == [one.token_ids for one in wanted]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_chosen_the_text_is_that_of_mode_exact(seed, ahead, make_pair, make_engine, random_prompts, monkeypatch):
    """Rounds of all kinds and widths, in any order."""
    pair, prompts = make_pair("llama"), random_prompts(LENGTHS)
    params = [SamplingParams(max_new_tokens=60, temperature=t, seed=i) for i, t in enumerate((1.0, 0.0, 0.7, 1.2, 0.9))]
    options = {"keep": 0.2, "batch_size": 3, "draft_tokens": 4, "min_context": 30}
    wanted = make_engine(pair, mode="exact", **options).generate(prompts, params)
    dice = random.Random(seed)

    def choose(self, running, *, listed):
        self._current = dice.choice([PLAIN, *(choice for choice in self._choices if listed or choice.mode == "dense")])
        return self._current

    monkeypatch.setattr(Fastest, "choose", choose)
    for question, chance in (("stays", 0.7), ("settles", 0.1), ("wants_draft", 0.5)):
        monkeypatch.setattr(Fastest, question, lambda self, *given, chance=chance: dice.random() < chance)
    launched, confirm, confirmed = ahead(), Runner.run_confirmation, set()
    monkeypatch.setattr(Runner, "run_confirmation", lambda self, kind, *rest: confirmed.add(kind) or confirm(self, kind, *rest))
    found = make_engine(pair, mode="auto", **options).generate(prompts, params)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert {(False, True), (True, False)} <= set(launched)
    assert {kind.round.k for kind in confirmed} == {4}, "those of narrower rounds, too: no further kinds to capture"
    chosen = {name for one in found for name in one.statistics.chosen}
    assert {name.split()[0] for name in chosen} == {"plain", "dense", "exact"} and "exact K=1" in chosen


def test_waiting_prompts_are_read_where_every_round_is_confirmed(ahead, make_pair, make_engine, random_prompts, monkeypatch):
    """Behind each confirmation a round is under way, so nobody else would admit them before all that run have ended."""
    ahead()
    engine = make_engine(make_pair("llama"), mode="exact", exact_every=1, batch_size=2)
    params = [SamplingParams(max_new_tokens=count, ignore_eos=True) for count in (60, 4, 4, 4)]
    order = [chunk.index for chunk in engine.stream(random_prompts(LENGTHS[:4]), params) if chunk.result is not None]
    assert order[-1] == 0, "three short ones take turns beside the long one"


@pytest.mark.parametrize("every", [None, 1, 9])
def test_the_draft_is_never_without_lists(every, ahead, make_pair, make_engine, random_prompts, monkeypatch):
    """It proposes once more before a confirmation, over lists that are a round old."""
    target, _ = make_pair("llama")
    steps, seen = DraftLists.steps, []

    def spy(self, lengths, *given):
        made = steps(self, lengths, *given)
        seen.append(min(int(one.counts[:, lengths > 0].min()) for one in made))
        return made

    monkeypatch.setattr(DraftLists, "steps", spy)
    ahead()
    engine = make_engine((target, target), mode="exact", exact_every=every, drafting="sparse", keep=1.0)
    results = engine.generate(random_prompts(LENGTHS[:3]), SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert sum(result.statistics.drafted_on for result in results) > 10, "so lists have to last longest"
    assert min(seen) > 0
