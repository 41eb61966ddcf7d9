"""outrider report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from outrider import __version__
from outrider.cli.files import writable_folder, write_file
from outrider.cli.screen import Screen
from outrider.errors import OptionError


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="files of JSON lines that `outrider eval` or `generate --trace` wrote, or folders of `outrider eval sweep`"
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder for the page, index.html, and its figures as PNG files")],
) -> None:
    """Write results as one HTML page that loads nothing: trade-off curves, tables, maps of heads, the tokens that were kept."""
    folder = writable_folder("output", output)
    screen = Screen()
    with screen.waiting("drawing"):
        from outrider.eval.report.page import PAGE, make

        made = make(results, __version__)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OptionError("output", str(folder), f"a folder that can be made ({error.strerror})") from error
    for name, content in made.items():
        write_file("output", folder / name, content)
    screen.show(Text(f"wrote {output / PAGE} and {len(made) - 1} figures beside it"))
