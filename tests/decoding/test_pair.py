"""Which draft and alignment a target gets, and which it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.config import SamplingParams
from outrider.decoding.outrider import Outrider
from outrider.decoding.pair import find_alignment, identity, load_pair
from outrider.errors import AlignmentError, ModelError, OptionError, PairError
from outrider.guidance.alignment import save


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_module, byte_tokenizer):
    """Checkpoints on disk: a target, a draft of another family, and a draft with another vocabulary."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, family, size in (("target", "llama", 257), ("draft", "qwen3", 257), ("wide", "llama", 300)):
        make_module(family, vocab_size=size).save_pretrained(root / name)
        byte_tokenizer.save_pretrained(root / name)
    make_module("llama").save_pretrained(root / "ids-only")
    make_module("qwen3", vocab_size=98).save_pretrained(root / "ids-only-98")
    return root


def test_pair_from_folders(folders):
    target, draft = load_pair(str(folders / "target"), str(folders / "draft"))
    assert (target.spec.name, draft.spec.name) == ("target", "draft")
    assert target.tokenizer("ab")["input_ids"] == draft.tokenizer("ab")["input_ids"] != []


def test_padding_of_the_logits_may_differ(folders):
    target, draft = load_pair(str(folders / "target"), str(folders / "wide"))
    assert (target.spec.vocabulary, draft.spec.vocabulary) == (257, 300)


def test_same_checkpoint_is_allowed_and_warns(folders):
    path = str(folders / "target")
    with pytest.warns(UserWarning, match=r"same checkpoint"):
        target, draft = load_pair(path, path)
    assert target is draft


def test_a_draft_must_be_named(folders):
    with pytest.raises(OptionError, match=r"draft: got None; allowed: .*builtin"):
        load_pair(str(folders / "target"), None)


def test_sizes_must_agree_when_there_is_no_tokenizer(folders):
    with pytest.raises(PairError, match=r"97 \(target\) and 98 \(draft\)"):
        load_pair(str(folders / "ids-only"), str(folders / "ids-only-98"))


def test_missing_checkpoint_is_named(folders):
    with pytest.raises(ModelError, match=r"draft '.*nowhere'"):
        load_pair(str(folders / "target"), str(folders / "nowhere"))


def test_alignment_file_of_this_pair(folders, align, tmp_path):
    pair = load_pair(str(folders / "target"), str(folders / "draft"))
    made = align(*pair)
    save(made, tmp_path / "alignment.json")
    found = find_alignment(tmp_path / "alignment.json", *pair)
    assert found.maps.keys() == made.maps.keys()
    engine = Outrider.load(
        str(folders / "target"),
        str(folders / "draft"),
        alignment=tmp_path / "alignment.json",
        min_context=8,
        recent=4,
        keep=0.3,
    )
    [result] = engine.generate("A prompt of some length", SamplingParams(max_new_tokens=8))
    assert len(result.token_ids) == 8
    assert result.statistics.kept_fraction < 1


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("form", ["path", "object"])
def test_alignment_for_other_models_is_refused(role, form, folders, align, tmp_path):
    pair = load_pair(str(folders / "target"), str(folders / "draft"))
    made = align(*pair)
    given = other = replace(made, **{role: replace(getattr(made, role), digest="f" * 16)})
    if form == "path":
        given = tmp_path / "other.json"
        save(other, given)
    with pytest.raises(AlignmentError, match=rf"made for the {role} .*ffffffff.*{getattr(made, role).digest}"):
        find_alignment(given, *pair)


def test_a_foreign_pair_does_not_get_the_builtin_alignment(make_pair):
    assert find_alignment(None, *make_pair("llama")) is None


def test_builtin_pair(builtin_pair, builtin_alignment):
    target, draft = builtin_pair
    assert (builtin_alignment.target, builtin_alignment.draft) == (identity(target), identity(draft))
    assert {"joint+divergence", "proportional+jaccard", "monotone+average"} <= builtin_alignment.maps.keys()
    assert target.spec.context == draft.spec.context == 32768
    assert all(shape.head_dim == 64 for spec in (target.spec, draft.spec) for shape in spec.layers)
