"""Diagnosis against brute force: transformers' own attention, sets in plain Python, what other tasks say of the same run."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.config import Budget, SamplingParams, engine_config
from outrider.decoding.outrider import Outrider
from outrider.errors import OptionError, PromptError
from outrider.eval import perplexity
from outrider.eval.diagnose.lists import ListFigures, means
from outrider.eval.diagnose.rows import Acceptance, Disagreement, Heads, Overlap
from outrider.eval.diagnose.summary import summarize
from outrider.eval.diagnose.task import evaluate
from outrider.eval.rows import Case, Text
from outrider.types import Selection

TEXT = Text(name="noise", text="".join(random.Random(3).choices("abcdefgh \n.,", k=400)))
EVERYTHING = Budget(keep=1.0, min_context=0)
FEW = Budget(keep=0.2, sinks=2, recent=4, min_context=0)
METHODS = ("outrider", "sts", "specattn")
CONTEXT, SCORED, T = 120, 12, 5
PREFIX = CONTEXT - SCORED - 1


def diagnose(pair, alignments, *cases, texts=(TEXT,), **options):
    return list(
        evaluate(pair, alignments, list(texts), list(cases), **({"context": CONTEXT, "scored_tokens": SCORED} | options))
    )


def only(rows, kind, **fields):
    [row] = [row for row in rows if isinstance(row, kind) and all(getattr(row, name) == fields[name] for name in fields)]
    return row


@pytest.fixture(scope="module")
def both_texts(pair, alignments):
    """Dense and one method over two texts."""
    texts = [TEXT, Text(name="other", text=TEXT.text[::-1])]
    return diagnose(pair, alignments, Case(method="dense"), Case(method="sts", budget=FEW), texts=texts)


def jaccard(a, b):
    return len(set(a) & set(b)) / len(set(a) | set(b))


@pytest.fixture(scope="module")
def attention(pair):
    """Per layer [Hq, tokens, tokens]: what transformers' eager attention computes for the whole text at once."""
    module = copy.deepcopy(pair[0].module)
    module.set_attn_implementation("eager")
    tokens = torch.tensor([pair[0].tokenizer(TEXT.text)["input_ids"][:CONTEXT]])
    with torch.inference_mode():
        return [layer[0] for layer in module(input_ids=tokens, use_cache=False, output_attentions=True).attentions]


def test_recall_and_overlap_are_those_of_a_brute_force_softmax(pair, attention):
    """Lists of `streaming` are known without running it: the first four tokens and the last ones."""
    rows = diagnose(pair, None, Case(method="streaming", budget=Budget(keep=0.3, min_context=0)))
    heads, own = only(rows, Heads), only(rows, Overlap, between="draft and target")
    starts = range(PREFIX, CONTEXT - 1, T)
    kept = [math.ceil(0.3 * s) for s in starts]
    lists = [[*range(4), *range(s - k + 4, s)] for s, k in zip(starts, kept, strict=True)]
    assert heads.layers == own.layers == [0, 1, 2]
    for layer, weights in enumerate(attention):
        past = [weights[:, s : min(s + T, CONTEXT - 1), :s].mean(1) for s in starts]  # [Hq, s] of each round
        shares = torch.stack([m[:, chosen].sum(-1) / m.sum(-1) for m, chosen in zip(past, lists, strict=True)])
        assert heads.recall[layer] == pytest.approx(shares.mean(0).tolist(), abs=1e-5)
        groups = len(own.overlap[layer])
        for group in range(groups):
            best = [m.unflatten(0, (groups, -1))[group].sum(0).topk(k).indices for m, k in zip(past, kept, strict=True)]
            expected = [jaccard(chosen, one.tolist()) for chosen, one in zip(lists, best, strict=True)]
            assert own.overlap[layer][group] == pytest.approx(sum(expected) / len(expected), abs=0.01)  # rounding may swap two
    between = only(rows, Overlap, between="rounds")
    expected = [jaccard(a, b) for a, b in zip(lists[1:], lists, strict=False)]
    for layer in between.overlap:
        assert layer == pytest.approx([sum(expected) / len(expected)] * len(layer))


