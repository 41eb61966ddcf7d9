"""What a peer's program is told and what it tells: a job as JSON on stdin, one marked line of JSON a case on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

MARKER = "outrider-bench: "  # peers print other things, too
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Cases of one pair, all in the same mode."""

    target: dict[str, Any]  # content of its config.json
    draft: dict[str, Any] | None  # None: the target alone
    cases: list[dict[str, Any]]  # name, context, batch
    tokens: int  # N: decoded tokens of each sequence
    rates: list[float]  # scripted acceptance; its length is K
    device: str
    what: str = "decode"  # or "prefill": the time to the first token

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def read_job() -> Job:
    return Job(**json.loads(sys.stdin.read()))


def serve(job: Job, measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Measure case by case and print a line for each; a case that fails is reported and does not stop the others."""
    for case in job.cases:
        try:
            result = measure(case)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print("\n" + MARKER + json.dumps({"case": case["name"]} | result), flush=True)


def read_results(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Results by case, from all that a peer has printed."""
    marked = [json.loads(line.removeprefix(MARKER)) for line in lines if line.startswith(MARKER)]
    return {result.pop("case"): result for result in marked}


def first_token(generate: Callable[[int], Any]) -> float:
    """Seconds of reading a prompt up to its first token; `generate(i)` does so with prompt i, none of which it has seen before.

    The first call pays for what is compiled when it is first needed, and is not timed. The median of `REPEATS` others.
    """
    times = []
    for number in range(REPEATS + 1):
        began = time.perf_counter()
        generate(number)
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[REPEATS // 2]


def decoding(generate: Callable[[int], int], tokens: int) -> tuple[float, int]:
    """Seconds and steps of decoding `tokens` tokens; `generate(n)` makes n and says, when they are there, in how many steps.

    The first two calls pay for the prompt and for what is compiled when it is first needed, and are not timed. Behind them the
    difference between a call of 1 and one of `tokens` + 1 tokens is decoding alone: the median of `REPEATS` such pairs.
    """
    generate(1)
    generate(tokens + 1)
    pairs = []
    for _ in range(REPEATS):
        stamps, steps = [time.perf_counter()], []
        for count in (1, tokens + 1):
            steps.append(generate(count))
            stamps.append(time.perf_counter())
        pairs.append((stamps[2] - 2 * stamps[1] + stamps[0], steps[1] - steps[0]))
    return sorted(pairs)[REPEATS // 2]
