"""Flags are the fields of the dataclasses: every field has one, no flag has another default."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import typer

from outrider.cli import calibrate, evaluate, generate
from outrider.cli.main import app
from outrider.cli.options import ModelOptions, ParallelOptions
from outrider.config import Budget, EngineConfig, SamplingParams, option
from outrider.decoding.calibrate import DEFAULT_MAPS
from outrider.decoding.calibrate import calibrate as fit
from outrider.decoding.outrider import Outrider
from outrider.decoding.pair import BUILTIN
from outrider.eval import facts_task, perplexity
from outrider.eval.teacher_forced import DENSE


def flags(*path: str) -> dict[str, object]:
    """The flags of a command and their defaults."""
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {flag: parameter.default for parameter in command.params for flag in parameter.opts}


def test_every_field_is_a_flag_of_generate():
    renamed = {(SamplingParams, "top_k"): "--sampling-top-k", (SamplingParams, "top_p"): "--sampling-top-p"}
    files = {"--prompt", "--prompt-file", "--prompt-tokens", "--stats-json", "--metrics", "--trace", "--trace-rounds"}
    own = files | {"-K", "--help", "-h"}
    found = flags("generate")
    wanted = set()
    for source in (ModelOptions, ParallelOptions, EngineConfig, Budget, SamplingParams):
        for f in fields(source):
            if f.name == "budget" or (source is SamplingParams and f.name in generate.PER_PROMPT):
                continue
            flag = renamed.get((source, f.name), f"--{f.name.replace('_', '-')}")
            wanted.add(flag)
            default = {"--mode": [f.default]}.get(flag, f.default)
            assert found[flag] == (default if default != () else None), flag
            assert f.metadata["help"]
    assert set(found) - own == wanted


def test_short_form_of_draft_tokens():
    assert flags("generate")["-K"] == flags("generate")["--draft-tokens"]


def test_model_flags_are_the_parameters_of_load():
    parameters = inspect.signature(Outrider.load).parameters
    for f in fields(ModelOptions):
        assert parameters[f.name].default == f.default
    assert ModelOptions().target == BUILTIN


def test_calibration_flags_are_the_parameters_of_calibrate():
    defaults = {name: p.default for name, p in inspect.signature(fit).parameters.items()}
    for f in fields(calibrate.CalibrationOptions):
        wanted = ",".join(DEFAULT_MAPS) if f.name == "maps" else defaults[f.name]
        assert f.default == wanted, f.name


@pytest.mark.parametrize("task", [perplexity, facts_task])
def test_evaluation_flags_are_known_to_the_tasks(task):
    name = {perplexity: "perplexity", facts_task: "facts"}[task]
    found = flags("eval", name)
    for parameter in inspect.signature(task.evaluate).parameters.values():
        flag = f"--{parameter.name.replace('_', '-')}"
        if parameter.name in ("pair", "alignments", "texts", "cases", "map_name", "progress"):
            continue
        assert flag in found
        if parameter.default is not inspect.Parameter.empty:
            assert found[flag] == parameter.default
    assert evaluate.DENSE == DENSE


def test_repeated_flags_arrive_as_tuples():
    picked = generate.ENGINE.pick({f.name: f.default for f in fields(EngineConfig)} | {"mode": ["dense", "sparse"]})
    assert picked["mode"] == ("dense", "sparse") and "budget" not in picked
    values = {f.name: None for f in fields(Budget)}
    assert evaluate.BUDGET.pick(values | {"keep": [0.1, 0.2]})["keep"] == (0.1, 0.2)
    assert evaluate.BUDGET.pick(values)["top_p"] == ()


def test_fields_have_help_without_markup_surprises(outrider):
    text = outrider("generate", "--help").out
    assert "(0, 1]" in text and option(1, "x").metadata["help"] == "x"
