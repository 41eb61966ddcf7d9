"""What the guard of mode sparse finds: good lists shall never be taken for bad ones, and lists of random tokens soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

from outrider.config import SamplingParams
from outrider.decoding import runner
from outrider.decoding.outrider import Outrider
from outrider.decoding.statistics import total
from outrider.types import DraftScores

TEMPERATURES = (0.0, 0.8)
GOOD, RANDOM = "aligned", "random"


def watch(
    loaded: Outrider,
    prompts: Mapping[str, list[list[int]]],
    tokens: int,
    every: int,
    note: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """A row for each text and temperature with the lists of the alignment, and for each text with random ones, which have
    neither sinks nor recent tokens: `tokens` behind every prompt, an audit every so many rounds.
    """
    good = loaded.with_options(mode="sparse", guard_every=every, audit=False)
    poor = good.with_options(sinks=0, recent=0, allocation="flat")
    cases = [(GOOD, good, temperature) for temperature in TEMPERATURES] + [(RANDOM, poor, 0.0)]
    for done, (text, given) in enumerate(prompts.items()):
        for at, (lists, engine, temperature) in enumerate(cases):
            note("guard", done * len(cases) + at, len(prompts) * len(cases))
            params = [
                SamplingParams(max_new_tokens=tokens, ignore_eos=True, temperature=temperature, seed=i)
                for i in range(len(given))
            ]
            with patch.object(runner, "score", _at_random if lists == RANDOM else _score):
                found = [result.statistics for result in engine.generate(given, params)]
            counted = total(found)
            yield {
                "text": text,
                "lists": lists,
                "temperature": temperature,
                "tokens": counted.generated_tokens,
                "audits": counted.audits,
                "disagreement": counted.disagreement,
                "recalled": counted.recalled_mass,
                "kept": counted.kept_fraction,
                "raised": counted.budget_raised,
                "fallbacks": counted.fallbacks,
                "audits_until_dense": [one.audits for one in found if one.fallbacks],
            }
    note("guard", len(prompts) * len(cases), len(prompts) * len(cases))


_score = runner.score


def _at_random(*given: Any, **options: Any) -> DraftScores:
    """Scores that have nothing to do with what the draft looks at."""
    scores = _score(*given, **options)
    scores.mass.uniform_()
    return scores
