"""Trade-off curves: quality against the bytes of keys and values that are read, with confidence bands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outrider.eval.report.panels import Figure as Quality
from outrider.eval.report.panels import Panel
from outrider.eval.report.plot import Draw, Palette, Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 4.9, 3.5  # inches
LEGEND_ROW = 0.22  # inches more for each row of a legend
WIDE = 8.0  # a logarithmic axis where the most is so many times the least


def curves(panel: Panel, quality: Quality, styles: dict[str, Style], *, legend: bool) -> Draw:
    """Draw one figure of a panel: a line a method, its 95% interval as a band (a bar where there is one budget)."""

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        found = panel.curves(quality)
        for label, points in found.items():
            style = styles[label].of(palette)
            reads, values = [point.read for point in points], [point.value(quality) or 0.0 for point in points]
            axes.plot(reads, values, label=label, zorder=3, **style)
            bands = [(point.read, interval) for point in points if (interval := point.interval(quality)) is not None]
            at, low, high = [read for read, _ in bands], [low for _, (low, _) in bands], [high for _, (_, high) in bands]
            if len(bands) > 1:
                axes.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
            elif bands:
                axes.vlines(at, low, high, color=style["color"], linewidth=1.2)
        reads = [point.read for points in found.values() for point in points]
        if reads and max(reads) > WIDE * min(reads) > 0:
            _logarithmic(axes)
        if (dense := panel.dense(quality)) is not None:
            axes.axhline(dense, color=palette.muted, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
            edge = axes.get_yaxis_transform()  # x from the left edge, y as data
            axes.annotate("dense", (0, dense), xycoords=edge, xytext=(3, 3), textcoords="offset points", color=palette.muted)
        axes.set_xlabel("KV bytes read, % of dense")
        axes.grid(True)
        if legend:
            axes.set_title(f"{panel.title}\n{quality.title}", loc="left")
            figure.legend(loc="outside lower left", ncols=2, fontsize=9)
        else:
            axes.margins(x=0.06)

    return draw


def size(panel: Panel, quality: Quality) -> tuple[float, float]:
    """Of a picture with its legend, in inches."""
    return SIZE[0], SIZE[1] + 0.4 + LEGEND_ROW * -(-len(panel.curves(quality)) // 2)


def swatch(style: Style) -> Draw:
    """The mark of a curve, for a legend outside the picture."""

    def draw(figure: Figure, palette: Palette) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **style.of(palette))
        axes.set_xlim(0, 2)

    return draw


def _logarithmic(axes) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
