"""Drawing with matplotlib, once for two media: PNG on white, and SVG for the page, whose colours are the page's own.

An SVG is drawn in stand-in colours that then become CSS variables, so that it follows the reader's light or dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from outrider.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito, without black (the ink) and yellow (too light for lines); page.css has the same and a lighter blue for dark mode
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)))  # as many as are told apart
DPI = 160


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of one medium."""

    ink: str
    muted: str
    paper: str
    series: tuple[str, ...]


ON_WHITE = Palette("#1a1a1e", "#5c5c66", "#ffffff", COLOURS)
STAND_IN = Palette("#fe0001", "#fe0002", "#fe0003", tuple(f"#fe01{i:02x}" for i in range(len(COLOURS))))
VARIABLES = {"#fe0001": "--ink", "#fe0002": "--muted", "#fe0003": "--paper"} | {
    name: f"--series-{i}" for i, name in enumerate(STAND_IN.series)
}


@dataclass(frozen=True, slots=True)
class Style:
    """How one curve looks: three marks, any of which tells it from its neighbours."""

    number: int

    def of(self, palette: Palette) -> dict[str, Any]:
        """Arguments of matplotlib's `plot`."""
        return {
            "color": palette.series[self.number % len(COLOURS)],
            "marker": MARKERS[self.number % len(MARKERS)],
            "linestyle": DASHES[self.number % len(DASHES)],
            "markeredgecolor": palette.ink,
            "markeredgewidth": 0.7,
            "markersize": 6,
            "linewidth": 1.8,
        }


Draw = Callable[["Figure", Palette], None]


def check_matplotlib() -> None:
    """Raise OptionError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OptionError("report", "no matplotlib", "pip install 'outrider[report]', which brings it") from error


def png(draw: Draw, size: tuple[float, float]) -> bytes:
    """A picture on white, `size` in inches."""
    return _saved(draw, ON_WHITE, size, "png", {"Software": None})


def svg(draw: Draw, size: tuple[float, float], name: str, title: str) -> str:
    """An element for a page; ids begin with `name`, and `title` is what a screen reader says."""
    text = _saved(draw, STAND_IN, size, "svg", {"Date": None}).decode()
    text = text[text.index("<svg ") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r' xmlns(:xlink)?="[^"]*"'):
        text = re.sub(unwanted, "", text, flags=re.DOTALL)
    text = re.sub(
        r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda found: f'<svg {found[1]} role="img" aria-label="{escape(title)}">', text
    )
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r'xlink:href="', 'href="', text)
    for reference in (r'\bid="', r'href="#', r"url\(#"):
        text = re.sub(reference, lambda found: f"{found[0]}{name}-", text)
    return re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", re.sub(r"\s*\n\s*", " ", text))


def _saved(draw: Draw, palette: Palette, size: tuple[float, float], form: str, metadata: dict[str, Any]) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "outrider",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.edgecolor": palette.muted,
        "axes.labelcolor": palette.ink,
        "axes.titlecolor": palette.ink,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "text.color": palette.ink,
        "grid.color": palette.muted,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "text.parse_math": False,  # labels are what files say
    }
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, palette)
        target = io.BytesIO()
        # paper is the page's own in an SVG
        clear = {"transparent": True} if form == "svg" else {"facecolor": palette.paper}
        figure.savefig(target, format=form, dpi=DPI if form == "png" else 72, metadata=metadata, **clear)
    return target.getvalue()
