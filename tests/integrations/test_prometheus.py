"""Finished requests as Prometheus metrics."""

from __future__ import annotations

import re
import sys

import pytest

from outrider.config import SamplingParams
from outrider.decoding.statistics import Statistics, total
from outrider.errors import OptionError
from outrider.integrations.prometheus import COUNTERS, Metrics

pytest.importorskip("prometheus_client", reason="needs prometheus-client")
LINE = re.compile(r"outrider:(\w+?)(?:\{(.*)\})? (\S+)")


def parsed(text):
    """name -> labels but the model's -> value."""
    found = {}
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            assert labels.pop("model_name") == "tiny"
            found.setdefault(match[1], {})[tuple(sorted(labels.values()))] = float(match[3])
    return found


@pytest.fixture(scope="module")
def results(make_pair, make_engine, random_prompts):
    engine = make_engine(make_pair("llama"), mode="exact", exact_every=3, keep=0.05, batch_size=2)
    return engine.generate(random_prompts([40, 25, 31]), SamplingParams(max_new_tokens=12))


def test_counters_are_the_statistics(results):
    metrics = Metrics("tiny")
    for result in results:
        metrics.observe(result)
    found, run = parsed(metrics.text()), total([result.statistics for result in results])
    for name, (field, _) in COUNTERS.items():
        assert found[f"{name}_total"] == {("exact",): pytest.approx(getattr(run, field))}, name
    assert run.tentative > run.confirmed > 0 and run.accepted > 0
    assert found["request_success_total"] == {("exact", "length"): 3}
    per_position = found["spec_decode_num_accepted_tokens_per_pos_total"]
    assert per_position == {tuple(sorted(("exact", str(i)))): n for i, n in enumerate(run.accepted_at)}
    assert found["rounds_total"] == {("exact", "exact K=3"): run.rounds}
    assert found["stage_seconds_total"]["confirm", "exact"] == pytest.approx(run.seconds["confirm"])
    assert found["request_decode_time_seconds_count"] == {("exact",): 3}
    assert found["request_prefill_time_seconds_sum"] == {("exact",): pytest.approx(run.seconds["prefill"])}


def test_every_count_of_a_request_has_a_metric():
    told = {field for field, _ in COUNTERS.values()} | {"accepted_at", "seconds", "decode_seconds", "mode", "chosen"}
    left_out = {"fell_back_at", "method", "drafting", "began", "prefill_listed", "prefill_before"}
    assert set(Statistics.__dataclass_fields__) == told | left_out


def test_the_client_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(OptionError, match=r"metrics: got 'no prometheus-client'; allowed: pip install 'outrider\[metrics\]'"):
        Metrics("tiny")
