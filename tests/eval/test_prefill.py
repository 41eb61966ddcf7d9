"""The evaluation of sparse prefill: dense equals transformers, everything kept equals dense, and why every query votes."""

from __future__ import annotations

import copy
from itertools import groupby

import pytest
import torch
from torch.nn.functional import cross_entropy

from outrider.config import PREFILL_METHODS, Budget
from outrider.decoding import sparse_prefill
from outrider.errors import OptionError
from outrider.eval import prefill_task
from outrider.eval.prefill_task import chunk_starts
from outrider.eval.rows import Case, Text

from .test_teacher_forced import TEXT

DENSE, WHOLE = Case(method="dense"), Case(method="outrider", budget=Budget(keep=1.0))
LITTLE = Case(method="outrider", budget=Budget(keep=0.1, sinks=2, recent=8))
SHAPE = {"prefill_chunk": 64, "prefill_block": 16, "prefill_min_context": 0}


def rows(pair, alignments, cases, *, context=400, **options):
    given = {"scored_tokens": 57, "continued": 30, "facts": 0} | SHAPE | options
    found = prefill_task.evaluate(pair, alignments, [TEXT], cases, context=context, **given)
    return [{row.part: row for row in rows} for _, rows in groupby(found, key=lambda row: (row.method, row.keep))]


def test_dense_perplexity_is_that_of_transformers(pair, alignments):
    [found] = rows(pair, alignments, [DENSE])
    target = pair[0]
    module = copy.deepcopy(target.module)
    module.set_attn_implementation("eager")
    tokens = torch.tensor([target.tokenizer(TEXT.text)["input_ids"][:400]])
    with torch.inference_mode():
        logits = module(input_ids=tokens, use_cache=False).logits[0]
    for part, start, stop in (("prompt", 313, 370), ("continuation", 370, 400)):
        expected = float(cross_entropy(logits[start - 1 : stop - 1], tokens[0, start:stop]).exp())
        assert found[part].ppl == pytest.approx(expected, rel=1e-4)
        assert (found[part].scored_tokens, found[part].agreement, found[part].kept_fraction) == (stop - start, 1, 1)


def test_everything_kept_is_dense_and_little_is_not(pair, alignments):
    dense, whole, little = rows(pair, alignments, [DENSE, WHOLE, LITTLE], context=640, facts=3)
    for part in ("prompt", "continuation"):
        assert whole[part].ppl == pytest.approx(dense[part].ppl, rel=1e-4)
        assert whole[part].agreement == 1 and little[part].ppl != dense[part].ppl
    assert whole["prompt"].kept_fraction == 1 and 0.1 <= little["prompt"].kept_fraction < 0.2
    assert whole["facts"].agreement == 1 and whole["facts"].recalled == dense["facts"].recalled
    assert dense["facts"].asked == 3


@pytest.mark.parametrize("method", PREFILL_METHODS[1:])
def test_methods_that_read_a_prompt_whole(pair, alignments, method):
    """Everything kept is dense, in the prompt, behind it and in facts; alignments do not matter; little is not dense."""
    whole, little = (Case(method=method, budget=Budget(keep=keep)) for keep in (1.0, 0.3))
    dense, whole, little = rows(pair, None, [DENSE, whole, little], context=640, facts=3)
    predicted = {"continuation", "facts"} if method == "spec-prefill" else {"prompt", "continuation", "facts"}
    assert whole.keys() == little.keys() == predicted, "spec-prefill predicts nothing of a prompt that it has not read"
    for part in predicted - {"facts"}:
        assert whole[part].ppl == pytest.approx(dense[part].ppl, rel=1e-4) and whole[part].agreement == 1
        assert little[part].ppl != dense[part].ppl and little[part].ppl_dense == dense[part].ppl
        assert (little[part].method, little[part].keep) == (method, 0.3)
    assert whole["facts"].agreement == 1 and whole["facts"].recalled == dense["facts"].recalled
    assert whole["facts"].kept_fraction == 1 and little["facts"].kept_fraction < 0.7
    if method != "token-sparse":  # of whose layers some are dense, while 128 tokens are kept in others
        assert little["facts"].kept_fraction == pytest.approx(0.3, abs=0.04)


