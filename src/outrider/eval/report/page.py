"""The page: figures, tables, token view and conditions in one HTML file that loads nothing, and its figures as PNG files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from outrider.eval.diagnose.rows import Diagnosis
from outrider.eval.report import curves, heads
from outrider.eval.report.curves import curves as draw
from outrider.eval.report.heads import Plot
from outrider.eval.report.panels import Figure as Quality
from outrider.eval.report.panels import Panel, Point, labels, panels
from outrider.eval.report.plot import Style, check_matplotlib, png, svg
from outrider.eval.report.read import Results, read_results
from outrider.eval.report.tokens import page_data
from outrider.eval.report.trace import Trace
from outrider.eval.rows import Row

PAGE = "index.html"
SWATCH = 0.62, 0.2  # inches


def make(paths: list[Path], version: str) -> dict[str, bytes]:
    """The files of a report on results files and sweep folders, by name; the page, `PAGE`, comes last.

    `version` is Outrider's. Raises ResultsError for what `read_results` refuses and for traces that no page can hold,
    OptionError where matplotlib is missing.
    """
    check_matplotlib()
    results = read_results(paths)
    drawn, maps = panels(results.rows), heads.plots(results.diagnostics)
    styles = {label: Style(number) for number, label in enumerate(labels(drawn))}
    data = page_data(results.traces) if results.traces else None
    pictures = [
        (_file(panel.name, quality.name), png(draw(panel, quality, styles, legend=True), curves.size(panel, quality)))
        for panel in drawn
        for quality in panel.figures
        if panel.curves(quality)
    ]
    pictures += [(_file(plot.name), png(plot.draw, plot.size)) for plot in maps]
    sections = {
        "Quality against bytes read": ("curves", _curves(drawn, styles)),
        "Tables": ("tables", "".join(map(_table, drawn))),
        "Heads and rounds": ("heads", _maps(maps)),
        "Tokens": ("tokens-view", _read("tokens.html") if data else ""),
        "Conditions": ("conditions", _conditions(results)),
    }
    shown = {title: made for title, made in sections.items() if made[1]}
    page = Template(_read("page.html")).substitute(
        title="Outrider report",
        models=escape(_models(results)),
        contents="".join(f'<a href="#{name}">{title}</a>' for title, (name, _) in shown.items()),
        sections="".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>\n' for title, (name, body) in shown.items()),
        data=f'<script type="application/json" id="traces">{data}</script>' if data else "",
        css=_read("page.css"),
        js=_read("page.js"),
        version=escape(version),
    )
    return dict(pictures) | {PAGE: page.encode()}


def _read(name: str) -> str:
    return files("outrider.eval.report").joinpath(name).read_text(encoding="utf-8")


def _file(*parts: str) -> str:
    """A file's name, whatever a method or a part of a task is called."""
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)) + ".png"


def _curves(drawn: list[Panel], styles: dict[str, Style]) -> str:
    if not styles:
        return ""
    marks = "".join(
        f"<li>{svg(curves.swatch(style), SWATCH, f'mark-{style.number}', f'mark of {label}')}{escape(label)}</li>"
        for label, style in styles.items()
    )
    figures = "".join(
        _figure(
            f"{panel.title}: {quality.title}",
            svg(
                draw(panel, quality, styles, legend=False),
                curves.SIZE,
                _anchor(panel.name, quality.name),
                quality.title,
            ),
            f"{_texts(panel)} {_file(panel.name, quality.name)}",
        )
        for panel in drawn
        for quality in panel.figures
        if panel.curves(quality)
    )
    return (
        "<p>Up and to the left is better, for a change of perplexity down and to the left. Bands are 95% bootstrap intervals "
        "over texts; a change of perplexity is paired with dense on each text. Bytes read count what a method reads to choose."
        f'</p><ul class="legend">{marks}</ul><div class="figures">{figures}</div>'
    )


def _maps(plots: list[Plot]) -> str:
    if not plots:
        return ""
    return f'<div class="maps">{"".join(map(_plot, plots))}</div>'


