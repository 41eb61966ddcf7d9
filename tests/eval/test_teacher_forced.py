"""The evaluation runs the same stages as generation: dense equals transformers, keep-everything equals dense, nothing leaks."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from outrider.config import Budget
from outrider.decoding.channels import rank_channels
from outrider.errors import OptionError, PromptError
from outrider.eval import facts_task, perplexity
from outrider.eval.facts import draw_facts
from outrider.eval.rows import Case, Text
from outrider.eval.teacher_forced import TeacherForced, make_selector
from outrider.guidance.channels import ChannelFile
from outrider.guidance.rivals import RIVALS

TEXT = Text(name="noise", text="".join(random.Random(3).choices("abcdefgh \n.,", k=900)))
EVERYTHING = Budget(keep=1.0, min_context=0)
METHODS = ("outrider", "sts", "specattn", "dustin")


def test_dense_perplexity_is_that_of_transformers(pair, alignments):
    [row] = perplexity.evaluate(pair, alignments, [TEXT], [Case(method="dense")], context=400, scored_tokens=57)
    target = pair[0]
    module = copy.deepcopy(target.module)
    module.set_attn_implementation("eager")
    tokens = torch.tensor([target.tokenizer(TEXT.text)["input_ids"][:400]])
    with torch.inference_mode():
        logits = module(input_ids=tokens, use_cache=False).logits[0, -58:-1]
    expected = float(cross_entropy(logits, tokens[0, -57:]).exp())
    assert row.ppl == pytest.approx(expected, rel=1e-4)
    assert (row.delta_percent, row.agreement, row.kept_fraction, row.kv_read_fraction) == (0, 1, 1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_changes_nothing(pair, alignments, method):
    cases = [Case(method=method, budget=EVERYTHING)]
    [row] = perplexity.evaluate(pair, alignments, [TEXT], cases, context=300, scored_tokens=41)
    assert row.ppl == pytest.approx(row.ppl_dense, rel=1e-5)
    assert row.agreement == 1
    assert row.kept_fraction == 1
    assert row.kv_read_fraction > 1  # everything, and the scoring pass on top


@pytest.mark.parametrize("method", METHODS)
def test_a_small_budget_is_reported_as_read(pair, alignments, method):
    cases = [Case(method=method, budget=Budget(keep=0.25, sinks=2, recent=8, min_context=0))]
    [row] = perplexity.evaluate(pair, alignments, [TEXT], cases, context=500, scored_tokens=40)
    assert 0.25 <= row.kept_fraction < 0.256  # the ceiling of 25% of some 460 tokens
    assert row.ppl != row.ppl_dense


@pytest.fixture(scope="module")
def channels(pair) -> ChannelFile:
    return rank_channels(pair[0], TEXT.text, text_name=TEXT.name, tokens=600)


@pytest.fixture(scope="module")
def learned(pair, channels, untrained) -> dict[str, Any]:
    """What methods may ask for."""
    return {"channels": channels, "controller": untrained(pair[0])}


def share(method: str, amount: float) -> Budget:
    """A budget of that share, of the tokens or of what the method takes a share of."""
    return Budget(**{RIVALS[method].budgeted: amount, "min_context": 0})


def check_together(pair, alignments, case, **options):
    """Three texts in batches of two: the rows of each alone, in the order of texts within a batch, and nothing shared."""
    texts = [TEXT, Text(name="other", text=TEXT.text[::-1]), Text(name="third", text=TEXT.text[300:] + TEXT.text[:300])]
    options |= {"context": 300, "scored_tokens": 23}
    rows = list(perplexity.evaluate(pair, alignments, texts, [Case(method="dense"), case], batch_size=2, **options))
    assert [row.text for row in rows] == ["noise", "other", "noise", "other", "third", "third"]
    alone = [next(iter(perplexity.evaluate(pair, alignments, [text], [case], **options))) for text in texts]
    for row, expected in zip([rows[2], rows[3], rows[5]], alone, strict=True):
        assert (row.text, row.method) == (expected.text, case.method)
        assert (row.ppl, row.ppl_dense) == pytest.approx((expected.ppl, expected.ppl_dense), rel=1e-4)
        assert (row.kept_fraction, row.kv_read_fraction) == pytest.approx((expected.kept_fraction, expected.kv_read_fraction))


@pytest.mark.parametrize("method", METHODS)
def test_texts_read_together_equal_each_alone(pair, alignments, method):
    check_together(pair, alignments, Case(method=method, budget=Budget(keep=0.2, min_context=0)))


@pytest.mark.parametrize("method", RIVALS)
class TestRivals:
    def test_keeping_everything_changes_nothing(self, pair, learned, method):
        cases = [Case(method=method, budget=share(method, 1.0))]
        [row] = perplexity.evaluate(pair, None, [TEXT], cases, **learned, context=300, scored_tokens=41)
        assert row.ppl == pytest.approx(row.ppl_dense, rel=1e-5)
        assert (row.agreement, row.kept_fraction) == (1, 1)
        assert row.kv_read_fraction >= 1

    def test_a_document_leaves_nothing_behind(self, pair, learned, method):
        """The same figures whatever was read before, by the same method or another one."""
        case = Case(method=method, budget=share(method, 0.2))
        other = Text(name="other", text=TEXT.text[::-1])
        options = {**learned, "context": 300, "scored_tokens": 23}
        rows = list(perplexity.evaluate(pair, None, [other, TEXT], [case, case], **options))
        [alone] = perplexity.evaluate(pair, None, [TEXT], [case], **options)
        assert [row.ppl for row in rows[2:]] == [alone.ppl] * 2
        assert {row.kv_read_fraction for row in rows[2:]} == {alone.kv_read_fraction}
        assert (alone.ppl != alone.ppl_dense) == (alone.kept_fraction < 1)  # of few layers all may be dense ones

    def test_texts_read_together_equal_each_alone(self, pair, learned, method):
        check_together(pair, None, Case(method=method, budget=share(method, 0.2)), **learned)

    def test_facts_are_asked_for(self, pair, learned, method):
        cases = [Case(method=method, budget=share(method, 1.0))]
        [row] = facts_task.evaluate(pair, None, [TEXT], cases, **learned, facts=2, context=450)
        assert row.agreement == 1


def test_what_choosing_reads_is_charged(pair):
    """The oracle reads all keys, half of the cache, to keep a tenth; both ends cost nothing to find."""
    cases = [Case(method=method, budget=Budget(keep=0.1, min_context=0)) for method in ("oracle", "streaming")]
    oracle, streaming = perplexity.evaluate(pair, None, [TEXT], cases, context=400, scored_tokens=25)
    assert oracle.kept_fraction == streaming.kept_fraction
    assert oracle.kv_read_fraction - streaming.kv_read_fraction == pytest.approx(0.5, abs=0.01)


def test_contexts_below_min_context_stay_dense(pair, alignments):
    cases = [Case(method="outrider", budget=Budget(keep=0.1, min_context=1024))]
    [row] = perplexity.evaluate(pair, alignments, [TEXT], cases, context=300, scored_tokens=20)
    assert (row.kept_fraction, row.kv_read_fraction, row.delta_percent) == (1, 1, pytest.approx(0, abs=1e-3))


def test_cases_do_not_see_each_other(pair, alignments):
    """A sparse case writes approximate rows into the cache; the next case must not find them."""
    sparse = Case(method="outrider", budget=Budget(keep=0.1, sinks=1, recent=4, min_context=0))
    options = {"context": 300, "scored_tokens": 33}
    both = list(perplexity.evaluate(pair, alignments, [TEXT], [sparse, Case(method="dense"), sparse], **options))
    [alone] = perplexity.evaluate(pair, alignments, [TEXT], [sparse], **options)
    assert both[0].ppl == both[2].ppl == alone.ppl
    assert both[1].ppl == alone.ppl_dense


def test_rounds_equal_one_query_at_a_time_when_dense(pair):
    tokens = pair[0].tokenizer(TEXT.text)["input_ids"][:120]
    logits = []
    for draft_tokens in (1, 4, 30):
        reader = TeacherForced(pair, 120, draft_tokens)
        reader.read([tokens[:100]], 64)
        logits.append(reader.run([tokens[100:]], None)[0].logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-4)


def test_lists_that_begin_mid_text_find_the_draft_cache_whole(pair, alignments):
    """Rounds below min_context are dense, but the draft must read them: later rounds score their tokens."""
    tokens = pair[0].tokenizer(TEXT.text)["input_ids"][:120]
    selector = make_selector(Case(method="outrider", budget=Budget(keep=0.5, min_context=0)), pair, alignments, None, 4)
    whole, late = (TeacherForced(pair, 120, 4) for _ in range(2))
    whole.read([tokens], 64)
    late.read([tokens[:60]], 64)
    late.run([tokens[60:]], selector, min_context=100)
    for layer in range(2):
        torch.testing.assert_close(late.caches[1].keys(layer, 120), whole.caches[1].keys(layer, 120), rtol=1e-4, atol=1e-4)


def test_the_draft_reads_given_tokens_once(pair, alignments, monkeypatch):
    """Every method finds its rows and queries, and after other tokens, or tokens in other rounds, has it read them again."""
    tokens = pair[0].tokenizer(TEXT.text)["input_ids"][:160]
    given, other = tokens[100:121], [*tokens[100:107], *tokens[140:151]]
    selectors = [
        make_selector(Case(method=method, budget=Budget(keep=0.3, min_context=0)), pair, alignments, None, 4)
        for method in METHODS
    ]
    forwards, forward = [], type(pair[1]).forward
    monkeypatch.setattr(pair[1], "forward", lambda *args, **kwargs: forwards.append(1) or forward(pair[1], *args, **kwargs))

    def read(reader, tokens, selector, t=None):
        before = len(forwards)
        logits = torch.cat([one.logits[0] for one in reader.rounds([tokens], selector, t=t)])
        return logits, len(forwards) - before

    def fresh():
        reader = TeacherForced(pair, 160, 4)
        reader.read([tokens[:100]], 64)
        return reader

    shared, expected = fresh(), [read(fresh(), given, selector)[0] for selector in selectors]
    for count, selector, wanted in zip((5, 0, 0, 0), selectors, expected, strict=True):
        logits, ran = read(shared, given, selector)
        assert ran == count and torch.equal(logits, wanted)
    logits, ran = read(shared, other, selectors[0])
    assert ran == 3 and torch.equal(logits, read(fresh(), other, selectors[0])[0])  # the first round is the same
    logits, ran = read(shared, given, selectors[0], t=3)
    assert ran == 7 and torch.equal(logits, read(fresh(), given, selectors[0], t=3)[0])
    logits, ran = read(shared, given, selectors[1])
    assert ran == 5 and torch.equal(logits, expected[1])


def test_few_bits_are_scored_behind_a_prefix(builtin_pair, builtin_alignment, book):
    """Records begin where sparse rounds do, and follow them; they are another case's no more."""
    case = Case(method="outrider", budget=Budget(keep=0.1, sinks=4, recent=16, min_context=265))
    options = {"context": 330, "scored_tokens": 70, "prefill_chunk": 256}
    text, rows = Text(name="book", text=book[9000:12000]), {}
    for keys in ("exact", "4bit"):
        rows[keys], again = perplexity.evaluate(
            builtin_pair, builtin_alignment, [text], [case, case], score_keys=keys, **options
        )
        assert again.ppl == rows[keys].ppl and again.conditions["score_keys"] == keys
    assert rows["4bit"].kv_read_fraction < rows["exact"].kv_read_fraction
    assert rows["4bit"].ppl == pytest.approx(rows["exact"].ppl, rel=0.05) and rows["4bit"].ppl != rows["exact"].ppl