@settings(max_examples=40)
@given(st.data())
def test_figures_of_lists_are_those_of_sets(data):
    """One list for all heads, per KV head and per query head; lists of any length, empty ones too; other lengths each round."""
    heads, query_heads = data.draw(st.sampled_from([1, 2, 4])), 4
    figures, previous, recalls, befores, owns = ListFigures(), None, [], [], []
    for size in data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=3).map(sorted)):
        lists = [sorted(data.draw(st.sets(st.integers(0, size - 1)))) for _ in range(heads)]
        # distinct powers of two: no two sets of tokens have the same mass, so that there is one best set
        order = [data.draw(st.permutations(range(size))) for _ in range(query_heads)]
        mass = torch.tensor([[2.0 ** -(4 * place + head) for place in ranks] for head, ranks in enumerate(order)])
        width = max(map(len, lists))
        indices = torch.tensor([chosen + [-1] * (width - len(chosen)) for chosen in lists], dtype=torch.int32)
        counts = torch.tensor([len(chosen) for chosen in lists], dtype=torch.int32)
        shape = (1, 1, heads, width)
        figures.add(
            Selection(layers=(7,), indices=indices.view(shape), counts=counts.view(1, 1, heads), lengths=torch.tensor([size])),
            lambda layer, mass=mass: mass,
        )
        share = query_heads // heads
        recalls.append([float(mass[h, lists[h // share]].sum() / mass[h].sum()) for h in range(query_heads)])
        sums = [mass[g * share : (g + 1) * share].sum(0).tolist() for g in range(heads)]
        best = [sorted(range(size), key=lambda i, s=s: -s[i])[: len(own)] for s, own in zip(sums, lists, strict=True)]
        owns.append([jaccard(a, b) if a else 0.0 for a, b in zip(lists, best, strict=True)])
        if previous is not None:
            befores.append([jaccard(a, b) if a or b else 0.0 for a, b in zip(lists, previous, strict=True)])
        previous = lists
    for found, expected in ((figures.recall, recalls), (figures.with_previous, befores), (figures.with_target, owns)):
        layers, [by_head] = means(found)
        assert layers == [7]
        assert by_head == pytest.approx([sum(column) / len(column) for column in zip(*expected, strict=True)], abs=1e-6)


@pytest.mark.parametrize("method", [*METHODS, "oracle"])
def test_lists_of_everything_miss_nothing(pair, alignments, method):
    rows = diagnose(pair, alignments, Case(method=method, budget=EVERYTHING))
    heads, own = only(rows, Heads), only(rows, Overlap, between="draft and target")
    assert [len(layer) for layer in heads.recall] == [4, 4, 4]
    assert all(value == pytest.approx(1) for layer in heads.recall for value in layer)
    assert all(value == 1 for layer in own.overlap for value in layer)
    assert only(rows, Disagreement).disagreement == 0


def test_the_oracle_is_the_target_itself_where_nothing_was_dropped_before(pair):
    """The first layer's queries and keys are the tokens' own, whatever later layers read; those behind it drift."""
    rows = diagnose(pair, None, Case(method="oracle", budget=FEW))
    first, *later = only(rows, Overlap, between="draft and target").overlap
    assert first == pytest.approx([1, 1], abs=0.01)
    assert min(min(layer) for layer in later) < 0.99


@pytest.mark.parametrize("method", [*METHODS, "quest"])
def test_disagreement_and_reads_are_those_of_perplexity(pair, alignments, method):
    case = Case(method=method, budget=Budget(keep=0.05, sinks=1, recent=2, min_context=0))
    found = only(diagnose(pair, alignments, case), Disagreement)
    [row] = perplexity.evaluate(pair, alignments, [TEXT], [case], context=CONTEXT, scored_tokens=SCORED)
    assert row.agreement is not None and found.disagreement == pytest.approx(1 - row.agreement) != 0
    assert (found.kept_fraction, found.kv_read_fraction) == (row.kept_fraction, row.kv_read_fraction)
    assert found.scored_tokens == SCORED


class TestAcceptance:
    def test_is_that_of_generate(self, pair, alignments):
        """Though the prompt is copied from what was read for the given text, after a sparse reading has written behind it."""
        rows = diagnose(pair, alignments, Case(method="outrider", budget=FEW), Case(method="dense"))
        prompt = pair[0].tokenizer(TEXT.text)["input_ids"][: PREFIX + 1]
        params = SamplingParams(max_new_tokens=SCORED, ignore_eos=True)
        for method, mode in (("dense", "dense"), ("outrider", "sparse")):
            config = engine_config(mode=mode, keep=FEW.keep, sinks=2, recent=4, min_context=0, batch_size=1)
            [result] = Outrider(*pair, config, alignments).generate(prompt, params)
            run, row = result.statistics, only(rows, Acceptance, method=method)
            assert row.by_position == [count / run.rounds for count in run.accepted_at] and row.rounds == run.rounds
            assert row.conditions["drafting"] == mode

    def test_a_target_that_drafts_for_itself_is_always_accepted(self, pair):
        target = pair[0]
        row = only(diagnose((target, target), None, Case(method="dense")), Acceptance)
        assert row.by_position == [1, 1, 1, 1] and row.rounds == math.ceil(SCORED / 5)

    def test_a_rival_is_drafted_for_densely(self, pair):
        row = only(diagnose(pair, None, Case(method="snapkv", budget=FEW)), Acceptance)
        assert row.conditions["drafting"] == "dense" and row.rounds >= math.ceil(SCORED / 5)


def test_lines_have_the_forms_that_are_documented(both_texts):
    about = {"task", "text", "method", "keep", "top_p", "context", "conditions"}
    own = {
        "heads": {"layers", "recall"},
        "overlap": {"between", "layers", "overlap"},
        "acceptance": {"by_position", "rounds"},
        "disagreement": {"kept_fraction", "kv_read_fraction", "disagreement", "scored_tokens"},
    }
    of_sts = ["disagreement", "heads", "overlap", "overlap", "acceptance"]
    assert [row.as_dict()["task"] for row in both_texts] == ["disagreement", "acceptance", *of_sts] * 2
    assert [row.text for row in both_texts] == ["noise"] * 7 + ["other"] * 7
    for row in (row.as_dict() for row in both_texts):
        assert set(row) == about | own[row["task"]]
        assert (row["context"], row["keep"]) == (CONTEXT, None if row["method"] == "dense" else 0.2)
        assert row["conditions"]["draft_tokens"] == 4


def test_layers_without_lists_are_left_out(pair):
    """Quest's first two layers read everything."""
    rows = diagnose(pair, None, Case(method="quest", budget=FEW))
    assert only(rows, Heads).layers == only(rows, Overlap, between="rounds").layers == [2]


def test_a_summary_is_the_mean_over_texts(both_texts):
    rows = [row for row in both_texts if row.method == "sts"]
    dense, sts = summarize(both_texts)
    assert (dense.method, dense.recall, dense.disagreement, dense.kept_fraction) == ("dense", {}, 0, 1)
    one, two = (only(rows, Heads, text=name) for name in ("noise", "other"))
    assert one.recall != two.recall
    assert sts.recall == {
        layer: pytest.approx([(a + b) / 2 for a, b in zip(*both, strict=True)])
        for layer, both in enumerate(zip(one.recall, two.recall, strict=True))
    }
    accepted = [only(rows, Acceptance, text=name).by_position for name in ("noise", "other")]
    assert sts.by_position == pytest.approx([(a + b) / 2 for a, b in zip(*accepted, strict=True)])
    assert sts.with_previous != sts.with_target


@pytest.mark.parametrize(
    ("case", "options", "error", "says"),
    [
        (Case(method="magic"), {}, OptionError, "method: got 'magic'; allowed: dense, outrider"),
        (Case(method="sts"), {}, OptionError, f"min-context: got 1024; allowed: at most {PREFIX}"),
        (Case(method="dense"), {"scored_tokens": 5}, OptionError, r"scored-tokens: got 5; allowed: 6 \.\. context - 1 = 119"),
        (Case(method="dense"), {"scored_tokens": 120}, OptionError, "scored-tokens: got 120"),
        (Case(method="dense"), {"context": 5000}, OptionError, r"context: got 5000; allowed: 2 \.\. 4096"),
        (Case(method="dense"), {"context": 500}, PromptError, "noise: got 400 tokens; allowed: at least 500"),
        (Case(method="dense"), {"score_keys": "8bit"}, OptionError, "score-keys: got '8bit'"),
    ],
)
def test_bad_options_are_refused_before_any_work(pair, alignments, case, options, error, says):
    with pytest.raises(error, match=says):
        evaluate(pair, alignments, [TEXT], [case], **({"context": CONTEXT, "scored_tokens": SCORED} | options))  # not iterated


def test_an_alignment_is_asked_for(pair):
    with pytest.raises(OptionError, match="alignment: got None"):
        evaluate(pair, None, [TEXT], [Case(method="sts", budget=FEW)], context=CONTEXT, scored_tokens=SCORED)
