"""The harness's tasks on the model "outrider": dense results are those of its own model "hf", sparse ones differ in figures."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.decoding.pair import PAIR_FOLDER
from outrider.errors import EngineError, OptionError, PromptError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from outrider.integrations.lm_eval import OutriderLM, main  # noqa: E402

ROOT = Path(__file__).parents[2]
NAMES = ["choice", "write", "predict"]
SHORT = {"min_context": 32, "recent": 8, "sinks": 2}  # sparse rounds begin early enough for the tasks here


@pytest.fixture(scope="module")
def dense() -> OutriderLM:
    return OutriderLM(mode="dense")


@pytest.fixture(scope="module")
def hf():
    """`hf(**arguments)`: the harness's own model, over the same target unless they name another."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    target = str(PAIR_FOLDER / "target")
    return lambda **arguments: HFLM(**({"pretrained": target, "dtype": "float32", "device": "cpu"} | arguments))


@pytest.fixture(scope="module")
def evaluate(tasks):
    """`evaluate(model, names=NAMES, **options)`: (metrics, responses) by task."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def run(model: Any, names: list[str] = NAMES, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        found = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
        responses = {name: [document["resps"] for document in found["samples"][name]] for name in names}
        return found["results"], responses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and others for versions, for seconds
        yield run


def assert_equal(ours: tuple[dict[str, Any], dict[str, Any]], theirs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Texts and choices to the letter, numbers to the rounding of fp32."""
    for name, metrics in theirs[0].items():
        for metric, value in metrics.items():
            assert ours[0][name][metric] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), metric
    for name, responses in theirs[1].items():
        assert numbers(ours[1][name]) == pytest.approx(numbers(responses), rel=1e-4)
        assert others(ours[1][name]) == others(responses)


def leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]


def numbers(responses: Any) -> list[float]:
    return [leaf for leaf in leaves(responses) if isinstance(leaf, float)]


def others(responses: Any) -> list[Any]:
    return [leaf for leaf in leaves(responses) if not isinstance(leaf, float)]


def only(name: str, results: tuple[dict[str, Any], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One task's part."""
    return {name: results[0][name]}, {name: results[1][name]}


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, own, index) for index, own in enumerate(arguments)]


def written(lm: TemplateLM, *contexts: str, **arguments: Any) -> list[str]:
    """What the model answers to each context."""
    wanted = {"until": [], "max_gen_toks": 12} | arguments
    return lm.generate_until(instances("generate_until", *((context, wanted) for context in contexts)), disable_tqdm=True)