def test_few_bits_need_heads_that_fit(pair, alignments):
    options = {"context": 300, "cases": [Case(method="outrider")], "score_keys": "4bit"}
    for evaluate, own in ((perplexity.evaluate, {"scored_tokens": 40}), (facts_task.evaluate, {})):
        with pytest.raises(OptionError, match="score-keys: got '4bit'; allowed: exact for a draft with head dim 8"):
            evaluate(pair, alignments, [TEXT], **options, **own)
        with pytest.raises(OptionError, match="score-keys: got '8bit'; allowed: auto, exact, 4bit, 2bit"):
            evaluate(pair, alignments, [TEXT], **(options | {"score_keys": "8bit"}), **own)


def test_selector_of_an_unknown_method_names_the_known(pair, alignments):
    with pytest.raises(OptionError, match=r"method: got 'quests'; allowed: dense, outrider, sts, specattn, dustin, oracle"):
        make_selector(Case(method="quests"), pair, alignments, None, 4)
    with pytest.raises(OptionError, match="alignment"):
        make_selector(Case(method="sts"), pair, None, None, 4)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"context": 5000, "scored_tokens": 10}, OptionError, "context: got 5000; allowed: 2 .. 4096"),
        ({"context": 1000, "scored_tokens": 10}, PromptError, "noise: got 900 tokens; allowed: at least 1000"),
        ({"context": 100, "scored_tokens": 100}, OptionError, "scored-tokens: got 100"),
        ({"context": 100, "scored_tokens": 0}, OptionError, "scored-tokens: got 0"),
    ],
)
def test_bad_options_are_refused_before_any_work(pair, alignments, options, error, says):
    with pytest.raises(error, match=says):
        perplexity.evaluate(pair, alignments, [TEXT], [Case(method="dense")], **options)  # not even iterated


