"""The flags that the commands of `outrider eval` share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from outrider.cli.options import Flags, ModelOptions
from outrider.config import PREFILL_METHODS, Budget, EngineConfig, option

DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """What every task is given."""

    text: tuple[Path, ...] = field(metadata={"help": "file of UTF-8 text to evaluate on"})
    method: tuple[str, ...] = option(
        ("outrider",),
        "dense, outrider, sts, specattn, dustin; oracle, streaming, h2o, snapkv, quest, tidal, spatten, double-sparsity, adore "
        "or twilight (which takes --top-p)",
    )
    context: int = option(16384, "tokens of each text that are read")
    json: Path | None = field(
        default=None, metadata={"help": "append one JSON line for every text, method and budget to this file"}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions(EvaluationOptions):
    """Where answers are generated, the dense ones stand beside them unless asked otherwise."""

    method: tuple[str, ...] = option((DENSE, "outrider"), "dense, outrider, sts, specattn or dustin")
    context: int = option(16384, "tokens of a prompt and its answer together")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions(EvaluationOptions):
    """Where prompts are read from lists."""

    method: tuple[str, ...] = option(PREFILL_METHODS[:1], f"how prompts are read: dense, {', '.join(PREFILL_METHODS)}")


EVALUATION = Flags(source=EvaluationOptions, panel="Evaluation")
READ = Flags(source=PromptOptions, panel="Evaluation")
ANSWERS = Flags(source=AnswerOptions, panel="Evaluation")
ANSWERS_TO_DATA = Flags(source=AnswerOptions, panel="Evaluation", skip=("text",))
BUDGET = Flags(source=Budget, panel="Budget", repeat=("keep", "top_p"))
MODELS = Flags(source=ModelOptions, panel="Models")
Channels = Annotated[
    Path | None,
    typer.Option(
        help="channels of the target for method double-sparsity (from `outrider calibrate --channels`); default: the built-in "
        "target's own",
        rich_help_panel="Models",
    ),
]
Controller = Annotated[
    Path | None,
    typer.Option(
        help="trained controller of the target for method adore (from recipes/adore); default: the built-in target's own",
        rich_help_panel="Models",
    ),
]
ENGINE = Flags(
    source=EngineConfig,
    panel="Models",
    only=("draft_tokens", "prefill_chunk", "kv_dtype", "score_keys", "backend"),
    short={"draft_tokens": "-K"},
)

PROMPTS = Flags(
    source=EngineConfig,
    panel="Models",
    only=(
        "prefill_chunk",
        "prefill_block",
        "prefill_draft_keep",
        "prefill_draft_least",
        "prefill_min_context",
        "kv_dtype",
        "backend",
    ),
)
