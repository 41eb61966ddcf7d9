"""Mode auto on a GPU: graphs of all kinds of rounds, in any order, and what is chosen where a draft is worth nothing."""

from __future__ import annotations

import random

import pytest
import torch

from outrider.bench.cases import CASES
from outrider.bench.decode import measure
from outrider.bench.dummy import dummy_workloads
from outrider.bench.options import DecodeOptions, Run
from outrider.config import SamplingParams
from outrider.decoding.choice import PLAIN, Choice
from outrider.decoding.chooser import Fastest
from outrider.decoding.statistics import total

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [201, 77, 140, 33, 90]  # more than slots: rows are refilled and moved while others run


def at_random(monkeypatch, seed):
    dice = random.Random(seed)

    def choose(self, running, *, listed):
        self._current = dice.choice([PLAIN, *(choice for choice in self._choices if listed or choice.mode == "dense")])
        return self._current

    monkeypatch.setattr(Fastest, "choose", choose)
    for question, chance in (("stays", 0.7), ("settles", 0.1), ("wants_draft", 0.5)):
        monkeypatch.setattr(Fastest, question, lambda self, *given, chance=chance: dice.random() < chance)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_is_chosen_the_text_is_that_of_mode_exact(seed, eager, gpu_pair, make_engine, random_prompts, monkeypatch):
    pair, prompts = gpu_pair("float32"), random_prompts(PROMPTS)
    temperatures = [1.0, 0.0, 0.7, 1.2, 0.9]
    params = [SamplingParams(max_new_tokens=60, temperature=t, seed=i) for i, t in enumerate(temperatures)]
    options = {"keep": 0.2, "batch_size": 3, "eager": eager}
    exact = make_engine(pair, mode="exact", **options).generate(prompts, params)
    at_random(monkeypatch, seed)
    auto = make_engine(pair, mode="auto", **options)
    for _ in range(2):  # the second run finds everything captured
        results = auto.generate(prompts, params)
        assert [result.token_ids for result in results] == [result.token_ids for result in exact]
        assert {name.split()[0] for name in total([r.statistics for r in results]).chosen} == {"plain", "dense", "exact"}


def decoded(device, rate):
    """A row of the 8B shapes at 8K, where the draft is right in this share of rounds."""
    [work] = dummy_workloads([CASES["llama-8k-b1"]], (rate,) * 4, device, agreement=rate)
    options = DecodeOptions(mode=("auto",), rounds=60)
    run = Run(engine="outrider", mode="auto", drafting="sparse")
    return measure(work, run, options, {"stream_gb_s": 4000.0}, lambda *_: None)


def test_a_draft_that_is_worth_nothing_is_left_out(device):
    """Speed is measured by `outrider bench decode --mode plain --mode auto --acceptance 0,0,0,0`; here, that it is seen."""
    row = decoded(device, 0.0)
    assert row.chosen["plain"] > 0.8 * sum(row.chosen.values())


def test_a_good_draft_is_used(device):
    row = decoded(device, 1.0)
    assert row.chosen.get("plain", 0) < 0.2 * sum(row.chosen.values())
    assert Choice("dense", 4).name in row.chosen or Choice("exact", 4).name in row.chosen
