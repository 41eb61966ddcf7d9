"""Peers in processes of their own: a fake vLLM that records what it is asked for, and transformers itself on tiny shapes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from outrider.bench.cases import TINY, TINY_CASE
from outrider.bench.options import DecodeOptions, Run
from outrider.bench.peers import transformers as peer
from outrider.bench.peers.job import MARKER, REPEATS, Job, decoding, read_results, serve
from outrider.bench.peers.launch import peer_rows
from outrider.models.dummy import dummy_module

PLAIN = Run(engine="vllm", mode="plain", drafting=None)
DENSE = Run(engine="vllm", mode="dense", drafting="dense")


def quiet(what: str, done: int, of: int) -> None:
    pass


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_vllm_is_asked_for_what_the_job_says(vllm, short):
    options = DecodeOptions(engine=("vllm",), peer_vllm=vllm, rounds=2)
    cases = [short, replace(short, name="failing", context=77), replace(short, name="longer", context=300, batch=3)]
    rows = peer_rows(DENSE, cases, options, {"commit": "x"}, quiet)
    asked, *calls = logged(vllm)
    given = asked["given"]
    speculative = given.pop("speculative_config")
    assert given.pop("model").endswith("target") and speculative.pop("model").endswith("draft")
    assert given == {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 300 + 1024,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": True,
    }
    assert speculative == {
        "method": "draft_model",
        "num_speculative_tokens": 4,
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [0.9, 0.8, 0.7, 0.6],
    }
    assert asked["hidden"] == [TINY.target["hidden_size"], TINY.draft["hidden_size"]] and asked["sampler"] == "0"
    assert [(call["rows"], call["length"], call["params"]["max_tokens"]) for call in calls] == [
        *((2, 160, count) for count in (1, 17) * (1 + REPEATS)),
        *((3, 300, count) for count in (1, 17) * (1 + REPEATS)),
    ]
    assert all(call["distinct"] for call in calls)
    sampling = {name: value for name, value in calls[0]["params"].items() if name != "max_tokens"}
    assert sampling == {"temperature": 0.0, "ignore_eos": True, "detokenize": False}

    assert [row.case for row in rows] == ["short", "failing", "longer"]
    assert [row.error for row in rows] == [None, "RuntimeError: out of memory", None]
    assert rows[0].acceptance == {"kind": "scripted", "rates": [0.9, 0.8, 0.7, 0.6], "tokens_per_round": 4.0}
    assert rows[0].conditions["vllm"] == "0.26.0" and rows[0].conditions["commit"] == "x"
    assert (rows[2].mode, rows[2].drafting, rows[2].batch, rows[2].stages) == ("dense", "dense", 3, {})
    assert 0 < rows[0].tokens_per_second <= 2 * 16 / (4 * 0.002)  # 4 steps of at least 2 ms more
    assert not any(path.exists() for path in [vllm / "target", vllm / "draft"])


def test_a_peer_that_dies_leaves_rows_that_say_why(vllm, short, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    [row] = peer_rows(PLAIN, [short], DecodeOptions(engine=("vllm",), peer_vllm=vllm), {}, quiet)
    assert row.error.startswith("exit code 1; stderr ends: ") and row.error.endswith("RuntimeError: no kernel image")
    assert row.tokens_per_second is None and row.acceptance["kind"] == "none"
    assert "speculative_config" not in logged(vllm)[0]["given"]


def test_a_peer_that_takes_too_long_is_ended(vllm, short):
    (vllm / "vllm" / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    [row] = peer_rows(PLAIN, [short], DecodeOptions(engine=("vllm",), peer_vllm=vllm, peer_timeout=1), {}, quiet)
    assert row.error == "not done after 1 seconds"


def test_the_command_goes_on_behind_a_peer_that_fails(decode, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    outcome = decode("--case", "tiny", "--device", "cpu", "--engine", "transformers", "--mode", "plain", "--output", "x.jsonl")
    assert outcome.code == 1
    assert "tiny: transformers plain FAILED: exit code 1" in outcome.err
    assert json.loads((tmp_path / "x.jsonl").read_text())["error"] == "exit code 1"


def test_transformers_end_to_end(options, short):
    run = Run(engine="transformers", mode="plain", drafting=None)
    cases = [TINY_CASE, short]
    rows = peer_rows(run, cases, options(engine=("transformers",), rounds=1), {}, quiet)
    assert [row.error for row in rows] == [None, None]
    assert all(row.tokens_per_second > 0 and row.acceptance["tokens_per_round"] == 1.0 for row in rows)
    assert {"transformers"} <= rows[0].conditions.keys()


def test_a_primed_cache_spares_the_prompt_and_is_brought_back():
    """The tokens are those that follow the cache's own keys and values, computed step by step."""
    module = dummy_module(TINY.target, dtype=torch.float32, device=torch.device("cpu"), attention="sdpa")
    with torch.inference_mode():
        for weights in module.parameters():
            weights.mul_(10 if weights.dim() > 1 else 1)  # so that the best token leads by more than rounding
    prompts = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    cache = peer.noise_cache(module, 2, 4)
    lengths = []
    module.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.inference_mode():
        first = peer.generated(module, prompts, cache, 6)
        assert lengths == [1] * 6 and cache.get_seq_length() == 4
        assert torch.equal(peer.generated(module, prompts, cache, 6), first)
        token, expected = prompts[:, -1:], []
        for _ in range(6):
            token = module(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            expected.append(token)
    assert torch.equal(first, torch.cat(expected, dim=1))


def test_decoding_is_the_difference_of_two_calls(monkeypatch):
    clock, asked = [0.0], []

    def generate(count: int) -> int:
        # the first one reads the prompt, the second compiles, something else comes between in the fifth
        clock[0] += {0: 100, 1: 50, 5: 7}.get(len(asked), 0) + 3 + 0.5 * count
        asked.append(count)
        return count // 2

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert decoding(generate, 20) == (pytest.approx(10.0), 10)
    assert asked == [1, 21] * (1 + REPEATS)


def test_results_are_found_among_other_output(capsys):
    job = Job(target={}, draft=None, cases=[{"name": "a"}, {"name": "b"}], tokens=4, rates=[], device="cpu")
    assert Job(**json.loads(job.dumps())) == job

    def measure(case):
        print("100%|####|", end="")
        if case["name"] == "b":
            raise ValueError("no")
        return {"tokens_per_second": 2.0}

    serve(job, measure)
    out = capsys.readouterr().out
    assert out.count(MARKER) == 2
    assert read_results(out.splitlines()) == {"a": {"tokens_per_second": 2.0}, "b": {"error": "ValueError: no"}}