def test_short_prompts_are_read_densely_by_all(pair, alignments):
    cases = [Case(method=method, budget=Budget(keep=0.1)) for method in PREFILL_METHODS]
    for found in rows(pair, alignments, cases, prefill_min_context=400):
        assert found["prompt"].agreement == found["prompt"].kept_fraction == 1 and found["prompt"].delta_percent == 0


def test_there_is_room_for_what_is_read_behind_a_prompt(pair, alignments):
    case = Case(method="spec-prefill", budget=Budget(keep=0.5))
    with pytest.raises(OptionError, match="continued: got 7; allowed: at least 8, for a method that reads so many behind"):
        rows(pair, alignments, [case], continued=7)
    assert rows(pair, alignments, [case], continued=8)[0].keys() == {"continuation"}


def test_chunks_begin_where_the_engine_has_them():
    assert chunk_starts(0, 150, 64) == [0, 64, 128]
    assert chunk_starts(80, 150, 64) == [80, 128]
    assert chunk_starts(128, 128, 64) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scored_tokens": 370}, "scored-tokens: got 370; allowed: 1 .. context - continued - 1 = 369"),
        ({"continued": 400}, "continued: got 400; allowed: 1 .. context - 1 = 399"),
        ({"facts": -1}, "facts: got -1; allowed: a whole number >= 0"),
        ({"prefill_chunk": 40}, "prefill-chunk: got 40; allowed: a multiple of prefill-block = 16"),
    ],
)
def test_bad_options(pair, alignments, options, message):
    with pytest.raises(OptionError, match=message.replace("+", r"\+")):
        rows(pair, alignments, [WHOLE], **options)


def test_methods_and_budgets_that_prefill_does_not_have(pair, alignments):
    for case, message in (
        (Case(method="quest", budget=Budget(keep=0.1)), r"method: got 'quest'; allowed: dense, outrider, token-sparse"),
        (Case(method="token-sparse", budget=Budget(top_p=0.9)), r"top-p: got 0.9; allowed: keep"),
        (Case(method="spec-prefill", budget=Budget(allocation="fitted")), r"allocation: got 'fitted'; allowed: flat or auto"),
        (Case(method="outrider", budget=Budget(top_p=0.9)), r"top-p: got 0.9; allowed: keep"),
    ):
        with pytest.raises(OptionError, match=message):
            rows(pair, alignments, [case])
    with pytest.raises(OptionError, match="alignment: got None"):
        rows(pair, None, [WHOLE])


def test_sampled_queries_lose_facts(monkeypatch, builtin_pair, builtin_alignment, book):
    """The built-in pair on a real text: where all queries of a block vote its facts are recalled, where one in 16 stands for
    its neighbours most are lost, and what follows the prompt shows nothing of it."""
    case = Case(method="outrider", budget=Budget(keep=0.1))
    shape = {"prefill_chunk": 1024, "prefill_block": 256, "prefill_min_context": 512}
    options = {"context": 3072, "scored_tokens": 128, "continued": 64, "facts": 8} | shape

    def measured(*cases):
        found = prefill_task.evaluate(builtin_pair, builtin_alignment, [Text(name="book", text=book)], [*cases], **options)
        return {(row.method, row.part): row for row in found}

    every = measured(DENSE, case)
    score = sparse_prefill.score_blocks

    def few(draft, cache, queries, logsumexp, layers, **given):
        stand_in = torch.arange(queries[0].shape[1]) // 16 * 16
        few_of_each = tuple(one[:, stand_in] for one in queries), tuple(one[:, :, stand_in] for one in logsumexp)
        return score(draft, cache, *few_of_each, layers, **given)

    monkeypatch.setattr(sparse_prefill, "score_blocks", few)
    sampled = measured(case)
    assert every["outrider", "facts"].recalled == every["dense", "facts"].recalled == 8
    assert sampled["outrider", "facts"].recalled <= 4
    assert sampled["outrider", "continuation"].delta_percent < 2
