"""Channel files: what is saved is what is loaded, and every wrong file is refused with its name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from outrider.errors import AlignmentError
from outrider.guidance.channels import ChannelFile, load, ranked, save
from outrider.guidance.files import ModelIdentity

TARGET = ModelIdentity("big", "sha256:1")


def make_file() -> ChannelFile:
    ranking = torch.rand(4, 2, 8).argsort(-1)
    ranking[1] = -1  # a sliding window
    return ChannelFile(TARGET, "a book", "sha256:2", 512, ranking)


@pytest.fixture
def path(tmp_path):
    save(make_file(), tmp_path / "channels.json")
    return tmp_path / "channels.json"


def test_round_trip(tmp_path):
    file = make_file()
    save(file, tmp_path / "c.json")
    again = load(tmp_path / "c.json", target=TARGET)
    assert torch.equal(again.ranking, file.ranking)
    assert (again.target, again.text, again.text_digest, again.tokens) == (TARGET, "a book", "sha256:2", 512)


def test_the_heaviest_channel_comes_first_and_the_lower_of_equal_ones():
    assert ranked(torch.tensor([[0.5, 2.0, 0.5, 0.0], [1.0, 1.0, 3.0, 1.0]])).tolist() == [[1, 0, 2, 3], [2, 0, 1, 3]]


def test_another_target(path):
    other = replace(TARGET, digest="sha256:3")
    with pytest.raises(AlignmentError, match=r"channel file .*channels.json: made for the target big .*sha256:1.*sha256:3"):
        load(path, target=other)
    assert load(path, target=None).target == TARGET


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", "outrider-alignment", "format: got 'outrider-alignment'; allowed: 'outrider-channels'"),
        ("version", 2, "version: got 2; allowed: 1"),
        ("tokens", "many", "tokens: got 'many'; allowed: a int"),
        ("target", {"name": "big"}, "target.digest: missing"),
        ("ranking", [[0, 1], [1]], "ranking: malformed"),
        ("ranking", [[[0.0, 1.0]]], "ranking: malformed"),
        ("ranking", [], "ranking: malformed"),
        ("ranking", [[[0, 0]]], "some head lacks a channel"),
        ("ranking", [[[0, 2]]], "some head lacks a channel"),
        ("ranking", [[[0, 1], [-1, -1]]], "some head lacks a channel"),
    ],
)
def test_malformed_files(path, field, value, message):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {field: value}))
    with pytest.raises(AlignmentError) as caught:
        load(path, target=None)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(AlignmentError, match=r"channel file .*none\.json: cannot be read"):
        load(tmp_path / "none.json", target=None)
