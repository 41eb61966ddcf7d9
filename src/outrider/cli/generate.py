"""outrider generate"""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.files import read_text, writable_file, write_file, write_json
from outrider.cli.launch import is_rank, launch, leads
from outrider.cli.options import Flags, ModelOptions, ParallelOptions, takes
from outrider.cli.screen import Screen
from outrider.cli.tables import run_table
from outrider.config import Budget, EngineConfig, SamplingParams, check, engine_config
from outrider.errors import PromptError

if TYPE_CHECKING:
    from outrider.decoding.outrider import Chunk, Outrider, Prompt, Result
    from outrider.decoding.statistics import Statistics
    from outrider.eval.trace import Recorder
    from outrider.integrations.prometheus import Metrics

MODELS = Flags(source=ModelOptions, panel="Models")
PARALLEL = Flags(source=ParallelOptions, panel="Models")
ENGINE = Flags(source=EngineConfig, panel="Engine", skip=("budget",), repeat=("mode",), short={"draft_tokens": "-K"})
BUDGET = Flags(source=Budget, panel="Budget")
PER_PROMPT = ("prefill", "prefill_keep")  # one for all prompts here: the engine's
SAMPLING = Flags(
    source=SamplingParams,
    panel="Sampling",
    skip=PER_PROMPT,
    rename={"top_k": "sampling_top_k", "top_p": "sampling_top_p"},
)


@takes(MODELS, PARALLEL, ENGINE, BUDGET, SAMPLING)
def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue (repeatable)")] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(help="file of UTF-8 text to continue (repeatable)")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="use only the first tokens of each prompt, this many")] = None,
    stats_json: Annotated[Path | None, typer.Option(help="write the figures of the run to this file")] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="write the figures as Prometheus metrics to this file; needs outrider[metrics]")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="write what every round of mode sparse drafted, accepted and kept to this file, for `outrider report`"
        ),
    ] = None,
    trace_rounds: Annotated[int, typer.Option(help="rounds of each prompt that a trace holds, from the first on")] = 64,
    **values: Any,
) -> None:
    """Continue prompts; several run as one batch. With several modes, each runs in turn on the same models.

    Text goes to stdout. Headings and the closing table go there too if it is a terminal, to stderr otherwise.
    """
    modes = ENGINE.pick(values)["mode"]
    options = ENGINE.pick(values) | BUDGET.pick(values)
    for mode in modes:
        engine_config(**(options | {"mode": mode}))
    params = SamplingParams(**SAMPLING.pick(values))
    check("prompt-tokens", prompt_tokens, prompt_tokens is None or prompt_tokens >= 1, "a whole number >= 1")
    texts = _prompts(prompt or [], prompt_file or [])
    parallel = PARALLEL.pick(values)
    ranks = parallel["tensor_parallel"]
    check("tensor-parallel", ranks, ranks >= 1, "a whole number >= 1")
    stats = writable_file("stats-json", stats_json) if stats_json else None
    measured = _metrics(metrics, values["target"]) if metrics else None
    if trace is not None:
        check("tensor-parallel", ranks, ranks == 1, "1 for a trace: a rank has its own lists")
        trace = _check_trace(trace, trace_rounds, modes, options["eager"] or values["device"] == "cpu")

    if ranks > 1 and not is_rank():
        raise typer.Exit(launch(ranks, values["device"]))
    if not leads(ranks):
        stats = metrics = measured = None

    screen = Screen()
    with screen.waiting("loading models"):
        engines = _load(modes, MODELS.pick(values) | parallel, options)
        tokens: list[Prompt] = [_tokens(engines[0], name, text, prompt_tokens) for name, text in texts.items()]
    runs, requests, interrupted, failures = [], [], False, 0
    for engine in engines:
        if len(engines) > 1:
            screen.heading(engine.config.mode)
        recorder = _recorder(trace_rounds) if trace and engine.config.mode == "sparse" else None
        run, results, interrupted = _run(engine, tokens, params, screen, recorder)
        if trace and recorder and not interrupted:
            files = [path.stem for path in prompt_file or []]
            names = [f"prompt {number}" for number, _ in enumerate(prompt or [], start=1)] + files
            _write_trace(trace, recorder, engine, names)
        failures += sum(result.error is not None for result in results)
        engine.release()  # the next mode's caches need the memory
        runs += [run] if run is not None else []
        requests.append([{"finish_reason": one.finish_reason} | one.statistics.as_dict() for one in results])
        if measured is not None:
            for result in results:
                measured.observe(result)
        if interrupted:
            break
    if stats and not interrupted:
        figures = [
            run.as_dict() | {"requests": own, "conditions": _conditions(engine)}
            for run, own, engine in zip(runs, requests, engines, strict=True)
        ]
        write_json("stats-json", stats, figures if len(figures) > 1 else figures[0])
    if metrics and measured and not interrupted:
        write_file("metrics", metrics, measured.text().encode())
    if runs:
        screen.note(run_table(runs))
    if interrupted or failures:
        raise typer.Exit(130 if interrupted else 1)


def _check_trace(path: Path, rounds: int, modes: tuple[str, ...], eager: bool) -> Path:
    """The file that a trace goes to, once it is certain that there will be one."""
    check("trace-rounds", rounds, rounds >= 1, "a whole number >= 1")
    check("mode (of a trace)", ", ".join(modes), modes.count("sparse") == 1, "sparse, once, among others or alone")
    check("trace", str(path), eager, "--eager on a GPU: CUDA graphs overwrite the lists of a round")
    return writable_file("trace", path)


