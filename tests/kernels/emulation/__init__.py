"""The CUDA C++ kernels on a CPU: their own source, host part and all, compiled by g++ against an emulated CUDA.

    threads.h    CUDA's threads, blocks and clusters on one thread, shared memory, barriers
    cuda.h       names and intrinsics of CUDA C++, launches
    ptx.h        the PTX instructions
    wgmma.cuh    the products of warpgroups, in place of the ops' header

What g++ cannot read is rewritten first: declarations of `__shared__` variables, and inline assembly, which becomes calls of the
functions in ptx.h that are named after the instructions.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import outrider
from outrider.ops import compiler

HEADERS = Path(__file__).parent
OPS = Path(outrider.__file__).parent / "ops"
PTX = (HEADERS / "ptx.h").read_text(encoding="utf-8")
COMPILE = ["g++", "-std=c++20", "-Og", "-w", "-fno-strict-aliasing", "-fPIC"]
COMPILE += ["-U_FORTIFY_SOURCE", "-fno-gnu-unique"]  # jumps between stacks are no errors; every library has its own variables
REGISTERS = {".pred": "bool", ".b32": "uint32_t", ".u32": "uint32_t", ".b64": "uint64_t", ".u64": "uint64_t", ".f32": "float"}


@cache
def obstacle() -> str | None:
    """Why kernels cannot be emulated on this machine, or None."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "needs g++, on Linux"
    command = [*COMPILE, "-fsyntax-only", "-x", "c++", "-"]
    probe = subprocess.run(command, input="#include <concepts>\n", text=True, capture_output=True)
    return None if probe.returncode == 0 else "needs a g++ that knows C++20"


def translate(source: str) -> str:
    """CUDA C++ as C++ for the headers here."""
    source = re.sub(r"#include <(cuda|cooperative_groups)[^>]*>\n", "\n", source)
    source = re.sub(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?(\w+)\s+(\w+)\[\];",
                    r"\1* const \2 = (\1*)emulation::dynamic_shared();", source)  # fmt: skip
    source = re.sub(r"__shared__\s+([^;]+);", lambda match: _shared_variables(match[1]), source)
    source = re.sub(r"(cudaLaunchCooperativeKernel\()\((?:const )?void\s*\*\)", r"\1", source)  # the kernel's type is needed
    return _replace_assembly(source)


def _shared_variables(declaration: str) -> str:
    """References into the block's shared memory for `unsigned x[4], y`."""
    first, *others = _split(re.sub(r"__align__\(\d+\)", "", declaration), ",")
    match = re.fullmatch(r"\s*(.*?)\s*(\w+)\s*((?:\[.*\])?)\s*", first, re.DOTALL)
    assert match, declaration
    type_ = match[1]
    variables = [(match[2], match[3]), *(re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])?)\s*", other).groups() for other in others)]
    return " ".join(f"auto& {name} = emulation::shared<{type_}{size}, __COUNTER__>();" for name, size in variables)


def _replace_assembly(source: str) -> str:
    done, rest = "", source
    while match := re.search(r"\basm\b\s*(?:volatile\b)?\s*\(", rest):
        end = _closing(rest, match.end())
        done += rest[: match.start()] + _instructions(rest[match.end() : end])
        rest = rest[end + 1 :]
    return done + rest


def _instructions(assembly: str) -> str:
    """Calls for `"name.of.type %0, [%1], 16;" : "=r"(x) : "l"(p)`: name_of_type(x, p, 16)."""
    template, *operands = _split(assembly, ":")
    text = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace(r"\n", " ").replace(r"\t", " ").strip()
    given = [operand[operand.index("(") + 1 : operand.rindex(")")]
             for section in operands[:2] for operand in _split(section, ",") if operand.strip()]  # fmt: skip
    if scoped := text.startswith("{"):
        text = text[1:-1]
    calls = []
    for instruction in filter(None, map(str.strip, text.split(";"))):
        name, arguments = instruction.split(None, 1) if " " in instruction else (instruction, "")
        if name == ".reg":
            kind, names = arguments.split(None, 1)
            calls.append(f"{REGISTERS[kind]} {names}")
            continue
        tokens = [token for token in re.findall(r"[^\s,\[\]{}]+", arguments) if token != "_"]
        values = ", ".join(given[int(token[1:])] if token[0] == "%" else token for token in tokens)
        function = re.sub(r"[.:]+", "_", name)
        known = re.search(rf"\b{function}\(", PTX)
        calls.append(f"ptx_instruction::{function}({values})" if known else f'emulation::fail("{name} is not emulated")')
    return "{ " + "; ".join(calls) + "; }" if scoped else "; ".join(calls)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that is open at `start`."""
    depth, quoted = 1, False
    for i in range(start, len(text)):
        quoted ^= text[i] == '"' and text[i - 1] != "\\"
        depth += 0 if quoted else {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis behind {text[start : start + 60]!r}")


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that are neither quoted nor in brackets."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += 0 if quoted else {"(": 1, "[": 1, "<": 1, ")": -1, "]": -1, ">": -1}.get(character, 0)
        if character == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def build(source: Path, folder: Path, *defines: str) -> ctypes.CDLL:
    """What `compiler.build` gives, for the CPU. Raises ValueError with g++'s message."""
    binary, errors = _compile(source, folder, *defines)
    if errors:
        raise ValueError(f"{source}: g++ says\n{errors}")
    library = ctypes.CDLL(str(binary))
    library.describe.restype = ctypes.c_char_p
    library.capture.restype = ctypes.c_ulonglong
    return library


@cache
def _compile(source: Path, folder: Path, *defines: str) -> tuple[Path, str]:
    """The library's file, and what is wrong."""
    place = folder / source.parents[1].name
    place.mkdir(exist_ok=True)
    name = "_".join([source.stem, *(re.sub(r"\W", "_", define) for define in defines)])
    translated, binary = place / f"{name}.cpp", place / f"{name}.so"
    for original in [source, *source.parent.glob("*.cuh"), *OPS.glob("*.cuh")]:
        target = translated if original == source else place / original.name
        instead = HEADERS / original.name
        text = translate(original.read_text(encoding="utf-8")) if not instead.exists() else instead.read_text(encoding="utf-8")
        target.write_text(text, encoding="utf-8")
    _precompile_headers(folder)
    command = [*COMPILE, "-shared", f"-I{folder}", f"-I{HEADERS}", "-include", "ptx.h", *(f"-D{define}" for define in defines)]
    done = subprocess.run([*command, str(translated), "-o", str(binary)], capture_output=True, text=True)
    return binary, "" if done.returncode == 0 else done.stderr[:2000]


@cache
def _precompile_headers(folder: Path) -> None:
    """Saves a third of the time that a kernel takes."""
    subprocess.run([*COMPILE, "-x", "c++-header", str(HEADERS / "ptx.h"), "-o", str(folder / "ptx.h.gch")], check=True)


@contextmanager
def emulated(folder: Path, *, multiprocessors: int = 7) -> Iterator[None]:
    """Within, backend="cuda" takes tensors of the CPU, and builds into `folder`. Afterwards all mailboxes must be empty."""
    mailboxes = compiler.Mailboxes(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "build", lambda source, *defines: build(source, folder, *defines))
        patch.setattr(compiler, "obstacle", lambda device: None)
        patch.setattr(compiler, "multiprocessors", lambda device: multiprocessors)
        patch.setattr(compiler, "mailboxes", lambda device: mailboxes)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        yield
    assert all((memory == -1).all() for memory in mailboxes.owned.values())
