"""The kernels' matrix: the full one on a GPU; tiny shapes on a CPU, in Triton's interpreter and in an emulated CUDA.

    pytest tests/kernels                                            what this machine can run
    pytest tests/kernels --kernel-summary FILE                      and one JSON line per op and backend into FILE

A test reports how near it came to its tolerance through the fixture `margin`: the largest error over the allowed error.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import emulation

GPU = torch.cuda.is_available()
OPS = (
    "attention_mass",
    "block_mass",
    "span_mass",
    "token_select",
    "sparse_attention",
    "kv_append",
    "rotary_append",
    "fused_linear",
    "quantized_keys",
    "unlisted_mass",
    "chunk_attention",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel-summary", metavar="FILE", help="write one JSON line per op and backend into FILE")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(scope="session")
def emulation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CUDA C++ kernels are built for the CPU."""
    if reason := emulation.obstacle():
        pytest.skip(f"emulated CUDA: {reason}")
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="session")
def emulated(emulation_folder: Path) -> Callable[..., AbstractContextManager[None]]:
    """`with emulated():` lets backend="cuda" run on the CPU."""
    return partial(emulation.emulated, emulation_folder)


@pytest.fixture(scope="module", params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend. A test calls `run_or_skip` where a backend does not take all arguments."""
    if request.param == "cuda" and not GPU:
        with request.getfixturevalue("emulated")():
            yield "cuda"
    else:
        yield request.param


@pytest.fixture(autouse=True, scope="module")
def poison_uninitialised_memory() -> Iterator[None]:
    """A buffer that is read before it is written shows: on fresh, zeroed memory such a read passes by luck."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args, **kwargs) -> Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(torch.nan) if x.element_size() > 1 else x
            return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).min)

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
        yield


@pytest.fixture(scope="session")
def run_or_skip() -> Callable[[Callable[[], Tensor]], Tensor]:
    """Runs a kernel; skips the test where the backend says that it cannot run this call."""

    def run(call: Callable):
        try:
            return call()
        except ValueError as error:
            if "cannot run this call" in str(error):
                pytest.skip(str(error))
            raise

    return run


@pytest.fixture
def margin(record_property) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The tolerance rule: an error of at most twice that of PyTorch's own low-precision result, and one rounding."""

    def check(got: Tensor, low_precision: Tensor, oracle: Tensor) -> None:
        assert got.isfinite().all()
        error = (got.double() - oracle).abs().max().item()
        allowed = 2 * (low_precision.double() - oracle).abs().max().item()
        allowed += torch.finfo(got.dtype).eps * oracle.abs().max().item()
        record_property("margin", error / allowed if allowed else 0.0)
        assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"

    return check


class Summary:
    """Counts outcomes per op and backend, from the names of the test files and of the backend parameter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], dict] = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0, "margin": 0.0})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        op = Path(report.location[0]).stem.removeprefix("test_")
        if op not in OPS:
            return
        parameters = report.nodeid.split("[")[-1].rstrip("]").split("-")
        if "reference" in parameters:
            return
        backend = "cuda" if "cuda" in parameters else "triton"
        row = self.rows[op, backend]
        row[report.outcome] += 1
        row["margin"] = max([row["margin"], *(value for name, value in report.user_properties if name == "margin")])

    def pytest_sessionfinish(self) -> None:
        import triton

        conditions = {"torch": torch.__version__, "triton": triton.__version__}
        conditions["device"] = torch.cuda.get_device_name() if GPU else "cpu, interpreted or emulated"
        text = "".join(
            json.dumps({"op": op, "backend": backend, **row, "conditions": conditions}) + "\n"
            for (op, backend), row in sorted(self.rows.items())
        )
        self.path.write_text(text, encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--kernel-summary", default=None)
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Summary(Path(path)))