def _recorder(rounds: int) -> Recorder:
    from outrider.eval.trace import Recorder

    return Recorder(rounds)


def _write_trace(path: Path, recorder: Recorder, engine: Outrider, names: list[str]) -> None:
    lines = recorder.lines(names, engine.target.tokenizer, engine.config, _conditions(engine))
    write_file("trace", path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    if recorder.full:
        warnings.warn(f"trace: {path} holds fewer rounds than asked for, as lists of long prompts need room", stacklevel=2)


def _prompts(texts: list[str], files: list[Path]) -> dict[str, str]:
    """All prompts by the names that errors give them."""
    if not texts and not files:
        raise PromptError("--prompt, --prompt-file: got neither; allowed: at least one of them")
    prompts = {f"--prompt {number}": text for number, text in enumerate(texts, start=1)}
    for name, text in prompts.items():
        if not text:
            raise PromptError(f"{name}: got an empty text; allowed: at least one token")
    return prompts | {
        f"--prompt-file {path} ({at})": read_text("--prompt-file", path) for at, path in enumerate(files, start=1)
    }


def _load(modes: tuple[str, ...], models: dict[str, Any], options: dict[str, Any]) -> list[Outrider]:
    """One engine a mode, all on the same models: what is wrong with a later mode shows before the first one runs."""
    from outrider.decoding.outrider import Outrider
    from outrider.decoding.pair import METHODS

    check("method", options["method"], options["method"] in METHODS, ", ".join(METHODS))
    first = Outrider.load(**models, **(options | {"mode": modes[0]}))
    return [first, *(first.with_options(mode=mode) for mode in modes[1:])]


def _tokens(engine: Outrider, name: str, text: str, limit: int | None) -> list[int]:
    """The tokens of a prompt, or the first `limit` of them."""
    tokens = engine.tokenize(text)
    if limit is not None and len(tokens) < limit:
        raise PromptError(f"--prompt-tokens: got {limit}, but {name} has {len(tokens)} tokens; allowed: at most that many")
    return tokens[:limit]


def _conditions(engine: Outrider) -> dict[str, str | int]:
    """What the figures depend on: models, versions, device, how rounds run, command."""
    from outrider.eval.rows import conditions

    made = conditions((engine.target, engine.draft), engine.config.draft_tokens, engine.map_name, engine.score_bits)
    return made | engine.execution | {"command": shlex.join(["outrider", *sys.argv[1:]])}


def _metrics(path: Path, model: str) -> Metrics:
    """What counts the requests, once it is certain that it can be written."""
    from outrider.integrations.prometheus import Metrics

    writable_file("metrics", path)
    return Metrics(model)


def _run(
    engine: Outrider, prompts: list[Prompt], params: SamplingParams, screen: Screen, recorder: Recorder | None
) -> tuple[Statistics | None, list[Result], bool]:
    """Generate in one mode. Returns the figures, of what there is when it was interrupted, the results, and if it was."""
    transcript = _Transcript(screen, len(prompts))
    chunks = engine.stream(prompts, params, progress=screen.progress, watch=recorder)
    interrupted = False
    with screen.working():
        try:
            for chunk in chunks:
                transcript.add(chunk)
                if not (transcript.streams and screen.interactive):
                    screen.progress("generate", transcript.tokens, len(prompts) * params.max_new_tokens)
        except KeyboardInterrupt:
            interrupted = True
    transcript.close()
    for index, result in transcript.finished.items():
        if result.error is not None:
            print(f"outrider: error: prompt {index + 1}: {result.error}", file=sys.stderr)
    return transcript.summary(), transcript.results, interrupted


class _Transcript:
    """Shows the text of one run, as it comes for a single prompt, prompt by prompt for several; keeps the figures."""

    def __init__(self, screen: Screen, prompts: int) -> None:
        self.streams = prompts == 1
        self.tokens = 0
        self.finished: dict[int, Result] = {}  # by prompt
        self._screen = screen
        self._waiting: dict[int, str] = {}  # text not shown yet, by prompt
        self._statistics: dict[int, Statistics] = {}

    def add(self, chunk: Chunk) -> None:
        self.tokens += len(chunk.token_ids)
        self._statistics[chunk.index] = chunk.statistics
        if chunk.result is not None:
            self.finished[chunk.index] = chunk.result
        if self.streams:
            self._screen.write(chunk.text)
            return
        self._waiting[chunk.index] = self._waiting.get(chunk.index, "") + chunk.text
        if chunk.result is not None:
            self._show(chunk.index, chunk.result.finish_reason)

    def close(self) -> None:
        """Show what prompts have that did not finish; a streamed text ends its line."""
        if self.streams and self._statistics:
            self._screen.write("\n")
        for index in sorted(self._waiting):
            self._show(index, "interrupted")

    @property
    def results(self) -> list[Result]:
        """Of the prompts that have finished, in their order."""
        return [result for _, result in sorted(self.finished.items())]

    def summary(self) -> Statistics | None:
        """The figures of all prompts; None when nothing was generated."""
        from outrider.decoding.statistics import total

        parts = list(self._statistics.values())
        return total(parts) if parts else None

    def _show(self, index: int, reason: str) -> None:
        text = self._waiting.pop(index)
        self._screen.heading(f"prompt {index + 1}: {self._statistics[index].generated_tokens} tokens, {reason}")
        self._screen.write(text + "\n")
