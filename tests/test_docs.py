"""The documents say what is so: tables come from result lines, links lead somewhere, the README's code runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "src").glob("**/*.md"), *ROOT.glob("recipes/**/*.md")]
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import tables
    finally:
        sys.path.remove(str(ROOT))
    return tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(tables, page):
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run python -m benchmarks.tables"


def test_a_changed_figure_would_be_noticed(tables):
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figure = re.search(r"\| tokens and heads \| 10% \| [\d.]+% \| [\d.]+% \| ([\d.]+) \|", text)
    assert figure is not None
    assert tables.rewritten(text.replace(figure[1], "1.23")) == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (document.parent / link).exists(), link


def test_result_lines_say_how_they_were_made():
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert json.loads(line)["conditions"], path.name


def test_the_readme_code_runs(capsys, monkeypatch):
    """As printed, but for a shorter prompt and fewer tokens."""
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code.count("60_000") == code.count("max_new_tokens=64") == 1
    names: dict = {}
    exec(code.replace("60_000", "8_000").replace("max_new_tokens=64", "max_new_tokens=6"), names)
    kept, accepted = map(float, capsys.readouterr().out.split()[-2:])
    assert 0.1 <= kept < 0.11
    assert 0 <= accepted <= 4
    assert [result.finish_reason for result in names["results"]] == ["length", "length"]


def test_the_readme_commands_exist():
    from typer.testing import CliRunner

    from outrider.cli.main import app

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = re.findall(r"^outrider (.*?)(?<!\\)$", text, re.DOTALL | re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "))
        name = words[:2] if words[0] in ("eval", "bench") else words[:1]
        shown = re.sub(r"\x1b\[[\d;]*m", "", CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "300"}).output)
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", shown), f"{flag} in: outrider {command}"
