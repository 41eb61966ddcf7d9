"""Records with questions: every layout that is promised, and complaints that name file, line and field."""

from __future__ import annotations

import json
import re
import sys

import pytest

from outrider.errors import OptionError, PromptError
from outrider.eval.qa_data import Asked, Document, Fields, read_documents


@pytest.fixture
def write(tmp_path):
    """`write(record, ...)`: a file of these records, a line each; strings are written as they are."""

    def make(*records, name: str = "tales.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
        return path

    return make


def record(number: int, **changed) -> dict:
    return {"context": f"Tale {number}.", "question": "Who?", "answers": ["a king", "the king", "a king"]} | changed


def test_flat_records(write):
    path = write(record(1), "", record(2, answers="a queen"))
    assert read_documents(path, Fields()) == [
        Document(name="tales 1", context="Tale 1.", asked=(Asked(question="Who?", answers=("a king", "the king")),)),
        Document(name="tales 3", context="Tale 2.", asked=(Asked(question="Who?", answers=("a queen",)),)),
    ]


def test_records_with_the_same_context_are_one_document(write):
    path = write(record(1), record(2), record(1, question="Where?"))
    first, second = read_documents(path, Fields())
    assert [asked.question for asked in first.asked] == ["Who?", "Where?"] and first.name == "tales 1"
    assert len(second.asked) == 1


def test_only_the_first(write):
    path = write(*(record(1, question=f"Who {n}?") for n in range(5)), record(2), record(3))
    assert [len(document.asked) for document in read_documents(path, Fields(), documents=2, questions=3)] == [3, 1]


def test_layout_of_fairytaleqa(write):
    questions = [{"question": f"Who {n}?", "answers": ["a farmer", "a well-to-do farmer"], "sections": "1"} for n in range(2)]
    path = write({"story": "assipattle", "sections": ["In far bygone days.", "And his brothers."], "questions": questions})
    fields = Fields(context="sections", question="questions.question", answers="questions.answers")
    [document] = read_documents(path, fields)
    assert document.context == "In far bygone days.\n\nAnd his brothers."
    assert document.asked[1] == Asked(question="Who 1?", answers=("a farmer", "a well-to-do farmer"))


def test_layout_of_narrativeqa(write):
    one = {"document": {"summary": {"text": "A tale."}}, "question": {"text": "Who?"}}
    path = write(one | {"answers": [{"text": "A king"}, {"text": "the king"}]})
    fields = Fields(context="document.summary.text", question="question.text", answers="answers.text")
    [document] = read_documents(path, fields)
    assert (document.context, document.asked) == ("A tale.", (Asked(question="Who?", answers=("A king", "the king")),))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{not json", "line 2: not JSON (Expecting property name enclosed in double quotes, column 2); allowed: a JSON object"),
        ("[1, 2]", "line 2, field context: got [1, 2] where 'context' should be; allowed: an object"),
        (
            {"context": "A tale.", "answers": ["x"]},
            "line 2, field question: missing; allowed: one of 'context', 'answers'",
        ),
        ({}, "line 2, field context: missing; allowed: one of no fields at all"),
        (record(2, context=""), "line 2, field context: got ''; allowed: text"),
        (record(2, context=None), "line 2, field context: got None; allowed: text"),
        (record(2, context=[]), "line 2, field context: got an empty list; allowed: text"),
        (record(2, question=7), "line 2, field question: got 7; allowed: text"),
        (record(2, question=["Who?", "Where?"]), "line 2, field question: got 2 texts; allowed: one question"),
        (record(2, answers=[]), "line 2, field answers: got an empty list; allowed: text"),
        (record(2, answers=["x", {"text": "y" * 99}]), "line 2, field answers: got {'text': '" + "y" * 27 + "...; allowed:"),
    ],
)  # fmt: skip
def test_bad_records_are_named(write, bad, says):
    path = write(record(1), bad)
    with pytest.raises(PromptError) as raised:
        read_documents(path, Fields(), documents=1)
    assert str(raised.value).startswith(f"--data {path}, {says}")


def test_bad_items_of_a_list_are_named(write):
    fields = Fields(question="questions.question", answers="questions.answers")
    for questions, says in (
        ([{"question": "Who?"}], "field questions.answers: missing; allowed: one of 'question'"),
        ([], "field questions.question: got no question; allowed: at least one"),
        (["Who?"], "field questions.question: got 'Who?' where 'question' should be; allowed: an object"),
    ):
        with pytest.raises(PromptError, match=re.escape(says)):
            read_documents(write({"context": "A tale.", "questions": questions}), fields)


def test_bad_files(write, tmp_path):
    with pytest.raises(PromptError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_documents(tmp_path / "none.jsonl", Fields())
    with pytest.raises(PromptError, match="no records"):
        read_documents(write("\n\n"), Fields())
    with pytest.raises(OptionError, match=r"data: got .*tales\.csv.*; allowed: \.jsonl"):
        read_documents(write(record(1), name="tales.csv"), Fields())
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(record(1)).encode() + b'\n{"context": "caf\xe9"}')
    with pytest.raises(PromptError, match=r"latin\.jsonl, line 2: not UTF-8 \(byte 16\)"):
        read_documents(tmp_path / "latin.jsonl", Fields())


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(OptionError, match=r"allowed: a \.jsonl file, or \.parquet with pip install 'outrider\[parquet\]'"):
        read_documents(tmp_path / "tales.parquet", Fields())


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="reading parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "tales.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([record(1), record(2)]), path)
    documents = read_documents(path, Fields())
    assert [document.name for document in documents] == ["tales 1", "tales 2"]
    assert documents[0].asked[0].answers == ("a king", "the king")
    parquet.write_table(pyarrow.Table.from_pylist([record(1), record(2, question=None)]), path)
    with pytest.raises(PromptError, match=r"row 2, field question: got None"):
        read_documents(path, Fields())
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(PromptError, match=r"tales\.parquet: cannot be read"):
        read_documents(path, Fields())
