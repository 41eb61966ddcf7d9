"""What stands for unlisted tokens, in whole rounds: what reaches attention, what is counted, who takes it and who refuses."""

from __future__ import annotations

import pytest
import torch

from outrider.config import Budget, EngineConfig, SamplingParams
from outrider.decoding.pair import make_rival, make_selector
from outrider.decoding.statistics import Listed
from outrider.decoding.teacher_forced import TeacherForced
from outrider.errors import OptionError
from outrider.models import attention

BUDGET = {"keep": 0.2, "min_context": 0, "sinks": 2, "recent": 8}


@pytest.fixture(scope="module")
def mixed(builtin_pair, builtin_alignment, book):
    """`mixed(unlisted)`: the rounds of a text, with their lists and queries."""
    tokens = builtin_pair[0].tokenizer(book)["input_ids"][:420]
    reader = TeacherForced(builtin_pair, 420, 4)
    reader.read([tokens[:400]], 2048)

    def rounds(unlisted: str):
        alignment = builtin_alignment.map("joint+divergence").alignment
        selector = make_selector(*builtin_pair, "outrider", alignment, Budget(**BUDGET, unlisted=unlisted), 4)
        return list(reader.rounds([tokens[400:]], selector, record=True))

    return rounds


def test_the_output_of_a_layer_leans_towards_the_mean_value_by_its_share(mixed, monkeypatch):
    seen = []
    attend = attention.sparse_attention

    def spy(*given, unlisted_values, unlisted_shares, **options):
        plain = attend(*given, **options)
        out = attend(*given, unlisted_values=unlisted_values, unlisted_shares=unlisted_shares, **options)
        if given[3] is not None:
            seen.append((plain, out, unlisted_values, unlisted_shares))
        return out

    monkeypatch.setattr(attention, "sparse_attention", spy)
    rounds = mixed("mean")
    assert len(seen) == 6 * len(rounds)
    for plain, out, values, shares in seen:
        assert 0.001 < shares.max() <= 1 and (shares >= 0).all()
        values = values.repeat_interleave(plain.shape[2] // len(values), 0)
        torch.testing.assert_close(out, torch.lerp(plain, values.expand_as(plain), shares[:, None, :, None]))


def test_lists_are_the_same_with_it_and_what_is_read_is_counted(mixed, builtin_pair):
    target = builtin_pair[0].spec
    with_it, without = mixed("mean")[0], mixed("none")[0]
    assert torch.equal(with_it.lists.indices, without.lists.indices)
    assert not torch.allclose(with_it.logits, without.logits)
    constants = sum(4 * layer.kv_heads * layer.head_dim for layer in target.layers)  # fp32
    assert with_it.reads[0].bytes_read - without.reads[0].bytes_read == constants
    assert with_it.reads[0].listed == without.reads[0].listed
    counted = Listed.of(with_it.lists, target, 500), Listed.of(without.lists, target, 500)
    assert torch.equal(counted[0].tokens, counted[1].tokens)


def test_generation_has_it_too(make_pair, make_engine, random_prompts):
    """A run reads the constants in every sparse round, and its tokens come to differ."""
    engine = make_engine(make_pair("llama"), mode="sparse", unlisted="mean", min_context=0)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    with_it, without = (
        [result]
        for one in ("mean", "none")
        for result in engine.with_options(unlisted=one).generate(random_prompts([40]), params)
    )
    assert with_it[0].token_ids != without[0].token_ids
    seen = [result.statistics for result in (*with_it, *without)]
    assert all(0 < statistics.kept_fraction < 0.9 for statistics in seen)


def test_the_drafts_own_lists_stand_for_all_tokens():
    assert EngineConfig(budget=Budget(unlisted="mean")).draft_budget.unlisted == "none"


def test_wrong_values_and_methods_that_cannot_have_it_are_refused(builtin_pair):
    with pytest.raises(OptionError, match="unlisted: got 'half'; allowed: none, mean"):
        Budget(unlisted="half")
    with pytest.raises(OptionError, match="unlisted: got 'mean'; allowed: none with method quest"):
        make_rival("quest", builtin_pair[0], Budget(unlisted="mean"))