@pytest.fixture(scope="module")
def documents(tasks):
    """`documents(name)`: those of a task."""
    return lambda name: [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def dense_results(evaluate, dense):
    return evaluate(dense)


def test_dense_results_are_those_of_hf(evaluate, dense_results, hf):
    assert_equal(dense_results, evaluate(hf()))
    assert all(len(numbers(dense_results[1][name])) == count for name, count in {"choice": 12, "predict": 2}.items())
    assert all(len(text) > 3 for text in others(dense_results[1]["write"]))


def test_prompts_and_texts_that_are_too_long_are_cut_like_those_of_hf(evaluate, hf, documents):
    lm = OutriderLM(mode="dense", max_length=96)
    with pytest.warns(UserWarning, match=r"\d of \d+ requests do not fit into 96 tokens") as warned:
        ours = evaluate(lm)
    assert_equal(ours, evaluate(hf(max_length=96)))
    told = [int(str(w.message).split()[0]) for w in warned if "do not fit" in str(w.message)]
    prompts = [(document["text"], 24) for document in documents("write")]  # a generation has room for 24 tokens
    texts = [(document["text"] + choice, -1) for document in documents("choice") for choice in document["choices"]]
    assert lm.cut == sum(told) == lm.get_model_info()["outrider"]["prompts_cut"]
    assert lm.cut == sum(len(lm.tokenizer(text)["input_ids"]) + room > 96 for text, room in prompts + texts) > 6


def test_keeping_everything_changes_nothing(evaluate, dense_results):
    lm = OutriderLM(mode="sparse", keep=1.0, **SHORT)
    assert_equal(evaluate(lm), dense_results)
    assert lm.get_model_info()["outrider"]["kept_fraction"] == 1


def test_sparse_results_differ_in_figures_alone(evaluate, dense_results):
    lm = OutriderLM(mode="sparse", keep=0.1, **SHORT)
    metrics, responses = evaluate(lm)
    for name in NAMES:
        assert metrics[name].keys() == dense_results[0][name].keys()
        assert len(leaves(responses[name])) == len(leaves(dense_results[1][name]))
    pairs = zip(numbers(responses["choice"]), numbers(dense_results[1]["choice"]), strict=True)
    assert [ours == pytest.approx(exact, rel=1e-4) for ours, exact in pairs] == [False] * 9 + [True] * 3  # short ones: dense
    assert metrics["predict"]["bits_per_byte,none"] > dense_results[0]["predict"]["bits_per_byte,none"]
    info = lm.get_model_info()["outrider"]
    assert (info["mode"], info["method"], info["prompts_cut"]) == ("sparse", "outrider", 0)
    assert 0.1 < info["kept_fraction"] < 0.2 and info["kv_read_fraction"] < 0.4


def test_plain_answers_like_dense(evaluate, dense_results):
    assert_equal(evaluate(OutriderLM(mode="plain"), ["write"]), only("write", dense_results))


def test_a_batch_answers_like_one_after_the_other(evaluate, dense_results):
    lm = get_model("outrider").create_from_arg_string("mode=dense,audit=True", {"batch_size": "2"})
    assert_equal(evaluate(lm, ["write"]), only("write", dense_results))
    assert lm.get_model_info()["outrider"]["agreement"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"pretrained": "x"},
            "model argument: got 'pretrained'; allowed: alignment, audit, backend, batch_size, device, draft",
        ),
        ({"max_batch_size": 8}, "model argument: got 'max_batch_size'; allowed: "),
        ({"mode": "exact"}, "mode: got 'exact'; allowed: plain, dense, sparse"),
        ({"keep": 2}, r"keep: got 2; allowed: a number in \(0, 1\]"),
        ({"batch_size": "auto"}, "batch-size: got 'auto'; allowed: a whole number >= 1"),
        ({"max_length": 1}, "max_length: got 1; allowed: a whole number >= 2"),
        ({"max_gen_toks": 0}, "max_gen_toks: got 0; allowed: a whole number >= 1"),
        ({"seed": -1}, "seed: got -1"),
        ({"enable_thinking": True}, "think_end_token: got None; allowed: with enable_thinking"),
        ({"target": "/nowhere"}, "draft: got None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_any_loading(arguments, says, monkeypatch):
    monkeypatch.setattr("outrider.decoding.pair.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(OptionError, match=says):
        get_model("outrider").create_from_arg_obj(arguments, {"device": None})


def test_arguments_reach_the_engine():
    text = "mode=sparse,method=sts,top_p=0.9,recent=7,draft_tokens=2,score_keys=4bit,map=joint+divergence,max_length=500"
    lm = get_model("outrider").create_from_arg_string(text, {"batch_size": 3, "device": "cpu", "max_batch_size": None})
    config = lm.engine.config
    assert (config.mode, config.method, config.batch_size, config.draft_tokens) == ("sparse", "sts", 3, 2)
    assert (config.budget.top_p, config.budget.keep, config.budget.recent, config.score_keys) == (0.9, None, 7, "4bit")
    assert (lm.engine.map_name, lm.max_length, lm.batch_size, lm.device.type) == ("joint+divergence", 500, 3, "cpu")


def test_max_length_ends_at_the_context_of_the_pair():
    with pytest.raises(OptionError, match=r"max_length: got 32769; allowed: 2 \.\. 32768, the context of the pair"):
        OutriderLM(mode="dense", max_length=32769)


def test_a_target_without_a_tokenizer_is_refused(dense, monkeypatch):
    monkeypatch.setattr("outrider.models.loading._load_tokenizer", lambda path: None)
    with pytest.raises(PromptError, match="target: 'target' has no tokenizer"):
        OutriderLM(mode="dense")


def test_generation_arguments(dense):
    with pytest.raises(OptionError, match="generation argument: got 'num_beams'; allowed: until, max_gen_toks, do_sample"):
        written(dense, "It was", num_beams=4)
    with pytest.raises(OptionError, match="max_gen_toks: got 32768; allowed: less than max_length, 32768"):
        written(dense, "It was", max_gen_toks=32768)
    [text] = written(dense, "It was a dark and stormy", max_gen_toks=20)
    assert written(dense, "It was a dark and stormy", max_gen_toks=20, until=text[9:12]) == [text[: text.index(text[9:12])]]
    assert written(dense, "It was a dark and stormy", max_new_tokens=3)[0] != text
    assert written(dense) == []


def test_sampling_depends_on_the_seed_and_the_context_alone(dense, monkeypatch):
    sampled = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    first, again, other = written(dense, "It was a", "It was a", "She had been", **sampled)
    assert first != again  # a task that asks several times wants several answers
    assert written(dense, "She had been", "It was a", **sampled) == [other, first]
    monkeypatch.setattr(dense, "options", type(dense.options)(seed=1))
    assert written(dense, "It was a", **sampled) != [first]


def test_an_empty_context_is_a_bos_token(dense, hf):
    requests = instances("loglikelihood", ("", "The"), ("", "<|endoftext|>The"))
    ours = dense.loglikelihood(requests, disable_tqdm=True)
    assert ours[0] == ours[1]
    assert numbers(ours) == pytest.approx(numbers(hf().loglikelihood(requests, disable_tqdm=True)), rel=1e-4)
    [text] = written(dense, "")
    assert text


def test_a_tokenizer_that_adds_a_bos_token(make_module, byte_tokenizer, hf, tmp_path):
    """It stands before every text, but not twice, and before the context alone."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    tokenizer = type(byte_tokenizer)(tokenizer_object=backend, eos_token="<end>", bos_token="<begin>")
    begin = "<begin>", tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[begin])
    folder = str(tmp_path / "model")
    make_module("llama", vocab_size=258, eos_token_id=256, bos_token_id=257).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="the same checkpoint"):
        ours = OutriderLM(target=folder, draft=folder, mode="dense")
    theirs = hf(pretrained=folder)
    for text in ("It was", "<begin>It was", "", " "):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.tok_encode("It")[0] == ours.prefix_token_id == theirs.prefix_token_id == 257
    pairs = [("It was", " a"), ("It was ", "a dark"), ("<begin>It was", " a"), ("", "It was"), ("", "<begin>It")]
    scored = instances("loglikelihood", *pairs)
    found, expected = (lm.loglikelihood(scored, disable_tqdm=True) for lm in (ours, theirs))
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-4)
    rolled = instances("loglikelihood_rolling", ("It was a dark and stormy night",))
    found, expected = (lm.loglikelihood_rolling(rolled, disable_tqdm=True) for lm in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-4)
    assert written(ours, "It was", "<begin>It was") == written(theirs, "It was", "<begin>It was")


def test_requests_that_cannot_be_scored(dense):
    with pytest.raises(PromptError, match="request 0: got 1 tokens and a continuation of 0; allowed: at least 1 each"):
        dense._loglikelihood_tokens([(None, [1], [])])


def test_chat_templates(evaluate, dense, dense_results, hf, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% if not loop.last or add_generation_prompt %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<me>{% endif %}"
    )
    theirs = hf()
    monkeypatch.setattr(dense.tokenizer, "chat_template", template)
    theirs.tokenizer.chat_template = template
    asked = [{"role": "user", "content": "Who?"}]
    assert dense.apply_chat_template(asked) == theirs.apply_chat_template(asked) == "<user>Who? <me>"
    begun = [*asked, {"role": "assistant", "content": "It is"}]
    ours = dense.apply_chat_template(begun, add_generation_prompt=False)
    assert ours == theirs.apply_chat_template(begun, add_generation_prompt=False) == "<user>Who? <assistant>It is"
    with pytest.warns(UserWarning, match="tried without system messages"):
        assert dense.apply_chat_template([{"role": "system", "content": "Be brief."}, *asked]) == "<user>Who? <me>"
    assert dense.tokenizer_name == theirs.tokenizer_name
    ours = evaluate(dense, ["write"], apply_chat_template=True)
    assert_equal(ours, evaluate(theirs, ["write"], apply_chat_template=True))
    assert ours[1] != only("write", dense_results)[1]


def test_thoughts_are_no_part_of_the_answer(dense, monkeypatch):
    [text] = written(dense, "It was a dark and stormy", max_gen_toks=20)
    monkeypatch.setattr(dense, "options", type(dense.options)(enable_thinking=True, think_end_token=text[9:12]))
    assert written(dense, "It was a dark and stormy", max_gen_toks=20) == [text.split(text[9:12])[-1].lstrip()]
    with pytest.raises(OptionError, match="enable_thinking: got True; allowed: for tasks that generate"):
        dense.loglikelihood(instances("loglikelihood", ("a", "b")))


def test_a_prompt_that_fails_ends_the_evaluation(monkeypatch):
    lm = OutriderLM(mode="dense")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(lm.engine._engine, "read", full)
    with pytest.raises(EngineError, match="request 0: no memory for its prompt: full"):
        written(lm, "It was a dark")


def test_the_cache_of_the_harness_is_filled(evaluate, dense_results, tmp_path, dense):
    for _ in range(2):
        done = len(dense.parts)
        assert_equal(evaluate(dense, use_cache=str(tmp_path / "cache")), dense_results)
    assert len(dense.parts) == done  # all answers were there
    dense.set_cache_hook(type(dense.cache_hook)(None))


def test_the_entry_point_is_the_model():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    module, name = points["outrider"].split(":")
    assert getattr(import_module(module), name) is get_model("outrider")


def test_the_command_line_finds_the_model(tasks, tmp_path, dense_results):
    """As `python -m` runs it, but without the harness's own tasks, whose thousands of files take many seconds to list."""
    code = (
        "import functools, runpy, lm_eval.tasks as t; t.TaskManager = functools.partial(t.TaskManager, include_defaults=False)"
    )
    code += "; runpy.run_module('outrider.integrations.lm_eval', run_name='__main__')"
    words = (
        "run --model outrider --model_args mode=dense,draft_tokens=3 --device cpu --batch_size 3 --tasks write --log_samples"
    )
    command = [sys.executable, "-c", code, *words.split(), "--include_path", str(tasks), "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [results], [samples] = tmp_path.rglob("results_*.json"), tmp_path.rglob("samples_*.jsonl")
    assert json.loads(results.read_text())["config"]["outrider"]["draft_tokens"] == 3
    assert [json.loads(line)["resps"] for line in samples.read_text().splitlines()] == dense_results[1]["write"]


def test_what_is_refused_ends_the_command_line_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: OutriderLM(mode="exact"))
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "outrider: error: mode: got 'exact'; allowed: plain, dense, sparse\n"
