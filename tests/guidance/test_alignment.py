"""Alignment files: what is saved is what is loaded, and every wrong file is refused with its name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from outrider.errors import AlignmentError
from outrider.guidance import alignment as module
from outrider.guidance.alignment import AlignmentFile, AlignmentMap, ModelIdentity, load, save
from outrider.types import Alignment, ListCosts, UnlistedFit

TARGET, DRAFT = ModelIdentity("big", "sha256:1"), ModelIdentity("little", "sha256:2")


def make_file(fitted: bool = True) -> AlignmentFile:
    joint = torch.randint(0, 3, (4, 2, 4, 2))
    joint[1] = -1
    fit = UnlistedFit(values=torch.randn(4, 2, 3), weights=torch.rand(4, 8))
    maps = [
        AlignmentMap(
            "joint", "recall", Alignment(sources=joint, unlisted={"sts": fit} if fitted else {}), {"recall": 0.8123456789}
        ),
        AlignmentMap(
            "proportional",
            "jaccard",
            Alignment(
                sources=torch.zeros(4, 8, 1, 2, dtype=torch.int64),
                unlisted={"outrider": replace(fit, weights=torch.rand(4, 8))} if fitted else {},
            ),
            {},
        ),
    ]
    return AlignmentFile(TARGET, DRAFT, "a book", "sha256:3", 4096, 32, 5, 0.1, {entry.name: entry for entry in maps})


@pytest.fixture
def path(tmp_path):
    save(make_file(), tmp_path / "alignment.json")
    return tmp_path / "alignment.json"


def test_round_trip(tmp_path):
    file = make_file()
    save(file, tmp_path / "a.json")
    again = load(tmp_path / "a.json", target=TARGET, draft=DRAFT)
    assert replace(again, maps={}) == replace(file, maps={})
    assert again.maps.keys() == file.maps.keys()
    for name, entry in file.maps.items():
        assert torch.equal(again.map(name).alignment.sources, entry.alignment.sources)
        fits, kept = again.map(name).alignment.unlisted, entry.alignment.unlisted
        assert fits.keys() == kept.keys() and len(fits) == 1
        for method, fit in fits.items():
            torch.testing.assert_close(fit.values, kept[method].values, rtol=1e-4, atol=0)
            torch.testing.assert_close(fit.weights, kept[method].weights, rtol=1e-4, atol=0)
        assert again.map(name).quality == entry.quality
        assert again.map(name).name == name


def test_file_has_one_line_per_target_layer(path):
    text = path.read_text()
    assert json.loads(text)["format"] == "outrider-alignment"
    assert sum(line.strip().startswith("[[[") for line in text.splitlines()) == 8
    assert len(text.splitlines()) < 75


def test_a_file_without_what_stands_for_unlisted_tokens_is_one(tmp_path):
    """As they were written before there was any such thing."""
    save(make_file(fitted=False), tmp_path / "a.json")
    assert "unlisted" not in (tmp_path / "a.json").read_text()
    loaded = load(tmp_path / "a.json", target=None, draft=None)
    assert all(not entry.alignment.unlisted for entry in loaded.maps.values())


NUMBERS = [[0.5] * 8] * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unlisted_values": 3}, r"unlisted_values: malformed; allowed: finite numbers \[layers\]\[KV heads\]\[head dim\]"),
        ({"unlisted_values": [[[1.0]]]}, "unlisted_values: got 1 layers; allowed: 4, as maps.joint.recall.sources"),
        ({"unlisted_weights": NUMBERS}, r"maps.joint\+recall.unlisted_weights: got .*; allowed: a dict"),
        ({"unlisted_weights": {"sts": [[0.5] * 8, [1.0]]}}, r"unlisted_weights.sts: malformed"),
        ({"unlisted_weights": {"sts": [[0.5] * 7] * 4}}, r"unlisted_weights.sts: got \[4, 7\] .* a multiple of 2 heads"),
        ({"unlisted_weights": {"sts": [[-0.5] * 8] * 4}}, r"unlisted_weights.sts: got .* from -0.5 on; allowed: numbers >= 0"),
    ],
)
def test_malformed_fits_are_named(path, change, message):
    edit(path, lambda document: (document if "unlisted_values" in change else document["maps"]["joint+recall"]).update(change))
    with pytest.raises(AlignmentError, match=message):
        load(path, target=None, draft=None)


def test_save_replaces_and_leaves_nothing_behind(path, monkeypatch):
    before = path.read_text()
    save(replace(make_file(), text="another"), path)
    assert load(path, target=None, draft=None).text == "another"
    save(make_file(), path)

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", broken)
    with pytest.raises(AlignmentError, match="disk full"):
        save(make_file(), path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text()).keys() == json.loads(before).keys()


def test_save_of_a_value_that_json_lacks_leaves_nothing_behind(path):
    before = path.read_text()
    with pytest.raises(ValueError):
        save(replace(make_file(), keep=float("nan")), path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_text() == before


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(AlignmentError, match="nowhere"):
        save(make_file(), tmp_path / "nowhere" / "a.json")


def test_costs_come_back(tmp_path):
    values = torch.rand(4, 2, 3, dtype=torch.float64)
    costs = ListCosts(shares=(0.0, 0.25, 1.0), values=values)
    first = next(iter(make_file().maps.values()))
    file = replace(make_file(), maps={first.name: replace(first, alignment=replace(first.alignment, costs=costs))})
    save(file, tmp_path / "a.json")
    again = load(tmp_path / "a.json", target=None, draft=None).map(first.name).alignment
    assert again.costs.shares == costs.shares
    assert torch.allclose(again.costs.values, values, rtol=1e-3)
    for name, wrong in (
        ("cost_shares", [0.0, 0.25]),
        ("cost_shares", [0.0, 0.25, 0.25, 1.0]),
        ("cost_shares", None),
        ("costs", [[[1, 2, 3]]]),
        ("costs", (values - 1).tolist()),
        ("costs", (values / 0).tolist()),
        ("costs", values[:, :, :2].tolist()),
        ("costs", "many"),
    ):
        save(file, tmp_path / "a.json")
        edit(tmp_path / "a.json", lambda document, name=name, wrong=wrong: document["maps"][first.name].update({name: wrong}))
        assert f"{name}: malformed" in refused(tmp_path / "a.json")


def test_a_file_without_costs_is_read_as_ever(path):
    """Version 1 had none."""
    edit(path, lambda document: document.update(version=1))
    assert all(entry.alignment.costs is None for entry in load(path, target=None, draft=None).maps.values())


def test_unknown_map_names_those_present(path):
    with pytest.raises(AlignmentError, match=r"'monotone\+average'.*joint\+recall, proportional\+jaccard"):
        load(path, target=None, draft=None).map("monotone+average")


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("field", ["name", "digest"])
def test_other_model(path, role, field):
    pair = {"target": TARGET, "draft": DRAFT}
    wanted = replace(pair[role], **{field: "other"})
    with pytest.raises(AlignmentError) as caught:
        load(path, **{**pair, role: wanted})
    for part in (str(path), role, str(pair[role]), str(wanted)):
        assert part in str(caught.value)
    assert load(path, **{**pair, role: None}).target == TARGET


def edit(path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refused(path) -> str:
    with pytest.raises(AlignmentError) as caught:
        load(path, target=None, draft=None)
    assert str(path) in str(caught.value)
    return str(caught.value)


FIELDS = ["format", "version", "target", "draft", "text", "text_digest", "tokens", "rounds", "queries_per_round", "keep"]


@pytest.mark.parametrize("field", [*FIELDS, "maps"])
def test_missing_field(path, field):
    edit(path, lambda document: document.pop(field))
    message = refused(path)
    assert field in message and "missing" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("version", 3),
        ("version", True),
        ("target", "big"),
        ("target", {"name": "big"}),
        ("draft", {"name": 3, "digest": ""}),
        ("text", None),
        ("tokens", "many"),
        ("rounds", True),
        ("rounds", 1.5),
        ("keep", "0.1"),
        ("keep", float("nan")),
        ("keep", 10**400),
        ("maps", []),
        ("maps", {}),
        ("maps", {"joint": {"quality": {}, "sources": [[[[0, 0]]]]}}),
        ("maps", {"joint+recall": 1}),
        ("maps", {"joint+recall": {"quality": {}}}),
        ("maps", {"joint+recall": {"sources": [[[[0, 0]]]]}}),
        ("maps", {"joint+recall": {"sources": [[[[0, 0]]]], "quality": {"recall": "good"}}}),
        ("maps", {"joint+recall": {"sources": [[[[0, 0]]]], "quality": {}, "costs": [[[1, 0]]]}}),
    ],
)
def test_wrong_field(path, field, value):
    edit(path, lambda document: document.update({field: value}))
    assert field in refused(path)


@pytest.mark.parametrize(
    "sources",
    [None, 3, [], [[]], "x", [[[0, 0]]], [[[[0, 0, 0]]]], [[[[0, 0]], [[0]]]], [[[[0.5, 0]]]], [[[[0, -1]]]],
     [[[[True, False]]]], [[[["a", "b"]]]], [[[[0, 10**30]]]], [[[[0, 0]]], [[[0, 0]], [[0, 0]]]]],
    ids=str,
)  # fmt: skip
def test_malformed_sources(path, sources):
    edit(path, lambda document: document["maps"]["joint+recall"].update(sources=sources))
    message = refused(path)
    assert "maps.joint+recall.sources" in message and "allowed" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"3", b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "cut", "list", "number", "binary", "deep"],
)
def test_not_an_alignment(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert "allowed" in refused(path)


def test_unreadable(tmp_path):
    assert "cannot be read" in refused(tmp_path / "absent.json")
    assert "cannot be read" in refused(tmp_path)