def _plot(plot: Plot) -> str:
    picture = svg(plot.draw, plot.size, _anchor(plot.name), plot.title)
    return _figure(plot.title, picture, f"{plot.note} {_file(plot.name)}", width=plot.size[0])


def _figure(title: str, picture: str, note: str, width: float | None = None) -> str:
    style = "" if width is None else f' style="width: {width * 6:.0f}rem"'
    return f"<figure{style}><h3>{escape(title)}</h3>{picture}<figcaption>{escape(note.strip())}</figcaption></figure>"


def _anchor(*parts: str) -> str:
    return re.sub(r"\W+", "-", "-".join(parts))


def _texts(panel: Panel) -> str:
    if not panel.texts:
        return "No text is common to all methods: each is the mean over its own texts, so compare with care."
    of = f"Mean over {len(panel.texts)} texts" if len(panel.texts) > 1 else "One text, so no intervals"
    out = f"; not every method was run on {', '.join(panel.left_out)}" if panel.left_out else ""
    return f"{of}: {', '.join(panel.texts)}{out}."


def _table(panel: Panel) -> str:
    """Figures with their intervals, a row a method and budget."""
    columns: list[tuple[str, Callable[[Point], str]]] = [
        ("budget", lambda p: heads.case(p.mean).removeprefix(p.mean.method).removeprefix(", ") or "all"),
        ("kept, %", lambda p: f"{100 * p.mean.kept_fraction:.1f}"),
        ("KV bytes read, %", lambda p: f"{p.read:.1f}"),
        *((quality.title, _cell(quality)) for quality in panel.figures),
    ]
    if any(point.mean.ppl is not None for point in panel.points):
        columns.append(("perplexity", lambda p: "" if p.mean.ppl is None else f"{p.mean.ppl:.3f}"))
    if not panel.texts:
        columns.append(("texts", lambda p: escape(p.mean.text)))
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title, _ in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(point.label)}</th>{"".join(f"<td>{cell(point)}</td>" for _, cell in columns)}</tr>'
        for point in panel.points
    )
    table = f'<table><thead><tr><th scope="col" class="name">method</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<h3>{escape(panel.title)}</h3><p class="note">{escape(_texts(panel))}</p>{_box(table, panel.title)}'


def _cell(quality: Quality) -> Callable[[Point], str]:
    def cell(point: Point) -> str:
        value, interval = point.value(quality), point.interval(quality)
        if value is None:
            return ""
        between = "" if interval is None else f" <small>[{interval[0]:{quality.form}}, {interval[1]:{quality.form}}]</small>"
        return f"{value:{quality.form}}{between}"

    return cell


def _box(content: str, label: str) -> str:
    """What is wider than a phone scrolls in here, by keyboard too."""
    return f'<div class="box" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def _all_conditions(results: Results) -> dict[str, list[str]]:
    """Every condition and its values, in order of first appearance."""
    found: dict[str, dict[str, None]] = {}
    lines: list[Row | Diagnosis | Trace] = [*results.rows, *results.diagnostics, *results.traces]
    for line in lines:
        for name, value in line.conditions.items():
            found.setdefault(name, {})[str(value)] = None
    return {name: list(values) for name, values in found.items()}


def _models(results: Results) -> str:
    found = _all_conditions(results)
    return ", ".join(f"{role} {found[role][0]}" for role in ("target", "draft") if role in found)


def _conditions(results: Results) -> str:
    found = _all_conditions(results)
    commands = found.pop("command", [])
    table = f'<table class="wrap"><tbody>{_pairs(found | {"files": results.files})}</tbody></table>'
    lines = "".join(f"<pre>{escape(one)}</pre>" for one in commands)
    return _box(table, "conditions") + (f"<h3>Commands</h3>{_box(lines, 'commands')}" if commands else "")


def _pairs(found: dict[str, list[str]]) -> str:
    def row(name: str, values: Iterable[str]) -> str:
        return f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape("; ".join(values))}</td></tr>'

    return "".join(row(name, values) for name, values in found.items())
