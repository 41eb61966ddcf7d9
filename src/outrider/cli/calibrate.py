"""outrider calibrate"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from outrider.cli.files import read_text, writable_file
from outrider.cli.options import Flags, ModelOptions, takes
from outrider.cli.screen import Screen
from outrider.cli.tables import quality_table
from outrider.config import EngineConfig, option
from outrider.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What is fitted, and on how much: the parameters of `decoding.calibrate.calibrate`."""

    maps: str = option("joint+divergence,proportional+jaccard,monotone+average", "maps to fit: layer_map+head_map, by commas")
    tokens: int = option(4096, "tokens of the text that are read")
    rounds: int = option(96, "rounds scored, spread over the text; half are held out")
    queries_per_round: int = option(5, "query rows of a round; one more than the tokens drafted")
    keep: float = option(0.05, "share of the tokens that recall is measured at")
    budget_rounds: int = option(
        32,
        "at most so many of the rounds tell what each list of method outrider is worth to the target's predictions, for "
        "budgets by layer and head; 0: equal budgets",
    )


MODELS = Flags(source=ModelOptions, panel="Models", only=("target", "draft", "dtype", "device"))
ENGINE = Flags(source=EngineConfig, panel="Models", only=("prefill_chunk", "backend"))
CALIBRATION = Flags(source=CalibrationOptions, panel="Calibration")


@takes(CALIBRATION, MODELS, ENGINE)
def calibrate(
    text: Annotated[Path, typer.Option(help="file of UTF-8 text to calibrate on")],
    out: Annotated[Path, typer.Option(help="alignment file to write; it is there whole or not at all")],
    channels: Annotated[
        Path | None,
        typer.Option(help="file for the ranking of the target's key channels, if wanted (for eval's method double-sparsity)"),
    ] = None,
    **values: Any,
) -> None:
    """Learn which draft heads show what each target head reads, and write it to an alignment file."""
    options, engine = CALIBRATION.pick(values), ENGINE.pick(values)
    EngineConfig(**engine)
    content = read_text("--text", text)
    path = writable_file("out", out)
    ranking_path = None if channels is None else writable_file("channels", channels)
    if ranking_path == path:
        raise OptionError("channels", str(channels), "another file than --out")
    screen = Screen()
    with screen.waiting("loading models"):
        from outrider.decoding.calibrate import calibrate as fit
        from outrider.decoding.channels import rank_channels
        from outrider.decoding.pair import load_pair
        from outrider.guidance import alignment
        from outrider.guidance import channels as channel_files

        pair = load_pair(**MODELS.pick(values), backend=engine["backend"])
    options["maps"] = tuple(name.strip() for name in options["maps"].split(","))
    with screen.working():
        file = fit(
            *pair, content, text_name=text.stem, prefill_chunk=engine["prefill_chunk"], progress=screen.progress, **options
        )
        if ranking_path is not None:
            ranking = rank_channels(pair[0], content, text_name=text.stem, tokens=options["tokens"], progress=screen.progress)
    alignment.save(file, path)
    if ranking_path is not None:
        channel_files.save(ranking, ranking_path)
    screen.show(quality_table(file))
    screen.show(Text(f"wrote {out}" if channels is None else f"wrote {out} and {channels}"))
