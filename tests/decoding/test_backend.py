"""The backend asked for reaches every op of a round, and one that cannot run is refused before any work."""

from __future__ import annotations

import importlib

import pytest
import torch

from outrider import config
from outrider.config import SamplingParams, engine_config
from outrider.decoding.outrider import Outrider
from outrider.decoding.pair import load_pair
from outrider.errors import OptionError
from outrider.models import wrap
from outrider.ops import backends
from outrider.ops.backends import BackendError

OPS = {  # where the stages call them
    "attention_mass": "outrider.decoding.scoring",
    "token_select": "outrider.guidance.selectors.{method}",
    "sparse_attention": "outrider.models.attention",
    "token_verify": "outrider.decoding.rounds",
}
FEW = SamplingParams(max_new_tokens=6)
SAMPLED = SamplingParams(max_new_tokens=6, temperature=1.0)  # greedy rounds need no token_verify


@pytest.fixture
def asked(method, monkeypatch):
    """The backends that every op was called with; "default" where none was named."""
    seen = {}

    def watch(op, module):
        run = getattr(module, op)

        def spy(*arguments, **options):
            seen.setdefault(op, set()).add(options.get("backend", "default"))
            return run(*arguments, **options)

        monkeypatch.setattr(module, op, spy)

    for op, name in OPS.items():
        watch(op, importlib.import_module(name.format(method=method)))
    return seen


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_backend_reaches_every_op(backend, method, asked, make_pair, make_engine, random_prompts):
    """token_verify has no kernels: it is left to its default."""
    engine = make_engine(make_pair("llama"), mode="sparse", method=method, backend=backend)
    engine.generate(random_prompts([20]), SAMPLED)
    assert asked == {op: {backend} for op in OPS} | {"token_verify": {"default"}}


def test_other_options_may_name_another_backend(method, asked, make_pair, make_engine, random_prompts):
    """The models are loaded once; what counts is the engine's own option."""
    engine = make_engine(make_pair("llama"), mode="sparse", method=method)
    engine.with_options(backend="reference").generate(random_prompts([20]), SAMPLED)
    assert asked == {op: {"reference"} for op in OPS} | {"token_verify": {"default"}}
    assert engine.target.backend == "auto"


def test_options_and_ops_know_the_same_backends():
    assert config.BACKENDS == backends.BACKENDS
    assert [engine_config(backend=name).backend for name in config.BACKENDS] == list(config.BACKENDS)


@pytest.mark.parametrize(
    "backend, reason", [("cuda", "it needs a CUDA device"), ("triton", "it needs a CUDA device, or TRITON")]
)
def test_kernels_are_refused_on_a_cpu(backend, reason, make_pair, make_module, make_engine, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused = rf"backend: got '{backend}'; allowed: auto, reference on device cpu \({backend}: {reason}.* got cpu\)"
    with pytest.raises(OptionError, match=refused):
        load_pair("no checkpoint", "is looked for", backend=backend)
    with pytest.raises(OptionError, match=refused):
        Outrider.load(backend=backend)
    with pytest.raises(OptionError, match=refused):
        make_engine(make_pair("llama"), backend=backend)
    with pytest.raises(OptionError, match=refused):
        wrap(make_module("llama"), None, name="tiny", backend=backend)


def test_a_kernel_that_cannot_run_the_pair_is_refused_before_any_work(method, make_pair, make_engine, monkeypatch):
    """The ops are asked with the shapes of a round, so that the first one does not fail behind a long prefill."""
    pytest.importorskip("triton", reason="kernels need triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(
        OptionError, match=r"backend: got 'triton'; allowed: .* with K = 16 \(T=17 query tokens; .* at most 16\)"
    ):
        make_engine(make_pair("llama"), mode="sparse", method=method, draft_tokens=16, backend="triton")
    make_engine(make_pair("llama"), mode="dense", method=method, draft_tokens=16, backend="triton")


def test_auto_leaves_out_triton_where_it_is_not_installed(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(backends, "_triton_missing", lambda: "the package triton is not installed")
    kernels = {"triton": lambda: pytest.fail("imports triton"), "cuda": lambda: "written for Hopper"}
    assert backends.choose("auto", gpu, kernels) == "reference"
    assert backends.choose("auto", gpu, kernels | {"cuda": lambda: None}) == "cuda"
    with pytest.raises(BackendError, match="backend: 'triton' cannot run this call: the package triton is not installed"):
        backends.choose("triton", gpu, kernels)
    assert backends.device_obstacle("triton", gpu) == "the package triton is not installed"


def test_scores_are_rows_that_kernels_read_fast(make_pair, make_engine, random_prompts, monkeypatch):
    """To the last round: 16 bytes at a time, and few widths to compile for. No list is wider than the target's cache."""
    module = importlib.import_module(OPS["token_select"].format(method="outrider"))
    attention = importlib.import_module(OPS["sparse_attention"])
    run, attend, widths = module.token_select, attention.sparse_attention, set()

    def select(scores, *arguments, **options):
        assert scores.stride()[-2:] == (scores.shape[-1], 1)
        widths.add(scores.shape[-1])
        return run(scores, *arguments, **options)

    def sparse(queries, keys, values, indices, *arguments, **options):
        assert indices is None or indices.shape[-1] <= keys.shape[1]
        return attend(queries, keys, values, indices, *arguments, **options)

    monkeypatch.setattr(module, "token_select", select)
    monkeypatch.setattr(attention, "sparse_attention", sparse)
    many = SamplingParams(max_new_tokens=40)
    make_engine(make_pair("llama"), mode="sparse", keep=1.0).generate(random_prompts([30, 20]), many)
    assert widths == {64, 128}