class TestFacts:
    def test_statements_are_planted_whole_and_apart(self, pair):
        rng = random.Random(5)
        facts = draw_facts(rng, 6)
        tokens = pair[0].tokenizer(TEXT.text)["input_ids"]
        text, questions = facts_task.plant(pair[0], tokens, facts, rng)
        written = pair[0].tokenizer.decode(text)
        assert len(text) + max(len(q) + len(a) for q, a in questions) == len(tokens)
        assert all(written.count(fact.statement) == 1 for fact in facts)
        for fact, (question, answer) in zip(facts, questions, strict=True):
            assert pair[0].tokenizer.decode(question) == fact.question
            assert pair[0].tokenizer.decode(answer) == fact.answer

    def test_too_many_facts_for_the_text(self, pair):
        with pytest.raises(OptionError, match="facts: got 9; allowed: as many as fit into a context of 100 tokens"):
            facts_task.plant(pair[0], list(range(100)), draw_facts(random.Random(0), 9), random.Random(0))

    def test_everything_kept_answers_like_dense(self, pair, alignments):
        cases = [Case(method="dense"), *(Case(method=m, budget=EVERYTHING) for m in METHODS)]
        rows = list(facts_task.evaluate(pair, alignments, [TEXT], cases, context=800, facts=3, seed=2))
        assert [row.method for row in rows] == ["dense", *METHODS]
        assert {row.agreement for row in rows} == {1}
        assert {(row.asked, row.scored_tokens) for row in rows} == {(3, 3 * 7)}  # a space and six digits, in bytes
        assert len({row.recalled for row in rows}) == 1

    def test_seed_decides_where_and_what(self, pair, alignments):
        cases = [Case(method="outrider", budget=Budget(keep=0.2, min_context=0))]

        def agreement(seed: int) -> list[float]:
            rows = facts_task.evaluate(pair, alignments, [TEXT], cases, context=800, facts=3, seed=seed)
            return [(row.agreement, row.kept_fraction) for row in rows]

        assert agreement(1) == agreement(1)

    def test_context_too_short_for_the_facts(self, pair, alignments):
        with pytest.raises(OptionError, match="facts: got 20"):
            facts_task.evaluate(pair, alignments, [TEXT], [Case(method="dense")], context=300, facts=20)
