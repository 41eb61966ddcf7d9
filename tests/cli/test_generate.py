"""`outrider generate`: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest

from outrider import Outrider, SamplingParams
from outrider.cli.screen import Screen

SHORT = ["--max-new-tokens", "12", "--ignore-eos", "--min-context", "8", "--recent", "4"]
STATS = {
    "mode",
    "method",
    "prompt_tokens",
    "generated_tokens",
    "rounds",
    "accepted_per_round",
    "kept_fraction",
    "kv_read_fraction",
    "seconds",
    "tokens_per_second",
}


@pytest.fixture
def prompt(folder) -> list[str]:
    return ["--prompt-file", str(folder / "text.txt"), "--prompt-tokens", "200"]


def test_text_is_what_the_library_generates(outrider, pair, folder, prompt):
    outcome = outrider("generate", *pair, *prompt, *SHORT, "--mode", "dense", "-K", "2")
    engine = Outrider.load(*pair[1::2], mode="dense", draft_tokens=2)
    tokens = engine.tokenize((folder / "text.txt").read_text())[:200]
    [result] = engine.generate([tokens], SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert outcome.code == 0
    assert outcome.out == result.text + "\n"
    assert "tokens/s" in outcome.err and "accepted tokens per round" in outcome.err


def test_modes_run_in_turn_on_the_same_models(outrider, pair, prompt, alignment, tmp_path, monkeypatch):
    loaded = []
    load = Outrider.load.__func__
    monkeypatch.setattr(Outrider, "load", classmethod(lambda *a, **k: loaded.append(a) or load(*a, **k)))
    stats = tmp_path / "stats.json"
    flags = ["--mode", "dense", "--mode", "sparse", "--method", "sts", "--keep", "0.3", "--audit", "--stats-json", stats]
    outcome = outrider("generate", *pair, *prompt, *SHORT, "--alignment", alignment, *flags)
    assert outcome.code == 0 and len(loaded) == 1
    assert "sparse (sts)" in outcome.err and "agreement with the dense target" in outcome.err
    assert len(outcome.out.splitlines()) >= 2
    dense, sparse = json.loads(stats.read_text())
    assert (dense["mode"], dense["method"], sparse["mode"], sparse["method"]) == ("dense", None, "sparse", "sts")
    for run in (dense, sparse):
        assert run.keys() >= STATS
        assert (run["prompt_tokens"], run["generated_tokens"], run["audited"]) == (200, 12, 12)
        assert set(run["seconds"]) == {"prefill", "propose", "score", "select", "verify", "accept", "confirm", "audit"}
    assert dense["kept_fraction"] == 1 and dense["agreement"] == 1
    assert 0.2 < sparse["kept_fraction"] < 0.5


def test_requests_and_metrics(outrider, fails, pair, prompt, tmp_path):
    stats, metrics = tmp_path / "stats.json", tmp_path / "outrider.prom"
    outcome = outrider(
        "generate", *pair, *prompt, *prompt, *SHORT, "--mode", "dense", "--stats-json", stats, "--metrics", metrics
    )
    assert outcome.code == 0
    run = json.loads(stats.read_text())
    assert [(one["finish_reason"], one["generated_tokens"]) for one in run["requests"]] == [("length", 12)] * 2
    assert sum(one["accepted"] for one in run["requests"]) == run["accepted"]
    text = metrics.read_text()
    [accepted] = re.findall(r'outrider:spec_decode_num_accepted_tokens_total\{mode="dense",.*\} (.*)', text)
    assert float(accepted) == run["accepted"]
    assert 'finished_reason="length"' in text
    missing = tmp_path / "none" / "outrider.prom"
    assert f"metrics: got '{missing}'; allowed: a file in a folder" in fails("generate", *pair, *prompt, "--metrics", missing)


def test_exact_writes_the_text_of_dense(outrider, fails, pair, prompt, alignment, tmp_path):
    stats = tmp_path / "stats.json"
    flags = ["--mode", "dense", "--mode", "exact", "--keep", "0.1", "--exact-every", "4", "--stats-json", stats]
    outcome = outrider("generate", *pair, *prompt, *SHORT, "--alignment", alignment, *flags)
    assert outcome.code == 0 and "dense forwards that confirm" in outcome.err
    dense, exact = json.loads(stats.read_text())
    assert (exact["mode"], exact["method"], exact["generated_tokens"]) == ("exact", "outrider", 12)
    assert exact["tentative"] == exact["confirmed"] + exact["rolled_back"] > 0 == dense["tentative"]
    assert exact["confirmations"] >= 1 and exact["seconds"]["confirm"] > 0
    first, second = outcome.out.splitlines()[:1], outcome.out.splitlines()[-1:]
    assert first == second, "the same text twice"
    message = fails("generate", *pair, *prompt, "--mode", "exact", "--exact-every", "65")
    assert "exact-every: got 65; allowed: a whole number in 1 .. 64, or None" in message


def test_a_guard_says_what_it_found(outrider, fails, pair, prompt, alignment, tmp_path):
    stats = tmp_path / "stats.json"
    flags = ["--mode", "dense", "--mode", "sparse", "--min-context", "64", "--guard-every", "2", "--stats-json", stats]
    outcome = outrider("generate", *pair, *prompt, *SHORT, "--alignment", alignment, *flags, "--guard-tolerance", "1")
    assert outcome.code == 0 and "audits by the guard" in outcome.err and "seconds: audit" in outcome.err
    dense, sparse = json.loads(stats.read_text())
    assert dense["audits"] == 0 and dense["disagreement"] is None
    assert sparse["audits"] == sparse["rounds"] // 2 > 0 and sparse["budget_raised"] == 0
    assert 0 <= sparse["disagreement"] <= 1 and 0 < sparse["recalled_mass"] <= 1 and sparse["fell_back_at"] is None
    message = fails("generate", *pair, *prompt, "--guard-every", "-1")
    assert "guard-every: got -1; allowed: a whole number >= 1, or None" in message


def test_prompts_are_read_from_lists_where_asked(outrider, fails, pair, prompt, alignment, tmp_path):
    stats, blocks = tmp_path / "stats.json", ["--prefill-block", "16", "--prefill-chunk", "64", "--prefill-min-context", "64"]
    flags = ["--mode", "dense", "--prefill", "sparse", "--prefill-keep", "0.3", "--recent", "4", *blocks, "--stats-json", stats]
    outcome = outrider("generate", *pair, *prompt, *SHORT, "--alignment", alignment, *flags)
    assert outcome.code == 0 and "kept by the prompt's blocks" in outcome.err
    assert 0.25 < json.loads(stats.read_text())["prefill_kept_fraction"] < 0.4
    told = fails("generate", *pair, *prompt, "--mode", "plain", *flags[2:])
    assert told == "prefill: got 'sparse'; allowed: dense with mode plain, which has no draft"
    assert fails("generate", *pair, *prompt, "--prefill", "some") == "prefill: got 'some'; allowed: dense, sparse"


def test_one_mode_writes_one_object(outrider, pair, prompt, alignment, tmp_path):
    stats = tmp_path / "stats.json"
    flags = ["--alignment", alignment, "--top-p", "0.8", "--map", "monotone+average", "--stats-json", stats]
    assert outrider("generate", *pair, *prompt, *SHORT, *flags).code == 0
    run = json.loads(stats.read_text())
    assert run["method"] == "outrider" and run["kept_fraction"] < 1 and run["rounds"] > 0
    assert list(tmp_path.iterdir()) == [stats]


def test_several_prompts_are_not_interleaved(outrider, pair, tmp_path):
    stats = tmp_path / "stats.json"
    flags = [*pair, *SHORT, "--mode", "dense"]
    prompts = ["the old house", "a quiet river and then"]
    alone = [outrider("generate", *flags, "--prompt", prompt).out for prompt in prompts]
    together = outrider(
        "generate", *flags, *(flag for prompt in prompts for flag in ("--prompt", prompt)), "--stats-json", stats
    )
    assert together.out in ("".join(alone), "".join(reversed(alone)))
    assert "prompt 1: 12 tokens, length" in together.err and "prompt 2: 12 tokens, length" in together.err
    run = json.loads(stats.read_text())
    assert run["generated_tokens"] == 24 and run["tokens_per_second"] > 0


def test_sampling_flags_reach_the_sampler(outrider, pair, prompt):
    def text(*flags):
        return outrider("generate", *pair, *prompt, *SHORT, "--mode", "dense", *flags).out

    hot = ["--temperature", "1.5"]
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text(*hot, "--sampling-top-k", "1") == text(*hot, "--sampling-top-p", "1e-6") == text()
    whole = text()[:-1]
    stop = whole[len(whole) // 2 :][:3]
    assert text("--stop", stop, "--stop", "never seen") == whole[: whole.index(stop)] + "\n"


def test_draft_equal_to_target_warns_and_runs(outrider, pair, prompt):
    outcome = outrider("generate", *pair[:2], "--draft", pair[1], *prompt, *SHORT, "--mode", "dense")
    assert outcome.code == 0
    assert "outrider: warning: draft and target are the same checkpoint" in outcome.err.splitlines()[0]


def test_interrupt_prints_what_there_is(outrider, pair, tmp_path, monkeypatch):
    """Ctrl-C in the third report of progress of two prompts: both partial texts, the table, and no statistics file."""
    calls = []

    def progress(self, what, done, of):
        calls.append(what)
        if calls.count("generate") == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Screen, "progress", progress)
    prompts = ["--prompt", "the old house", "--prompt", "a quiet river", "--mode", "dense", "--mode", "dense"]
    outcome = outrider("generate", *pair, *prompts, "--max-new-tokens", "500", "--stats-json", tmp_path / "stats.json")
    assert outcome.code == 130
    assert outcome.out.strip() and "tokens/s" in outcome.err
    assert "prompt 1: " in outcome.err and "prompt 2: " in outcome.err and outcome.err.count("tokens, interrupted") == 2
    assert outcome.err.splitlines()[-1] == "outrider: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_of_a_real_process(spawn, pair, prompt, number):
    """Text streams while it is generated: some is there before the signal, more work would follow it."""
    process = spawn("generate", *pair, *prompt, "--mode", "dense", "--max-new-tokens", "1800", "--ignore-eos")
    early = process.stdout.read(5)
    assert process.poll() is None
    process.send_signal(number)
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert len(early) == 5 and rest.endswith("\n")
    assert "tokens/s" in err and "Traceback" not in err and "tokens/s" not in early + rest
    assert err.splitlines()[-1] == "outrider: interrupted"


def test_a_closed_pipe_ends_quietly(spawn, pair, prompt):
    process = spawn("generate", *pair, *prompt, "--mode", "dense", "--max-new-tokens", "1800", "--ignore-eos")
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert process.stderr.read() == ""
    process.stdout = None


class TestBadInput:
    """One line that names the option, what came and what is allowed; exit code 2; nothing on stdout; no file."""

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--keep", "0"], "keep: got 0.0; allowed: a number in (0, 1]"),
            (["--keep", "1.5"], "keep: got 1.5; allowed: a number in (0, 1]"),
            (["--keep", "nan"], "keep: got nan; allowed: a number in (0, 1]"),
            (["--top-p", "0"], "top-p: got 0.0; allowed: a number in (0, 1]"),
            (["--keep", "0.1", "--top-p", "0.9"], "keep and top-p: got (0.1, 0.9); allowed: only one of the two"),
            (["-K", "0"], "K (draft-tokens): got 0; allowed: a whole number >= 1"),
            (["--method", "magic"], "method: got 'magic'; allowed: outrider, sts, specattn"),
            (["--method", "magic", "--mode", "dense"], "method: got 'magic'; allowed: outrider, sts, specattn"),
            (["--mode", "dense", "--mode", "fast"], "mode: got 'fast'; allowed: plain, dense, sparse"),
            (["--score-keys", "8bit"], "score-keys: got '8bit'; allowed: auto, exact, 4bit, 2bit"),
            (["--dtype", "int8"], "dtype: got 'int8'; allowed: float32, bfloat16, float16"),
            (["--device", "abacus"], "device: got 'abacus'; allowed: cpu"),
            (["--backend", "magic"], "backend: got 'magic'; allowed: auto, reference, triton, cuda"),
            (["--backend", "cuda"], "backend: got 'cuda'; allowed: auto, reference"),
            (["--temperature", "-1"], "temperature: got -1.0; allowed: a number >= 0"),
            (["--max-new-tokens", "0"], "max-new-tokens: got 0; allowed: a whole number >= 1"),
            (["--seed", "-1"], "seed: got -1; allowed: a whole number in 0 .. 2^63 - 1"),
            (["--stop", ""], "stop: got ('',); allowed: non-empty strings"),
            (["--prompt-tokens", "0"], "prompt-tokens: got 0; allowed: a whole number >= 1"),
        ],
    )
    def test_options(self, fails, pair, flags, message):
        assert fails("generate", *pair, "--prompt", "the old house", *flags).startswith(message)

    def test_prompts(self, fails, pair, folder, tmp_path):
        assert "at least one" in fails("generate", *pair)
        assert fails("generate", *pair, "--prompt", "").startswith("--prompt 1: got an empty text; allowed: ")
        binary = tmp_path / "binary"
        binary.write_bytes(b"\x7fELF\0")
        latin = tmp_path / "latin.txt"
        latin.write_bytes("the caf\u00e9".encode("latin-1"))
        for path, complaint in (
            (tmp_path / "none", "No such file"),
            (tmp_path, "directory"),
            (binary, "offset 4"),
            (latin, "offset 7"),
        ):
            message = fails("generate", *pair, "--prompt", "fine", "--prompt-file", path)
            assert message.startswith(f"--prompt-file {path}: ") and complaint in message
        message = fails("generate", *pair, "--mode", "dense", "--prompt-file", folder / "short.txt", "--prompt-tokens", "1000")
        assert (
            message.startswith("--prompt-tokens: got 1000, but --prompt-file")
            and "tokens; allowed: at most that many" in message
        )

    def test_prompt_and_new_tokens_over_the_context(self, fails, pair):
        message = fails("generate", *pair, "--mode", "dense", "--prompt", "the old house", "--max-new-tokens", "2048")
        assert "max-new-tokens 2048" in message and "allowed: at most 2048" in message

    def test_models(self, fails, pair, folder, tmp_path):
        words = ["--mode", "dense", "--prompt", "the old house"]
        message = fails("generate", *pair[:2], "--draft", folder / "stranger", *words)
        assert (
            message.startswith("draft: token ")
            and "target" in message
            and "allowed: a draft with the target's vocab" in message
        )
        message = fails("generate", "--target", tmp_path, *pair[2:], *words)
        assert message.startswith(f"target '{tmp_path}': cannot be loaded")
        assert fails("generate", *pair[:2], *words).startswith("draft: got None; allowed: ")

    def test_attention_that_cannot_be_routed(self, fails, pair, folder, tmp_path):
        """It must not run densely without a word."""
        from transformers import BloomConfig, BloomForCausalLM

        BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=2, n_head=2)).save_pretrained(tmp_path / "bloom")
        message = fails("generate", "--target", tmp_path / "bloom", *pair[2:], "--mode", "dense", "--prompt", "the old house")
        assert message.startswith("target ") and "bloom" in message and "routed" in message

    def test_alignment(self, fails, pair, folder, alignment, tmp_path):
        words = ["--prompt", "the old house"]
        assert fails("generate", *pair, *words).startswith("alignment: got None; allowed: a file made by")
        message = fails("generate", *pair, *words, "--alignment", tmp_path / "none.json")
        assert "none.json: cannot be read" in message
        swapped = ["--target", folder / "draft", "--draft", folder / "target"]
        message = fails("generate", *swapped, *words, "--alignment", alignment)
        assert "made for the target target" in message and "but the target here is draft" in message
        message = fails("generate", *pair, *words, "--alignment", alignment, "--map", "joint+magic")
        assert message.startswith("alignment map: got 'joint+magic'; allowed")

    def test_later_modes_are_checked_before_the_first_one_runs(self, fails, pair):
        assert fails("generate", *pair, "--prompt", "x", "--mode", "dense", "--mode", "sparse").startswith(
            "alignment: got None"
        )

    def test_statistics_file(self, fails, pair, tmp_path):
        for path in (tmp_path, tmp_path / "none" / "stats.json"):
            message = fails("generate", *pair, "--prompt", "x", "--mode", "dense", "--stats-json", path)
            assert message.startswith(f"stats-json: got '{path}'; allowed: a file in a folder that can be written")
        assert list(tmp_path.iterdir()) == []


def test_caches_in_8_bits_are_used_and_named(outrider, fails, pair, prompt, tmp_path):
    path = tmp_path / "stats.json"
    flags = ["generate", *pair, *prompt, *SHORT, "--mode", "dense", "--kv-dtype"]
    assert outrider(*flags, "fp8", "--stats-json", path).code == 0
    conditions = json.loads(path.read_text())["conditions"]
    assert conditions["kv_dtype"] == "fp8"
    assert (conditions["graphs"], conditions["fused_target_layers"], conditions["fused_draft_layers"]) == (False, 0, 0)
    assert fails(*flags, "int8") == "kv-dtype: got 'int8'; allowed: auto, fp8"
