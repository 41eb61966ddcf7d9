"""outrider eval perplexity | facts | prefill | ruler | qa | diagnose; sweep is in sweep.py"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.evaluation_flags import (
    ANSWERS,
    ANSWERS_TO_DATA,
    BUDGET,
    DENSE,
    ENGINE,
    EVALUATION,
    MODELS,
    PROMPTS,
    READ,
    Channels,
    Controller,
)
from outrider.cli.files import read_text
from outrider.cli.options import Flags, takes
from outrider.cli.reports import report, report_diagnosis
from outrider.cli.screen import Screen
from outrider.cli.sweep import sweep
from outrider.config import Budget, EngineConfig, check
from outrider.errors import OptionError

if TYPE_CHECKING:
    from outrider.eval.rows import Text

BUILTIN = "builtin"  # the target that comes with Outrider
Task = Callable[..., "Iterable[Any]"]  # rows, of a pair, alignments, cases and options


app = typer.Typer(
    help="Measure what a method costs on given tokens (perplexity, facts), in answers (ruler, qa), in all (sweep)."
)


app.command()(sweep)


@app.command()
@takes(EVALUATION, BUDGET, MODELS, ENGINE)
def perplexity(
    scored_tokens: Annotated[int, typer.Option(help="last tokens of the context that are predicted")] = 1280,
    batch_size: Annotated[int, typer.Option(help="texts that are read together, which a GPU does in little more time")] = 1,
    channels: Channels = None,
    controller: Controller = None,
    **values: Any,
) -> None:
    """How well the target predicts a text when it reads only its lists."""
    contents = _contents(values["text"])

    def task() -> Task:
        from outrider.eval.perplexity import evaluate

        return partial(evaluate, texts=_texts(contents), scored_tokens=scored_tokens, batch_size=batch_size)

    _evaluate(task, values, channels=channels, controller=controller)


@app.command()
@takes(EVALUATION, BUDGET, MODELS, ENGINE)
def facts(
    facts: Annotated[int, typer.Option(help="facts planted in each text, and asked for")] = 20,
    seed: Annotated[int, typer.Option(help="seed of the facts and their places")] = 0,
    channels: Channels = None,
    controller: Controller = None,
    **values: Any,
) -> None:
    """How many facts planted in a text the target recalls."""
    contents = _contents(values["text"])

    def task() -> Task:
        from outrider.eval.facts_task import evaluate

        return partial(evaluate, texts=_texts(contents), facts=facts, seed=seed)

    _evaluate(task, values, channels=channels, controller=controller)


@app.command()
@takes(ANSWERS, BUDGET, MODELS, ENGINE)
def ruler(
    family: Annotated[
        list[str] | None,
        typer.Option(
            help="single, multi-key, multi-value, multi-query, variable-tracking, common-words or frequent-words "
            "(repeatable; default: all)"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="samples of each family from each text, their needles at evenly spread depths")
    ] = 5,
    style: Annotated[
        str | None,
        typer.Option(
            help="how needles are stated and asked for: ruler (in RULER's words) or facts (as the built-in pair knows them); "
            "default: facts for target builtin, else ruler"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of all that is drawn")] = 0,
    **values: Any,
) -> None:
    """RULER's synthetic families (arXiv 2404.06654) in a given text: what generated answers hold of what was asked for."""
    from outrider.eval.ruler.families import FAMILIES, check_ruler

    families = tuple(dict.fromkeys(family or FAMILIES))
    style = style or ("facts" if values["target"] == BUILTIN else "ruler")
    check_ruler(families, style, samples)
    contents = _contents(values["text"])

    def task() -> Task:
        from outrider.eval.ruler_task import evaluate

        return partial(evaluate, texts=_texts(contents), families=families, samples=samples, style=style, seed=seed)

    _evaluate(task, values, each=False)


@app.command()
@takes(ANSWERS_TO_DATA, BUDGET, MODELS, ENGINE)
def qa(
    data: Annotated[Path, typer.Option(help="documents with questions: .jsonl, or .parquet where pyarrow is installed")],
    context_field: Annotated[str, typer.Option(help="field with a record's text, or a list of its parts")] = "context",
    question_field: Annotated[
        str, typer.Option(help="field with the question; dots lead deeper, as in questions.question, a list of questions")
    ] = "question",
    answers_field: Annotated[str, typer.Option(help="field with the answer, or a list of answers")] = "answers",
    documents: Annotated[int | None, typer.Option(help="ask about the first documents only, this many")] = None,
    questions: Annotated[int | None, typer.Option(help="ask the first questions of each document only, this many")] = None,
    plant_in: Annotated[
        Path | None, typer.Option(help="book to plant each document in, at a drawn depth; it fills the context")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="leave out the middle of a document that does not fit; default: refuse it")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="end an answer, at the latest, after this many tokens")] = 32,
    seed: Annotated[int, typer.Option(help="seed of the places in the book")] = 0,
    **values: Any,
) -> None:
    """Questions about local documents: token F1 and ROUGE-L of generated answers, each against the best reference."""
    from outrider.eval.qa_data import Fields, read_documents

    for name, value in (("documents", documents), ("questions", questions), ("max-new-tokens", max_new_tokens)):
        check(name, value, value is None or value >= 1, "a whole number >= 1")
    fields = Fields(context=context_field, question=question_field, answers=answers_field)
    found = read_documents(data, fields, documents, questions)
    books = _contents([] if plant_in is None else [plant_in], "--plant-in")

    def task() -> Task:
        from outrider.eval.qa_task import evaluate

        book = next(iter(_texts(books)), None)
        return partial(evaluate, documents=found, plant_in=book, truncate=truncate, max_new_tokens=max_new_tokens, seed=seed)

    _evaluate(task, values, each=False)


