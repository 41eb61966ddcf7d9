"""outrider eval perplexity | facts"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.files import read_text
from outrider.cli.options import Flags, ModelOptions, takes
from outrider.cli.screen import Screen
from outrider.cli.tables import evaluation_table
from outrider.config import Budget, EngineConfig, option
from outrider.errors import OptionError

if TYPE_CHECKING:
    from outrider.eval.rows import Row

DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """What every task is given."""

    text: tuple[Path, ...] = field(metadata={"help": "file of UTF-8 text to evaluate on"})
    method: tuple[str, ...] = option(
        ("outrider",), "dense, outrider, sts, specattn; oracle, streaming, h2o, snapkv, quest, tidal or spatten"
    )
    context: int = option(16384, "tokens of each text that are read")
    json: Path | None = field(
        default=None, metadata={"help": "append one JSON line for every text, method and budget to this file"}
    )


EVALUATION = Flags(source=EvaluationOptions, panel="Evaluation")
BUDGET = Flags(source=Budget, panel="Budget", repeat=("keep", "top_p"))
MODELS = Flags(source=ModelOptions, panel="Models")
ENGINE = Flags(
    source=EngineConfig,
    panel="Models",
    only=("draft_tokens", "prefill_chunk", "kv_dtype", "score_keys", "backend"),
    short={"draft_tokens": "-K"},
)

app = typer.Typer(help="Measure what a method costs, teacher-forced through the same stages as generation.")


@app.command()
@takes(EVALUATION, BUDGET, MODELS, ENGINE)
def perplexity(
    scored_tokens: Annotated[int, typer.Option(help="last tokens of the context that are predicted")] = 1280,
    **values: Any,
) -> None:
    """How well the target predicts a text when it reads only its lists."""

    def task() -> Callable[..., Iterable[Row]]:
        from outrider.eval.perplexity import evaluate

        return evaluate

    _evaluate(task, values, scored_tokens=scored_tokens)


@app.command()
@takes(EVALUATION, BUDGET, MODELS, ENGINE)
def facts(
    facts: Annotated[int, typer.Option(help="facts planted in each text, and asked for")] = 20,
    seed: Annotated[int, typer.Option(help="seed of the facts and their places")] = 0,
    **values: Any,
) -> None:
    """How many facts planted in a text the target recalls."""

    def task() -> Callable[..., Iterable[Row]]:
        from outrider.eval.facts_task import evaluate

        return evaluate

    _evaluate(task, values, facts=facts, seed=seed)


def _evaluate(task: Callable[[], Callable[..., Iterable[Row]]], values: dict[str, Any], **own: Any) -> None:
    """Check, load, run the task."""
    options, models, engine = EVALUATION.pick(values), MODELS.pick(values), ENGINE.pick(values)
    EngineConfig(**engine)
    budgets = _budgets(BUDGET.pick(values))
    contents = [(file.stem, read_text("--text", file)) for file in options["text"]]
    screen = Screen()
    with screen.waiting("loading models"):
        from outrider.decoding.pair import find_alignment, load_pair
        from outrider.eval.rows import Case, Text, check_rows_path

        evaluate = task()
        if options["json"] is not None:
            check_rows_path(options["json"])
        texts = [Text(name=name, text=text) for name, text in contents]
        # every method with every budget; dense has none
        cases = [Case(method=m, budget=one) for m in options["method"] for one in (budgets if m != DENSE else [None])]
        own |= {"context": options["context"], "map_name": models.pop("map"), "progress": screen.progress}
        alignment = models.pop("alignment")
        pair = load_pair(**models, backend=engine.pop("backend"), kv_dtype=engine.pop("kv_dtype"))
        rows = evaluate(pair, find_alignment(alignment, *pair), texts, cases, **engine, **own)
    _report(rows, len(cases), options["json"], screen)


def _report(work: Iterable[Row], per_text: int, path: Path | None, screen: Screen) -> None:
    """Append rows as they come; print a table when a text is done, and the means in the end."""
    from outrider.eval.rows import append_rows, summarize

    rows: list[Row] = []
    shown = 0
    try:
        with screen.working():
            for row in work:
                rows.append(row)
                if path is not None:
                    append_rows(path, [row], command=shlex.join(["outrider", *sys.argv[1:]]))
                if len(rows) == shown + per_text:
                    screen.show(evaluation_table(row.text, rows[shown:]))
                    shown = len(rows)
    except KeyboardInterrupt:
        if rows[shown:]:
            screen.show(evaluation_table(f"{rows[-1].text}, interrupted", rows[shown:]))
        raise
    if len(rows) > per_text:
        means = summarize(rows)
        screen.show(evaluation_table(means[0].text, means))


def _budgets(given: dict[str, Any]) -> list[Budget]:
    """One budget for every `keep` or `top_p` given, the default one without any."""
    keeps, top_ps = given.pop("keep"), given.pop("top_p")
    if keeps and top_ps:
        raise OptionError("keep and top-p", (keeps, top_ps), "only one of the two")
    named = [{"keep": keep} for keep in keeps] + [{"top_p": top_p} for top_p in top_ps]
    return [Budget(**given, **one) for one in named or [{}]]
