"""The page as a file: whole, escaped, loading nothing, with the numbers of the rows and colours that can be read."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import outrider.eval.report
from outrider.errors import OptionError, ResultsError
from outrider.eval.report import tokens
from outrider.eval.report.page import PAGE, make
from outrider.eval.report.read import read_results
from outrider.eval.rows import summarize

VOID = {"meta", "br", "img", "input", "link", "hr"}
FOLDER = Path(outrider.eval.report.__file__).parent


class Page(HTMLParser):
    """Elements, ids, links and text; asserts that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.links, self.rows, self.open = [], [], [], [], []
        self.data: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action", "data")]
        self.rows += [[]] if tag == "tr" else []
        assert not [name for name in given if name.startswith("on")]
        if tag not in VOID:
            self.open.append((tag, given.get("id", "")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1].append(data.strip())
        if self.open:
            key = self.open[-1][1] or self.open[-1][0]
            self.data[key] = self.data.get(key, "") + data


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page((report / PAGE).read_text(encoding="utf-8"))


def test_the_page_has_its_sections_and_unique_ids(page):
    assert {"curves", "tables", "heads", "tokens-view", "conditions", "traces", "round", "layer", "head"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 2 + 2 + 1 + 1  # curves, their marks, a map, the strip


def test_links_stay_inside_the_page(page):
    assert page.links and not [link for link in page.links if not (link.startswith(("#", "data:image/png;base64,")))]
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_nothing_is_loaded_and_nothing_escapes(report, page):
    """A method and a text are called `</script><script>...`; neither becomes an element, nor a file's name."""
    text = (report / PAGE).read_text(encoding="utf-8")
    assert page.tags.count("script") == 2 and page.tags.count("img") == 0
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert sorted(path.name for path in report.glob("*.png")) == [
        "heads-1-outrider.png",
        "perplexity-64-agreement.png",
        "perplexity-64-delta_percent.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in report.glob("*.png"))


def test_the_trace_is_on_the_page(page, trace):
    [view] = json.loads(page.data["traces"])
    assert (view["name"], view["pieces"], view["prompt"], view["all"]) == (trace["text"], trace["pieces"], 400, 9)
    assert [one["lists"] for one in view["rounds"]] == [one["lists"] for one in trace["rounds"]]


def test_tables_have_the_figures_of_summarize(report, page):
    means = summarize(read_results([report / "lines.jsonl"]).rows)
    found = {(cells[0], cells[1]): cells for cells in page.rows if cells[1:] and cells[1].startswith("keep")}
    assert len(found) == len(means) == 4
    for mean in means:
        cells = found[mean.method.strip(), f"keep {100 * mean.keep:g}%"]
        low, high = mean.intervals["delta_percent"]
        near, far = mean.intervals["agreement"]
        assert cells[2:] == [
            f"{100 * mean.kept_fraction:.1f}",
            f"{100 * mean.kv_read_fraction:.1f}",
            f"{mean.delta_percent:+.2f}",
            f"[{low:+.2f}, {high:+.2f}]",
            f"{100 * mean.agreement:.1f}",
            f"[{100 * near:.1f}, {100 * far:.1f}]",
            f"{mean.ppl:.3f}",
        ]


def test_conditions_and_commands_are_named(page, report):
    assert "outrider eval" in page.data["pre"] and ["device", "CPU"] in page.rows and ["draft tokens", "3"] in page.rows
    assert any(str(report / "lines.jsonl") in cells for cells in page.rows)


def test_figures_follow_the_colours_of_the_page(report):
    """No stand-in colour is left, and curves are drawn in variables that the page's styles define for both modes."""
    text = (report / PAGE).read_text(encoding="utf-8")
    assert "#fe0" not in text
    css = (FOLDER / "page.css").read_text()
    for name in set(re.findall(r"var\((--[\w-]+)\)", text)):
        assert f"{name}:" in css, name


def test_only_what_there_is_gets_a_section(row, write, trace):
    pages = [Page(make([write([line])], "0.0")[PAGE].decode()) for line in (row(), trace)]
    sections = [
        [name for name in page.ids if name in ("curves", "tables", "heads", "tokens-view", "conditions")] for page in pages
    ]
    assert sections == [["curves", "tables", "conditions"], ["tokens-view", "conditions"]]


def test_without_matplotlib_the_extra_is_named(row, write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"pip install 'outrider\[report\]'"):
        make([write([row()])], "0.0")


def test_traces_that_no_page_can_hold_are_refused(write, trace, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_BYTES", 1 << 10)
    with pytest.raises(ResultsError, match=r"traces of .*: got 0.0 MB; allowed: 0 MB in a page, by fewer of them"):
        make([write([trace])], "0.0")


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2.2."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes() -> dict[str, dict[str, str]]:
    css = (FOLDER / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"(--[\w-]+): ([^;]+);", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )
    return {"light": light, "dark": light | dark}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read(theme):
    """Contrast of 4.5 : 1 for text, on paper, on raised parts and on the darkest shade; 3 : 1 for lines (curves have edges)."""
    colours = themes()[theme]

    def rgb(name: str) -> tuple[float, ...]:
        return tuple(int(colours[name][i : i + 2], 16) for i in (1, 3, 5))

    most, keep = float(colours["--most"]), [float(x) for x in colours["--keep"].split()]
    darkest = tuple(most * k + (1 - most) * p for k, p in zip(keep, rgb("--paper"), strict=True))
    for text, ground in [
        ("--ink", "--paper"),
        ("--ink", "--raised"),
        ("--muted", "--paper"),
        ("--muted", "--raised"),
        ("--link", "--paper"),
    ]:
        assert contrast(rgb(text), rgb(ground)) >= 4.5, (text, ground)
    assert contrast(rgb("--ink"), darkest) >= 4.5
    for mark in ("--accepted", "--rejected", "--recovered", "--bonus"):
        assert contrast(rgb(mark), rgb("--paper")) >= 3, mark
    assert contrast(darkest, rgb("--paper")) >= 1.5  # shades differ in lightness, not in hue alone
