"""Diagnostics as pictures: heat maps over layers and heads, acceptance by position, disagreement against what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outrider.eval.diagnose.rows import Acceptance, Diagnosis, Disagreement, Heads, Overlap
from outrider.eval.report.plot import Draw, Palette, Style
from outrider.eval.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WRITTEN = 96  # cells that have room for their figure
DRAWN = 2048  # cells that are drawn one by one; more become one picture
HEAD_INCHES, LAYER_INCHES = 0.36, 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A picture with its place and caption."""

    name: str  # for files and anchors
    title: str
    note: str
    draw: Draw
    size: tuple[float, float]  # inches


def plots(found: list[Diagnosis]) -> list[Plot]:
    """All diagnostics: a map of every method and budget, the mean over texts; one plot of a kind for the rest."""
    maps: dict[tuple[Any, ...], list[Diagnosis]] = {}
    for one in found:
        if isinstance(one, (Heads, Overlap)):
            what = one.between if isinstance(one, Overlap) else ""
            shape = len(one.layers), len(_matrix(one)[0])
            maps.setdefault((one.task, what, one.method, one.keep, one.top_p, one.context, shape), []).append(one)
    made = [_map(number, group) for number, group in enumerate(maps.values(), start=1)]
    if accepted := [one for one in found if isinstance(one, Acceptance)]:
        made.append(_acceptance(accepted))
    if disagreed := [one for one in found if isinstance(one, Disagreement)]:
        made.append(_disagreement(disagreed))
    return made


def case(one: Diagnosis | Row) -> str:
    """ "outrider, keep 10%" """
    if one.keep is not None:
        return f"{one.method}, keep {100 * one.keep:g}%"
    return one.method if one.top_p is None else f"{one.method}, top-p {one.top_p:g}"


def _matrix(one: Diagnosis) -> list[list[float]]:
    assert isinstance(one, (Heads, Overlap))
    return one.recall if isinstance(one, Heads) else one.overlap


def _map(number: int, group: list[Diagnosis]) -> Plot:
    first, matrices = group[0], [_matrix(one) for one in group]
    assert isinstance(first, (Heads, Overlap))
    mean = [[sum(cells) / len(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
    heads = "query head" if isinstance(first, Heads) else "list"
    what = f"overlap of lists, {first.between}" if isinstance(first, Overlap) else "share of attention mass in the list"
    cells = [(value, layer, head) for layer, row in zip(first.layers, mean, strict=True) for head, value in enumerate(row)]
    lowest, layer, head = min(cells)
    texts = sorted({one.text for one in group if one.text})
    of = f"Mean of {len(group)} texts ({', '.join(texts)}). " if len(group) > 1 else f"{texts[0]}. " if texts else ""
    context = f", {first.context:,} tokens" if first.context else ""
    average = sum(value for value, *_ in cells) / len(cells)
    return Plot(
        name=f"{first.task}-{number}-{first.method}",
        title=f"{case(first)}{context}: {what}",
        note=f"{of}Mean {average:.3f}; lowest {lowest:.3f}, layer {layer}, {heads} {head}.",
        draw=_heat(first.layers, mean, heads),
        size=(1.9 + HEAD_INCHES * max(len(mean[0]), 5), 0.8 + LAYER_INCHES * max(len(mean), 4)),
    )


def _heat(layers: list[int], values: list[list[float]], heads: str) -> Draw:
    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        rows, columns = len(values), len(values[0])
        mesh = axes.pcolormesh(values, cmap="cividis", vmin=0, vmax=1, rasterized=rows * columns > DRAWN)
        if rows * columns <= WRITTEN:
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    colour = "#ffffff" if value < 0.55 else "#101014"  # cividis is dark below its middle
                    text = "1" if value >= 0.995 else f"{value:.2f}".removeprefix("0")
                    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_yticks([y + 0.5 for y in _few(rows)], [str(layers[y]) for y in _few(rows)])
        axes.set_xticks([x + 0.5 for x in _few(columns)], [str(x) for x in _few(columns)])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(heads)
        axes.set_ylabel("target layer")
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05)
        bar.outline.set_visible(False)

    return draw


def _few(count: int) -> range:
    """Ticks that do not touch."""
    return range(0, count, -(-count // 16))


def _acceptance(found: list[Acceptance]) -> Plot:
    def draw(axes: Any, palette: Palette) -> None:
        for number, (label, group) in enumerate(_by_case(found).items()):
            longest = max(len(one.by_position) for one in group)
            columns = [[one.by_position[at] for one in group if at < len(one.by_position)] for at in range(longest)]
            shares = [100 * sum(column) / len(column) for column in columns]
            axes.plot(range(1, longest + 1), shares, label=label, **Style(number).of(palette))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("position of the drafted token")
        axes.set_ylabel("accepted, % of rounds")

    return _lines("acceptance", "Accepted tokens by position", found, draw)


def _disagreement(found: list[Disagreement]) -> Plot:
    def draw(axes: Any, palette: Palette) -> None:
        methods: dict[str, list[tuple[float, float]]] = {}
        for label, group in _by_case(found).items():
            shares = [(one.kept_fraction, one.disagreement) for one in group]
            kept, disagreed = (100 * sum(column) / len(group) for column in zip(*shares, strict=True))
            methods.setdefault(label.replace(case(group[0]), group[0].method), []).append((kept, disagreed))
        for number, (label, points) in enumerate(methods.items()):
            axes.plot(*zip(*sorted(points), strict=True), label=label, **Style(number).of(palette))
        axes.set_xlabel("kept, % of cached tokens")
        axes.set_ylabel("tokens chosen otherwise, %")

    return _lines("disagreement", "Disagreement with the dense target", found, draw)


def _by_case(found: list[Any]) -> dict[str, list[Any]]:
    """The texts of every method and budget, and of every context where there are several."""
    several = len({one.context for one in found}) > 1
    groups: dict[str, list[Any]] = {}
    for one in found:
        groups.setdefault(case(one) + (f", {one.context} tokens" if several else ""), []).append(one)
    return groups


def _lines(name: str, title: str, found: list[Any], fill: Callable[[Any, Palette], None]) -> Plot:
    curves = len(_by_case(found))

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        fill(axes, palette)
        axes.grid(True)
        figure.legend(loc="outside lower left", ncols=2, fontsize=9)

    texts = len({one.text for one in found if one.text})
    note = f"Means over {texts} texts." if texts > 1 else ""
    return Plot(name=name, title=title, note=note, draw=draw, size=(4.9, 3.3 + 0.22 * -(-curves // 2)))
