"""The shape of the package: who may import whom, how long a module may be, and what `import outrider` costs.

cli -> eval, bench, integrations -> decoding -> {models, guidance} -> ops
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import outrider

PACKAGE = Path(outrider.__file__).parent
BASE = {"types", "config", "errors"}
BELOW_DECODING = BASE | {"models", "guidance", "ops"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "config": {"errors"},
    "ops": set(),  # within ops: see check_op
    "models": BASE | {"ops"},
    "guidance": BASE | {"ops"},
    "decoding": BELOW_DECODING,
    "integrations": BELOW_DECODING | {"decoding"},
    "eval": BELOW_DECODING | {"decoding"},
    "bench": BELOW_DECODING | {"decoding"},
    "cli": BELOW_DECODING | {"decoding", "integrations", "eval", "bench", ""},
    "": BASE | {"decoding"},  # the package itself: names imported when first used
}
PEERS = ("bench", "peers")  # programs of their own, one of which measures transformers
MAX_LINES, MAX_KERNEL_LINES = 300, 600
SHARED_BY_OPS = ("checks", "backends", "compiler")
KERNELS = ("triton.py", "cuda.py", "*.cu", "*.cuh")


def modules(package: Path = PACKAGE) -> list[Path]:
    return sorted(path.relative_to(package) for path in package.rglob("*.py"))


def imported(source: str, module: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, at any depth: inside functions, under TYPE_CHECKING, relative, by string."""
    package = ["outrider", *module.parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (start, node.module) if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def part_of(dotted: str) -> str:
    """The part of the package that an `outrider...` name lives in; "" is the package's own namespace."""
    parts = dotted.split(".")
    first = parts[1] if len(parts) > 1 else ""
    return first if first in ALLOWED or (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").exists() else ""


def violations(module: Path, source: str) -> list[str]:
    """Every import of `module` that breaks an arrow, as readable complaints."""
    own = module.parts[0] if len(module.parts) > 1 else module.stem.replace("__init__", "")
    found = []
    for name in imported(source, module):
        top = name.split(".")[0]
        if top == "outrider":
            part = part_of(name)
            if own == "ops" and part == "ops":
                found += check_op(module, name)
            elif part != own and part not in ALLOWED[own]:
                found.append(f"{module}: imports {name}; {own or 'outrider'} may import {sorted(ALLOWED[own])}")
        elif top == "transformers" and own != "models" and module.parts[:2] != PEERS:
            found.append(f"{module}: imports {name}; only models/ and bench/peers/ may import transformers")
        elif top == "triton" and not (own in ("ops", "bench") and module.name == "triton.py"):
            found.append(f"{module}: imports {name}; only ops/*/triton.py and bench/*/triton.py may import triton")
    return found


def check_op(module: Path, name: str) -> list[str]:
    """An op imports only from its own folder and the checks; implementations do not import each other or the api."""
    if len(module.parts) < 3:
        return []  # ops/__init__.py collects the ops, ops/checks.py is shared by them
    folder = module.parts[1]
    parts = name.split(".")[2:]  # behind outrider.ops
    if parts[0] in SHARED_BY_OPS:
        return []
    if parts[0] != folder:
        return [f"{module}: imports {name}; an op may import its own folder and {SHARED_BY_OPS}"]
    implementations = {"reference", "triton", "cuda", "api"} & set(parts[1:2])
    if module.name not in ("api.py", "__init__.py") and implementations - {module.stem}:
        return [f"{module}: imports {name}; reference and kernels never import each other"]
    return []


def too_long(module: Path, lines: int) -> bool:
    kernel = any(module.match(pattern) for pattern in KERNELS) and module.parts[0] == "ops"
    return lines > (MAX_KERNEL_LINES if kernel else MAX_LINES)


@pytest.mark.parametrize("module", modules(), ids=str)
def test_import_arrows(module):
    assert violations(module, (PACKAGE / module).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "module, source",
    [
        ("guidance/x.py", "from outrider.models import KVCache"),
        ("models/x.py", "import outrider.guidance.alignment"),
        ("models/x.py", "def f():\n    from outrider.decoding import engine"),
        ("models/x.py", "from ..decoding.engine import Engine"),
        ("decoding/x.py", "import importlib\nimportlib.import_module('outrider.eval.facts')"),
        ("decoding/x.py", "from outrider import SamplingParams"),
        ("decoding/x.py", "from outrider.cli.main import main"),
        ("decoding/x.py", "def f():\n    import transformers"),
        ("guidance/x.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
        ("eval/x.py", "from outrider.integrations import vllm"),
        ("integrations/x.py", "from outrider.eval import rows"),
        ("eval/x.py", "from outrider.bench import results"),
        ("bench/x.py", "from outrider.eval import rows"),
        ("bench/x.py", "from outrider.cli.screen import Screen"),
        ("bench/x.py", "import transformers"),
        ("bench/stream/rate.py", "import triton"),
        ("types.py", "from outrider.config import Budget"),
        ("config.py", "from outrider import types"),
        ("errors.py", "from . import config"),
        ("ops/a/api.py", "from outrider.errors import OptionError"),
        ("ops/a/api.py", "from outrider.types import Selection"),
        ("ops/a/api.py", "from outrider.ops.b import reference"),
        ("ops/a/api.py", "from ..b.api import b"),
        ("ops/a/reference.py", "from outrider.ops.a.triton import kernel"),
        ("ops/a/reference.py", "from outrider.ops.a import triton"),
        ("ops/a/triton.py", "from .reference import a"),
        ("ops/a/triton.py", "def f():\n    from . import reference"),
        ("ops/a/reference.py", "import triton.language as tl"),
        ("ops/a/api.py", "import triton"),
        ("models/triton.py", "import triton"),
    ],
)
def test_import_arrows_see_a_planted_violation(module, source):
    assert len(violations(Path(module), source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("models/x.py", "import transformers\nfrom outrider.ops import sparse_attention\nfrom outrider.types import Selection"),
        ("decoding/x.py", "from outrider.models import KVCache\nfrom outrider.guidance import selectors\nfrom . import engine"),
        ("cli/main.py", "from outrider import __version__\nfrom outrider.eval import rows\nfrom outrider.bench import cases"),
        ("bench/peers/x.py", "def f():\n    from transformers import DynamicCache"),
        ("bench/stream/triton.py", "import triton"),
        ("ops/a/api.py", "from outrider.ops.a import reference\nfrom outrider.ops.checks import check_tensor"),
        ("ops/a/api.py", "def f():\n    from outrider.ops.a import triton"),
        ("ops/a/triton.py", "import triton\nimport triton.language as tl"),
        ("ops/__init__.py", "from outrider.ops.a import a"),
    ],
)
def test_import_arrows_let_pass_what_is_allowed(module, source):
    assert violations(Path(module), source) == []


def kernel_sources(package: Path = PACKAGE) -> list[Path]:
    return sorted(path.relative_to(package) for pattern in ("*.cu", "*.cuh") for path in package.rglob(pattern))


@pytest.mark.parametrize("module", modules() + kernel_sources(), ids=str)
def test_module_is_short(module):
    lines = len((PACKAGE / module).read_text(encoding="utf-8").splitlines())
    assert not too_long(module, lines), f"{module} has {lines} lines"


@pytest.mark.parametrize(
    "module, lines, wanted",
    [
        ("decoding/engine.py", 300, False),
        ("decoding/engine.py", 301, True),
        ("ops/a/triton.py", 600, False),
        ("ops/a/triton.py", 601, True),
        ("ops/a/reference.py", 301, True),
        ("models/triton.py", 301, True),
    ],
)
def test_length_limit_sees_a_planted_violation(module, lines, wanted):
    assert too_long(Path(module), lines) is wanted


# what a module needs that need not be installed, by the end of its name
OUTSIDE = {".triton": "triton", ".integrations.lm_eval": "lm_eval"}


def outside(name: str) -> str | None:
    return next((package for end, package in OUTSIDE.items() if name.endswith(end)), None)


def importable() -> list[str]:
    return [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "outrider.")]


def in_fresh_process(code: str) -> list:
    """Run code that prints one JSON document."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_costs_nothing():
    """In a fresh process: no heavy package is loaded, and nothing outside the package changes."""
    seen = in_fresh_process(
        "import json, logging, os, sys, threading, warnings\n"
        "def state(): return [dict(os.environ), len(logging.root.handlers), logging.root.level, repr(warnings.filters),"
        " threading.active_count(), sys.path[:], repr(sys.excepthook)]\n"
        "before = state()\n"
        "import outrider\n"
        "outrider.__all__, outrider.__version__\n"
        "heavy = ('torch', 'transformers', 'triton', 'numpy', 'tokenizers', 'safetensors', 'rich', 'typer')\n"
        "print(json.dumps([state() == before, [name for name in heavy if name in sys.modules]]))"
    )
    assert seen == [True, []]


def test_importing_every_module_loads_no_model_code():
    """transformers is imported, and its table of attention functions touched, when a model is loaded; triton by a kernel.

    Modules for other programs are imported by these alone.
    """
    names = [name for name in importable() if outside(name) is None]
    seen = in_fresh_process(
        f"import importlib, json, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "from_us = [name for name in ('transformers', 'triton', 'lm_eval') if name in sys.modules]\n"
        "from transformers import AttentionInterface\n"
        "print(json.dumps([from_us, 'outrider' in AttentionInterface().valid_keys()]))"
    )
    assert seen == [[], False]


@pytest.mark.parametrize("name", importable())
def test_module_can_be_imported(name):
    if (package := outside(name)) is not None:
        pytest.importorskip(package)
    module = importlib.import_module(name)
    assert module.__doc__ or Path(module.__file__).stat().st_size == 0, "every module says what it is for"


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == outrider.__version__


def test_public_names_are_frozen():
    """Adding a name is a decision: it stays for good."""
    names = ["Budget", "Chunk", "EngineConfig", "Outrider", "OutriderError", "Result", "SamplingParams", "Stream"]
    assert outrider.__all__ == names
    assert all(getattr(outrider, name).__name__ == name for name in outrider.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        outrider.Engine  # noqa: B018


def test_every_folder_has_its_place():
    """A new part of the package gets an arrow before it gets a module."""
    assert {module.parts[0] if len(module.parts) > 1 else module.stem for module in modules()} <= {*ALLOWED, "__init__"}
