"""The timer with a stand-in for the device, the reading kernel in Triton's interpreter, and the conditions."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.timing import GraphTimer, empty_graph_us

from benchmarks import timing
from outrider.bench.conditions import conditions

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Device:
    """A stream that runs late: an event has happened once the host has queued more than `ahead` things behind it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.clock, self.capturing, self.refuses = 0.0, False, False
        self.flush_ms, self.host_ms = 0.13, 0.02
        self.behind = 0.0  # device time that was queued and is not done yet

    def call(self) -> None:
        self.log.append("captured" if self.capturing else "called")
        if self.capturing and self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def flush(self) -> None:
        self.log.append("flush")
        self.behind += self.flush_ms

    def replay(self) -> None:
        self.log.append("replay")
        self.behind -= self.host_ms

    def synchronize(self) -> None:
        self.behind = 0.0


@pytest.fixture
def device(monkeypatch) -> Device:
    made = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            made.log.append("event")

        def query(self):
            return made.behind <= 0

        def elapsed_time(self, other):
            made.clock += 1e-3
            return made.clock

    @contextlib.contextmanager
    def capture(graph):
        made.capturing = True
        try:
            yield
        finally:
            made.capturing = False

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Event": Event,
        "CUDAGraph": lambda: SimpleNamespace(replay=made.replay),
        "graph": capture,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": made.synchronize,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    reader = SimpleNamespace(read=lambda source, partial: made.flush(), sums=lambda device: torch.zeros(16, dtype=torch.int32))
    monkeypatch.setattr("outrider.bench.stream.triton", reader, raising=False)
    monkeypatch.setitem(sys.modules, "outrider.bench.stream.triton", reader)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 4096)
    return made


def test_replays_are_timed_behind_a_flush(device):
    timer = GraphTimer(CPU, iterations=5)
    device.log.clear()
    assert timer.time([device.call, device.call]) == timing.Timing(us=1.5, us_min=0.5, graph=True)  # 1 .. 5 us, two calls
    assert device.log[:8] == ["called"] * 6 + ["captured"] * 2
    assert device.log[8] == "replay"
    assert device.log[9:] == ["flush", "event", "replay", "event"] * 5


def test_a_host_that_is_late_gets_longer_flushes(device):
    timer = GraphTimer(CPU, iterations=5)
    device.host_ms = 0.3
    device.log.clear()
    timer.time([device.call])
    assert device.log[-7:] == ["flush"] * 4 + ["event", "replay", "event"]
    device.host_ms = 1e9
    with pytest.raises(RuntimeError, match="the host takes longer to launch this than 32 flushes last"):
        timer.time([device.call])


def test_what_cannot_be_captured_is_launched_where_that_is_allowed(device):
    timer = GraphTimer(CPU, iterations=5)
    device.refuses = True
    with pytest.raises(RuntimeError, match="not permitted"):
        timer.time([device.call])
    device.host_ms = 0
    device.log.clear()
    assert timer.time([device.call], eager=True).graph is False
    assert device.log[-4:] == ["flush", "event", "called", "event"]


def test_the_cost_of_the_method_itself(device):
    assert empty_graph_us(GraphTimer(CPU, iterations=3), CPU) == pytest.approx(2.0)


def test_the_reading_kernel_reads_everything():
    pytest.importorskip("triton")
    code = (
        "import torch\nfrom outrider.bench.stream import triton as stream\n"
        "source = torch.randint(1000, (8192 * 5 + 16,), dtype=torch.int32)\n"
        "for shape in stream.SHAPES:\n"
        "    partial = stream.sums(torch.device('cpu'))\n"
        "    stream.read(source, partial, shape)\n"
        "    assert partial.sum() == source.sum(), shape\n"
        "    assert (partial != 0).sum() == shape[2], shape\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_buffers_suit_the_reading_kernel():
    from outrider.bench.stream.rate import STREAM_BYTES

    for size in (512 * 2**20, STREAM_BYTES):
        assert size // 4 % 16 == 0 and size // 4 <= 2**30


def test_conditions_say_what_was_run():
    made = conditions(CPU, "python -m benchmarks kernels --quick")
    assert made["device"] == "cpu" and made["torch"] == torch.__version__
    assert made["command"] == "python -m benchmarks kernels --quick"
    assert {"driver", "triton", "cuda", "commit", "ops", "date"} <= made.keys()
    assert len(made["ops"]) == 12


def test_conditions_do_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert conditions(CPU, "")["commit"] == "unknown"
