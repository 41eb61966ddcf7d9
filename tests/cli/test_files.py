"""Texts come in whole and valid, results go out whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.cli.files import read_text, writable_file, write_json
from outrider.errors import OptionError, PromptError


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"abc\x00def", "a NUL byte at offset 3"),
        (b"caf\xe9 noir", "not UTF-8 (byte 0xe9 at offset 3)"),
        (b"cut \xe2\x82", "not UTF-8 (byte 0xe2 at offset 4)"),
    ],
)
def test_unfit_texts_are_named(tmp_path, content, complaint):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    with pytest.raises(PromptError) as error:
        read_text("--prompt-file", path)
    assert str(error.value).startswith(f"--prompt-file {path}: ") and complaint in str(error.value)
    assert "allowed: a file of UTF-8 text" in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    for path, reason in ((tmp_path / "none.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(PromptError, match=reason):
            read_text("--text", path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "closed.txt"
    path.write_text("secret")
    path.chmod(0)
    with pytest.raises(PromptError, match="Permission denied"):
        read_text("--text", path)


@given(st.text(st.characters(exclude_characters="\0\r", codec="utf-8"), min_size=1).filter(lambda text: text[0] != "\ufeff"))
def test_texts_come_back_as_they_were(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    assert read_text("--text", path) == text


def test_line_ends_and_byte_order_marks_do_not_reach_the_model(tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text("--text", path) == "one\ntwo\nthree\n"


def test_json_is_there_whole_or_not_at_all(tmp_path):
    path = writable_file("stats-json", tmp_path / "stats.json")
    assert list(tmp_path.iterdir()) == []
    write_json("stats-json", path, {"rounds": 3})
    assert json.loads(path.read_text()) == {"rounds": 3}
    for broken in ({"rounds": float("nan")}, {"rounds": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json("stats-json", path, broken)
    assert list(tmp_path.iterdir()) == [path] and json.loads(path.read_text()) == {"rounds": 3}


def test_links_are_followed(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json("stats-json", writable_file("stats-json", tmp_path / "link.json"), [])
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "[]\n"


def test_places_that_cannot_be_written_are_named(tmp_path):
    """A device must not be replaced by a file of that name."""
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "none" / "a.json", tmp_path / "file" / "a.json", "/dev/null"):
        with pytest.raises(OptionError, match=r"out: got .*allowed: a file in a folder that can be written"):
            writable_file("out", tmp_path / path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
