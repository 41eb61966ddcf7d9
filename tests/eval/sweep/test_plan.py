"""Plans: what a YAML file means, and every way in which it can be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.config import Budget
from outrider.errors import SweepError
from outrider.eval.rows import Case, Row, Text
from outrider.eval.sweep.document import merge_patch
from outrider.eval.sweep.plan import METHODS, Cell, case_key
from outrider.eval.sweep.tasks import TASKS, Perplexity, Subject


def keys(cases) -> list:
    return [case_key(case) for case in cases]


def test_a_plan_becomes_cells(plan_of):
    plan = plan_of()
    cells = plan.cells
    perplexity = [("perplexity", None, text, context) for context in (64, 128) for text in ("one", "two")]
    ruler = [("ruler", family, text, 64) for text in ("one", "two") for family in ("single", "multi-key")]
    assert [(c.task.name, c.subject.part, c.subject.name, c.context) for c in cells] == perplexity + ruler
    assert cells[0].task == Perplexity(scored_tokens=8) and cells[0].subject.content.text == "The text of one."
    full = [(method, keep, None) for method in ("outrider", "sts") for keep in (0.1, 0.05)]
    assert keys(cells[0].cases) == [("dense", None, None), *full]
    assert keys(cells[-1].cases) == [("dense", None, None), *full[:2]]
    assert cells[-1].task.style == "facts"  # as `outrider eval ruler` has it for the built-in target


def test_methods_may_have_budgets_and_maps_of_their_own(plan_of):
    plan = plan_of(
        ("methods: [dense, outrider, sts]", "methods: [{name: sts, keeps: [0.2]}, {name: specattn, top-p: [0.9], map: a+b}]"),
        ("keeps: [0.1, 0.05]", "keeps: [0.1]\nbudget: {sinks: 2, min-context: 8}"),
        ("methods: [dense, outrider], contexts: [64]", "methods: [outrider], keeps: [0.3], top-p: [0.8]"),
    )
    common = {"sinks": 2, "min_context": 8}
    assert plan.cells[0].cases == (
        Case(method="sts", budget=Budget(keep=0.2, **common)),
        Case(method="specattn", budget=Budget(keep=0.1, **common), map="a+b"),
        Case(method="specattn", budget=Budget(top_p=0.9, **common), map="a+b"),
    )
    assert keys(plan.cells[-1].cases) == [("outrider", 0.3, None), ("outrider", None, 0.8)]
    assert plan.options["tasks"]["perplexity"]["maps"] == {"sts": "the method's own", "specattn": "a+b"}


def test_models_and_files_are_found_beside_the_plan(plan_of, folder):
    (folder / "target").mkdir()
    (folder / "map.json").write_text("{}")
    models = "models: {target: target, draft: some/draft, alignment: map.json, draft-tokens: 2}\ntexts"
    plan = plan_of(("\ntexts", f"\n{models}"))
    assert (plan.models.target, plan.models.draft) == (str(folder / "target"), "some/draft")
    assert (plan.models.alignment, plan.models.draft_tokens) == (folder / "map.json", 2)
    assert plan.cells[-1].task.style == "ruler"


def test_questions_are_cells(plan_of, folder):
    (folder / "data.jsonl").write_text(
        '{"context": "A.", "question": "Q?", "answers": "B"}\n' * 2 + '{"context": "C.", "question": "Q?", "answers": "D"}\n'
    )
    plan = plan_of(yaml="tasks: {qa: {data: data.jsonl, plant-in: texts/one.txt}}\ncontexts: [64]\nmethods: [dense]")
    assert [(c.subject.name, len(c.subject.content[0].asked)) for c in plan.cells] == [("data 1", 2), ("data 3", 1)]
    assert plan.cells[0].subject.content[1] == Text(name="one", text="The text of one.")


def test_environment(plan_of, folder, monkeypatch):
    monkeypatch.setenv("SOME_BOOKS", "texts")
    assert len(plan_of(("texts/*.txt", "'${SOME_BOOKS}/o*.txt'")).works[0].subjects) == 1
    monkeypatch.delenv("SOME_BOOKS")
    with pytest.raises(
        SweepError, match=r"plan.yaml: texts\[0\]: got '\$\{SOME_BOOKS\}/o\*.txt', but .* no variable SOME_BOOKS"
    ):
        plan_of(("texts/*.txt", "'${SOME_BOOKS}/o*.txt'"))


def test_quick_is_put_over_the_rest(plan_of):
    tasks = "{ruler: null, perplexity: {scored-tokens: 4}, facts: {}}"
    quick = f"\nquick:\n  texts: [texts/two.txt]\n  contexts: [32]\n  tasks: {tasks}\n"
    plan = plan_of(("texts: [texts/*.txt]", "texts: ['${NO_SUCH_VARIABLE}']"), ("\ntexts", quick + "texts"), quick=True)
    assert [(c.task.name, c.subject.name, c.context) for c in plan.cells] == [("perplexity", "two", 32), ("facts", "two", 32)]
    assert plan.cells[0].task.scored_tokens == 4
    assert len(plan_of(("\ntexts", quick + "texts")).cells) == 8


@pytest.mark.parametrize(
    ("value", "patch", "wanted"),  # RFC 7396, appendix A
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch(value, patch, wanted):
    assert merge_patch(value, patch) == wanted


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "keeps:",
            "kepps:",
            "the document: unknown key 'kepps'; allowed: models, texts, contexts, methods, keeps, top-p, budget",
        ),
        ("[texts/*.txt]", "[]", "texts: got []; allowed: a list of files, at least one"),
        ("[texts/*.txt]", "texts/one.txt", "texts: got 'texts/one.txt'; allowed: a list of"),
        ("[texts/*.txt]", "[3]", "texts[0]: got 3; allowed: the name of a file"),
        ("texts/*.txt", "texts/*.md", "texts[0]: no file matches "),
        ("texts/*.txt", "none.txt", "No such file"),
        ("[texts/*.txt]", "[texts/one.txt, more/one.txt]", "texts[1]: two texts named 'one': "),
        ("[64, 128]", "[64, x]", "contexts[1]: got 'x'; allowed: a whole number"),
        ("[64, 128]", "[64, true]", "contexts[1]: got True; allowed: a whole number"),
        ("[64, 128]", "[1]", "contexts[0]: context: got 1; allowed: a whole number >= 2"),
        ("contexts: [64, 128]\n", "", "contexts is missing; allowed: contexts here or at tasks.perplexity"),
        ("dense, outrider, sts]", "dens]", f"methods[0]: got 'dens'; allowed: {', '.join(METHODS)}"),
        ("[dense, outrider]", "[dense, magic]", "tasks.ruler.methods[1]: got 'magic'; allowed: dense, outrider, sts, specattn"),
        ("dense, outrider, sts]", "sts, sts]", "methods[1]: 'sts' stands twice; allowed: "),
        (
            "dense, outrider, sts]",
            "{name: dense, keeps: [1]}]",
            "methods[0]: got {'name': 'dense', 'keeps': [1]}; allowed: dense",
        ),
        ("dense, outrider, sts]", "{keeps: [1]}]", "methods[0]: name is missing; allowed: dense"),
        ("dense, outrider, sts]", "{name: sts, kept: 1}]", "methods[0]: unknown key 'kept'; allowed: name, keeps, top-p, map"),
        ("dense, outrider, sts]", "{name: quest, map: a+b}]", "methods[0].map: got 'a+b'; allowed: no map"),
        (
            "dense, outrider, sts]",
            "{name: quest, top-p: [0.9]}]",
            "methods[0].top-p: got [0.9]; allowed: keeps with method quest",
        ),
        ("dense, outrider, sts]", "twilight]", "methods[0]: 'twilight' has no budget; allowed: top-p, here"),
        ("dense, outrider, sts]", "{name: twilight, keeps: [0.1]}]", "methods[0].keeps: got [0.1]; allowed: top-p with method"),
        ("keeps: [0.1, 0.05]", "keeps: [0.1, 2]", "keeps[1]: keep: got 2.0; allowed: a number in (0, 1]"),
        ("keeps: [0.1, 0.05]", "keeps: ['0.1']", "keeps[0]: got '0.1'; allowed: a number"),
        ("keeps: [0.1, 0.05]\n", "", "methods[1]: 'outrider' has no budget; allowed: keeps or top-p"),
        ("keeps:", "budget: {keep: 1}\nkeeps:", "budget: unknown key 'keep'; allowed: sinks, recent, min-context"),
        ("keeps:", "budget: {sinks: -1}\nkeeps:", "budget: sinks: got -1; allowed: a whole number >= 0"),
        ("keeps:", "models: {dtype: int8}\nkeeps:", "models: dtype: got 'int8'; allowed: float32"),
        ("keeps:", "models: {draft-tokens: 0}\nkeeps:", "models: K (draft-tokens): got 0; allowed: "),
        ("keeps:", "models: {drafts: a}\nkeeps:", "models: unknown key 'drafts'; allowed: target, draft, alignment, dtype"),
        ("keeps:", "models: {alignment: no.json}\nkeeps:", "models: alignment: no file "),
        ("perplexity:", "perplexities:", "tasks: unknown key 'perplexities'; allowed: perplexity, facts, ruler, qa"),
        (
            "scored-tokens: 8",
            "scored_tokens: 8",
            "tasks.perplexity: unknown key 'scored_tokens'; allowed: scored-tokens, methods",
        ),
        ("scored-tokens: 8", "scored-tokens: 0", "tasks.perplexity: scored-tokens: got 0; allowed: a whole number >= 1"),
        ("scored-tokens: 8", "scored-tokens: 8.0", "tasks.perplexity.scored-tokens: got 8.0; allowed: a whole number"),
        ("[single, multi-key]", "[triple]", "tasks.ruler: family: got 'triple'; allowed: single"),
        ("perplexity: {scored-tokens: 8}", "qa: {}", "tasks.qa: data is missing; allowed: the name of a file"),
        ("perplexity: {scored-tokens: 8}", "qa: {data: no.jsonl}", "tasks.qa: --data "),
        (
            "texts: [texts/*.txt]\n",
            "texts: [texts/*.txt]\ntexts: [a]\n",
            "line 3, column 1: key 'texts' stands twice; allowed: YAML",
        ),
        ("[64, 128]", "[64, 128", "line 4, column 8: "),
    ],
)
def test_what_is_wrong_is_named(plan_of, folder, old, new, message):
    (folder / "more").mkdir()
    (folder / "more" / "one.txt").write_text("x")
    with pytest.raises(SweepError) as caught:
        plan_of((old, new))
    assert str(caught.value).startswith(str(folder / "plan.yaml")) and message in str(caught.value)


def test_files_that_are_no_plans(plan_of, folder):
    for yaml, message in (
        ("3", "the document: got 3; allowed: a mapping"),
        ("{}", "tasks is missing"),
        ("tasks: {}", "tasks: got {}"),
    ):
        with pytest.raises(SweepError, match=message):
            plan_of(yaml=yaml)
    with pytest.raises(SweepError, match="quick: got None; allowed: a mapping of what --quick changes"):
        plan_of(quick=True)
    (folder / "texts" / "one.txt").unlink()
    (folder / "texts" / "one.txt").mkdir()
    with pytest.raises(SweepError, match="Is a directory"):
        plan_of()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("8", "9"),
        ("64", "65"),
        ("0.05", "0.04"),
        ("sts", "specattn"),
        ("samples: 2", "samples: 3"),
        ("keeps", "budget: {sinks: 5}\nkeeps"),
    ],
)
def test_the_digest_is_that_of_the_whole_plan(plan_of, folder, old, new):
    digest = plan_of().digest
    assert plan_of().digest == digest != plan_of((old, new)).digest
    (folder / "texts" / "one.txt").write_text("Another text.")
    assert plan_of().digest != digest


@given(
    st.lists(
        st.tuples(st.text(max_size=12) | st.just("x" * 200), st.sampled_from([None, "a", "b"]), st.integers(1, 3)),
        unique=True,
        min_size=2,
        max_size=6,
    )
)
def test_every_cell_has_a_file_name_of_its_own(parts):
    stems = [
        Cell(task=Perplexity(), subject=Subject(name=name, digest="", content=None, part=part), context=context, cases=()).stem
        for name, part, context in parts
    ]
    assert len(set(stems)) == len(stems)
    assert all(set(stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.") for stem in stems)
    assert all(len(stem) < 100 and not stem.startswith(".") for stem in stems)


def test_rows_and_cases_find_each_other():
    row = Row(task="facts", text="a", method="sts", keep=0.05, top_p=None, context=8, scored_tokens=1)
    assert case_key(row) == case_key(Case(method="sts", budget=Budget(keep=0.05), map="a+b"))


def test_a_task_of_every_command_is_there():
    assert list(TASKS) == ["perplexity", "facts", "ruler", "qa"]
