"""The command `outrider`. Importing it, and showing its help, loads neither torch nor transformers."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn, TextIO

import typer

from outrider import __version__
from outrider.cli import bench, evaluate
from outrider.cli.calibrate import calibrate
from outrider.cli.generate import generate
from outrider.cli.launch import LAUNCHED, LOST, is_rank
from outrider.cli.report import report
from outrider.errors import OutriderError, RankError

BAD_INPUT, INTERRUPTED = 2, 130

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
app.command()(generate)
app.command()(calibrate)
app.command()(report)
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def outrider(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """The draft model marks the tokens worth attending to; the target model reads only those."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 0, 2 for bad input, 130 when interrupted, by Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with it, what is half done is put away
    if LAUNCHED in os.environ and os.environ["RANK"] != "0":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the rank that leads
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Like `main`, but returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # generated text may hold what the terminal cannot show
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = typer.main.get_command(app).main(list(arguments), prog_name="outrider", standalone_mode=False)
            sys.stdout.flush()
            if is_rank() and not code:
                _leave()
        except RankError as error:
            return LOST if LAUNCHED in os.environ else _fail(str(error))  # who has started it knows which one was lost
        except OutriderError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: end without a word
            return 1
        except Exception as error:
            if not hasattr(error, "format_message"):  # typer's own complaints have it, whichever click typer brings
                raise
            return _fail(_usage(error))
    if code == INTERRUPTED:
        print("outrider: interrupted", file=sys.stderr)
    return code or 0


def _leave() -> None:
    """Part from the other ranks, who have come to the end, too."""
    from outrider.models.ranks import leave

    leave()


def _fail(message: str) -> int:
    print(f"outrider: error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    return BAD_INPUT


def _usage(error: Exception) -> str:
    """What is wrong with the command line, and where its help is."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "outrider"
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    refused = getattr(error.__cause__, "errors", None)  # where typer leaves the check to pydantic, it does not say what came
    came = f" (got {refused()[0]['input']!r})" if refused is not None else ""
    return f"{message}{came}; see {command} --help"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"outrider: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
