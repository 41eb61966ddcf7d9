"""Rows to report on, and a headless Chromium that is driven over a pipe, where there is one."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider.eval.report.page import make
from outrider.eval.rows import Row

CONDITIONS: dict[str, Any] = {
    "target": "tiny 01",
    "draft": "small 02",
    "draft_tokens": 3,
    "device": "CPU",
    "command": "outrider eval",
}
PATIENCE = 60.0  # seconds


@pytest.fixture(scope="session")
def row() -> Callable[..., Row]:
    """`row(text="a", method="outrider", keep=0.1, **fields)` of task perplexity."""

    def make(text: str = "a", method: str = "outrider", keep: float | None = 0.1, **fields: Any) -> Row:
        known = {"ppl": 21.0, "ppl_dense": 20.0, "agreement": 0.9, "kv_read_fraction": 0.2, "kept_fraction": 0.1}
        known |= {"task": "perplexity", "top_p": None, "context": 64, "scored_tokens": 8, "conditions": CONDITIONS} | fields
        return Row(text=text, method=method, keep=keep, delta_percent=100 * (known["ppl"] / known["ppl_dense"] - 1), **known)

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(lines, name="rows.jsonl")`: a file of rows or other objects."""

    def make(lines: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(x.as_dict() if isinstance(x, Row) else x) + "\n" for x in lines), encoding="utf-8")
        return path

    return make


class Chromium:
    """A browser with one page, spoken to in the DevTools protocol over file descriptors 3 and 4."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-")
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
        ]
        flags += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"]
        command = [program, *flags, f"--user-data-dir={self._profile.name}", "about:blank"]
        become = f"import os, sys; os.dup2({to_browser}, 3); os.dup2({from_browser}, 4); os.execvp(sys.argv[1], sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", become, *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._buffer, self._session = itertools.count(1), b"", None
        self.events: list[dict[str, Any]] = []
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until - time.monotonic()))
            read = os.read(self._from, 1 << 20) if ready else b""
            assert read, "Chromium does not answer"
            self._buffer += read
        first, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(first)

    def open(self, page: Path, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Load a file at a width in CSS pixels, and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Exceptions, and whatever the page or the browser wrote to the console."""
        self.run("1")
        wrong = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event["method"] in wrong]

    def requests(self) -> list[str]:
        """All that was loaded over any protocol since `open`."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A screenshot, of the whole page or of what is visible."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    """Skips where neither OUTRIDER_CHROMIUM nor the path names a Chromium."""
    names = [os.environ.get("OUTRIDER_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium: set OUTRIDER_CHROMIUM, or put chromium or google-chrome on the path")
    chromium = Chromium(program)
    yield chromium
    chromium.close()


HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" '


@pytest.fixture(scope="session")
def trace() -> dict[str, Any]:
    """A trace of 400 one-character tokens, hostile ones first: two layers of two lists, four rounds, one of them dense."""
    draw = random.Random(7)
    text = HOSTILE + "".join(draw.choice("abcdef    \n") for _ in range(400 - len(HOSTILE)))
    rounds, cached = [], len(text) - 1
    for accepted, drafted in ((2, "xyz"), (3, "uvw"), (0, "<b>"), (1, "pqr")):
        lists = [[draw.sample(range(cached), cached // 5) for _ in range(2)] for _ in range(2)]
        one = {"cached": cached, "drafted": [1, 2, 3], "drafted_pieces": list(drafted), "accepted": accepted, "next": 4}
        packed = [[packed_bits(own, cached) for own in layer] for layer in lists]
        rounds.append(one | {"next_piece": "N", "lists": packed if accepted else None, "kept": lists})
        cached += accepted + 1
    pieces = [*text, *"xyN", *"uvwN", "N", *"pN"]
    return {
        "task": "trace", "text": HOSTILE, "method": "outrider", "keep": 0.2, "top_p": None, "prompt_tokens": len(text),
        "tokens": [0] * len(pieces), "pieces": pieces, "layers": [1, 3], "rounds": rounds, "all_rounds": 9,
        "conditions": CONDITIONS,
    }  # fmt: skip


def packed_bits(kept: list[int], cached: int) -> str:
    data = bytearray(-(-cached // 8))
    for place in kept:
        data[place // 8] |= 1 << place % 8
    return base64.b64encode(bytes(data)).decode()


@pytest.fixture(scope="session")
def report(row: Callable[..., Row], trace: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report on two methods, a map of heads and a trace; `lines.jsonl` in it is what it is made of."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        row(text, method, keep, ppl=20 + bad + (text == "b"), kv_read_fraction=keep + 0.1, agreement=0.9 - bad / 50)
        for text in ("a", "b")
        for method, off in ((HOSTILE, 1), ("sts", 2))
        for keep, bad in ((0.1, off), (0.05, 2 * off))
    ]
    heads = {
        "task": "heads",
        "text": "a",
        "method": "outrider",
        "keep": 0.1,
        "top_p": None,
        "context": 64,
        "layers": [0, 1],
        "recall": [[0.5, 0.75], [1, 0.25]],
    }
    lines = [*(one.as_dict() for one in rows), heads | {"conditions": CONDITIONS}, trace]
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in make([path], "0.0").items():
        (folder / name).write_bytes(content)
    return folder