@app.command()
@takes(EVALUATION, BUDGET, MODELS, ENGINE)
def diagnose(
    scored_tokens: Annotated[
        int, typer.Option(help="last tokens of the context that are predicted; as many are generated for acceptance")
    ] = 640,
    **values: Any,
) -> None:
    """Where a method loses: attention recalled by layer and head, overlap of lists, drafts accepted by position."""
    contents = _contents(values["text"])

    def task() -> Task:
        from outrider.eval.diagnose.task import evaluate

        return partial(evaluate, texts=_texts(contents), scored_tokens=scored_tokens)

    rows, _, screen = _start(task, values)
    report_diagnosis(rows, values["json"], screen)


@app.command()
@takes(READ, BUDGET, MODELS, PROMPTS)
def prefill(
    scored_tokens: Annotated[int, typer.Option(help="last tokens of the prompt that are predicted while it is read")] = 4096,
    continued: Annotated[int, typer.Option(help="tokens of the context behind the prompt, predicted densely")] = 512,
    facts: Annotated[int, typer.Option(help="facts planted in each text, and asked for at the prompt's end")] = 10,
    seed: Annotated[int, typer.Option(help="seed of the facts and their places")] = 0,
    **values: Any,
) -> None:
    """What a target loses that has read its prompt from lists: in the prompt, behind it, and of facts."""
    contents = _contents(values["text"])

    def task() -> Task:
        from outrider.eval.prefill_task import evaluate

        options: dict[str, Any] = {"continued": continued, "facts": facts, "seed": seed}
        return partial(evaluate, texts=_texts(contents), scored_tokens=scored_tokens, **options)

    _evaluate(task, values, engine=PROMPTS, each=False)


def _contents(files: Sequence[Path], option: str = "--text") -> list[tuple[str, str]]:
    """Name and text of every file."""
    return [(file.stem, read_text(option, file)) for file in files]


def _texts(contents: list[tuple[str, str]]) -> list[Text]:
    from outrider.eval.rows import Text

    return [Text(name=name, text=text) for name, text in contents]


def _evaluate(
    task: Callable[[], Task], values: dict[str, Any], *, engine: Flags = ENGINE, each: bool = True, **learned: Path | None
) -> None:
    """Check, load, run the task. With `each`, every text gets a table of its own before the means, and the task is one on given
    tokens, which takes what was `learned` about the target, too: its channels and controller."""
    rows, cases, screen = _start(task, values, engine, on_given_tokens=each, **learned)
    report(rows, cases if each else None, values["json"], screen)


def _start(
    task: Callable[[], Task],
    values: dict[str, Any],
    flags: Flags = ENGINE,
    *,
    on_given_tokens: bool = False,
    channels: Path | None = None,
    controller: Path | None = None,
) -> tuple[Iterable[Any], int, Screen]:
    """Check and load, up to the work: rows as they come, the number of cases, and the screen that shows how far it is."""
    # flags that all tasks have
    options, models, engine = ANSWERS_TO_DATA.pick(values), MODELS.pick(values), flags.pick(values)
    EngineConfig(**engine)
    budgets = _budgets(BUDGET.pick(values))
    screen = Screen()
    with screen.waiting("loading models"):
        from outrider.decoding.pair import find_alignment, find_channels, find_controller, load_pair
        from outrider.eval.rows import Case, check_rows_path

        evaluate = task()
        if options["json"] is not None:
            check_rows_path(options["json"])
        # every method with every budget; dense has none
        cases = [Case(method=m, budget=one) for m in options["method"] for one in (budgets if m != DENSE else [None])]
        given = {"cases": cases, "context": options["context"], "map_name": models.pop("map"), "progress": screen.progress}
        alignment = models.pop("alignment")
        pair = load_pair(**models, backend=engine.pop("backend"), kv_dtype=engine.pop("kv_dtype"))
        if on_given_tokens:
            given["channels"] = find_channels(channels, pair[0])
            given["controller"] = find_controller(controller, pair[0])
        return evaluate(pair, find_alignment(alignment, *pair), **given, **engine), len(cases), screen


def _budgets(given: dict[str, Any]) -> list[Budget]:
    """One budget for every `keep` or `top_p` given, the default one without any."""
    keeps, top_ps = given.pop("keep"), given.pop("top_p")
    if keeps and top_ps:
        raise OptionError("keep and top-p", (keeps, top_ps), "only one of the two")
    named = [{"keep": keep} for keep in keeps] + [{"top_p": top_p} for top_p in top_ps]
    return [Budget(**given, **one) for one in named or [{}]]
