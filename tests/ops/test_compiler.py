"""Memory through which blocks talk, and what keeps the CUDA C++ kernels from running."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from outrider import ops
from outrider.ops.attention_mass import cuda as mass
from outrider.ops.compiler import Mailboxes, check, obstacle
from outrider.ops.fused_linear import cuda as linear
from outrider.ops.rotary_append import cuda as rotation
from outrider.ops.sparse_attention import cuda as attention
from outrider.ops.token_select import cuda as selection

MODULES = [mass, attention, selection, rotation, linear]
C_TYPES = {"c_int": "int", "c_uint": "unsigned", "c_float": "float", "c_double": "double"}


@pytest.fixture
def mailboxes() -> Mailboxes:
    return Mailboxes(torch.device("cpu"))


def test_mailboxes_start_empty(mailboxes):
    taken = mailboxes.take(100, stream=7, capture=0)
    assert len(taken) >= 100 and (taken == -1).all() and taken.element_size() == 4


def test_launches_on_a_stream_share_their_mailboxes_and_streams_do_not(mailboxes):
    first, second, other = (mailboxes.take(10, stream=stream, capture=0).data_ptr() for stream in (1, 1, 2))
    assert first == second != other


def test_every_graph_has_its_own_mailboxes(mailboxes):
    eager = mailboxes.take(10, stream=1, capture=0)
    set_aside = mailboxes.set_aside
    graphs = [mailboxes.take(10, stream=1, capture=graph) for graph in (5, 5, 6)]
    assert graphs[0] is set_aside, "filled beforehand, so that the graph need not"
    assert graphs[0] is graphs[1]
    assert len({x.data_ptr() for x in (eager, graphs[0], graphs[2])}) == 3


def test_mailboxes_grow(mailboxes):
    mailboxes.take(10, stream=1, capture=0)
    assert len(mailboxes.take(1000, stream=1, capture=0)) >= 1000
    assert len(mailboxes.take(1000, stream=1, capture=3)) >= 1000, "what was set aside grew as well"
    assert len(mailboxes.take(10, stream=1, capture=0)) >= 10


def test_the_obstacle_names_the_device():
    assert "needs a CUDA device, got cpu" in obstacle(torch.device("cpu"))


def test_a_failed_launch_raises():
    class Library:
        def describe(self, error: int) -> bytes:
            return b"out of memory"

    check(Library(), 0, "op")
    with pytest.raises(RuntimeError, match="op: CUDA error 2: out of memory"):
        check(Library(), 2, "op")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-2])
def test_arguments_mirror_the_struct_of_the_kernel(module):
    """Names, order and types, field by field: nothing but this test would notice a difference."""
    struct = re.search(r"struct Arguments \{(.*?)\n\};", module.SOURCE.read_text(encoding="utf-8"), re.DOTALL)[1]
    declared = []
    for line in re.sub(r"//.*", "", struct).split(";"):
        found = re.fullmatch(r"\s*(?:const )?(\w+(?: long)?)\s*(.*?)\s*", line, re.DOTALL)
        if not found or not found[2]:
            continue
        for name in found[2].split(","):
            pointer, plain, size = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d)\])?\s*", name).groups()
            declared.append((plain, "pointer" if pointer else found[1] + (f"[{size}]" if size else "")))
    mirrored = []
    for name, kind in module.Arguments._fields_:
        text = {
            "c_void_p": "pointer",
            "c_long": "long long",
            "c_long_Array_3": "long long[3]",
            "c_long_Array_2": "long long[2]",
        }.get(kind.__name__)
        mirrored.append((name, text or C_TYPES[kind.__name__]))
    assert mirrored == declared


def test_sources_are_part_of_the_package():
    folder = Path(ops.__file__).parent
    assert {path.parent.parent.name for path in folder.glob("*/cuda/kernel.cu")} == {
        "attention_mass",
        "chunk_attention",
        "fused_linear",
        "rotary_append",
        "sparse_attention",
        "token_select",
    }
    assert all((folder / name).exists() for name in ("host.cuh", "ptx.cuh", "wgmma.cuh"))
