"""Generated answers are those of `Outrider.generate`, for every method, whatever was remembered of the prompt before."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from outrider.config import Budget, SamplingParams, engine_config
from outrider.decoding.outrider import Outrider
from outrider.errors import EngineError, OptionError, PromptError
from outrider.eval import qa_task, ruler_task
from outrider.eval.answers import Answering, PromptMemory, counter
from outrider.eval.qa_data import Asked, Document
from outrider.eval.rows import Case, Text

SHORT = {"sinks": 2, "recent": 4, "min_context": 8}
CASES = [Case(method=m, budget=Budget(keep=0.3, **SHORT)) for m in ("outrider", "sts", "specattn")]
DENSE = Case(method="dense")
OPTIONS = {"draft_tokens": 3, "score_keys": "exact", "map_name": None, "prefill_chunk": 64}
PROMPTS = ["a river and a stone " * 5 + question for question in ("who?", "where to?")]


def test_answers_are_those_of_generate(pair, alignments):
    cases = [*CASES, DENSE]
    answering = Answering(pair, alignments, cases, **OPTIONS)
    for number, case in enumerate(cases):
        answers = answering.answer(number, PROMPTS, 5)
        mode = "dense" if case is DENSE else "sparse"
        options = {} if case is DENSE else {"method": case.method, "keep": 0.3, **SHORT}
        config = engine_config(mode=mode, draft_tokens=3, prefill_chunk=64, batch_size=1, audit=True, **options)
        results = Outrider(*pair, config, alignments).generate(PROMPTS, SamplingParams(max_new_tokens=5))
        assert answers.texts == [result.text for result in results]
        assert answers.tokens == sum(len(result.token_ids) for result in results)
        read = [(r.statistics.listed, r.statistics.cached) for r in results]
        assert answers.kept_fraction == pytest.approx(sum(x for x, _ in read) / sum(y for _, y in read))
        assert answers.agreement == (1 if case is DENSE else pytest.approx(sum(r.statistics.agreed for r in results) / 10))
        assert (answers.kept_fraction == 1) == (case is DENSE)


def test_what_prompts_share_is_read_once(pair, monkeypatch):
    """Cache rows equal those of a reading from scratch, and no token is read twice where the last prompt had it, too."""
    target, memory = pair[0], PromptMemory()
    forwarded: list[int] = []
    forward = type(target).forward

    def counted(self, tokens, *given, **options):
        forwarded.append(tokens.shape[1])
        return forward(self, tokens, *given, **options)

    monkeypatch.setattr(type(target), "forward", counted)

    def read(tokens: list[int], memory: PromptMemory) -> list[torch.Tensor]:
        cache = target.new_cache(1, 192)
        for start in range(0, len(tokens), 64):
            part = tokens[start : start + 64]
            memory.read(target, cache, torch.tensor([part]), start + len(part))
        assert int(cache.lengths) == len(tokens)
        return [x for layer in range(3) for x in (cache.keys(layer, len(tokens)), cache.values(layer, len(tokens)))]

    long = [i % 251 for i in range(180)]
    for tokens, fresh in (
        (long, 180),
        ([*long[:100], 7, 7, 7], 3),  # ends inside the second chunk
        (long, 80),
        (long[:50], 0),
        (long, 0),
        ([9, *long[1:150]], 150),
        (long[:1], 1),
    ):
        forwarded.clear()
        found = read(tokens, memory)
        assert sum(forwarded) == fresh
        for a, b in zip(found, read(tokens, PromptMemory()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_fails_is_no_answer(pair, alignments, monkeypatch):
    answering = Answering(pair, alignments, [DENSE], **OPTIONS)
    forward = type(pair[0]).forward

    def broken(self, *given, **options):
        output = forward(self, *given, **options)
        return replace(output, logits=torch.full_like(output.logits, float("nan")))

    monkeypatch.setattr(type(pair[0]), "forward", broken)
    with pytest.raises(EngineError, match="dense: the target's logits are not finite numbers"):
        answering.answer(0, PROMPTS[:1], 4)


def test_what_engines_refuse(pair, alignments):
    with pytest.raises(OptionError, match="method: got 'magic'; allowed: dense, outrider, sts, specattn"):
        Answering(pair, alignments, [Case(method="magic")], **OPTIONS)
    with pytest.raises(OptionError, match="alignment: got None"):
        Answering(pair, None, [CASES[0]], **OPTIONS)
    Answering(pair, None, [DENSE], **OPTIONS)
    with pytest.raises(OptionError, match="score-keys: got '4bit'"):
        Answering(pair, alignments, [CASES[0]], **(OPTIONS | {"score_keys": "4bit"}))


class TestRuler:
    def test_rows(self, pair, alignments, book):
        options = {"context": 600, "families": ("single", "multi-value"), "samples": 1, "style": "facts", "draft_tokens": 3}
        text = Text(name="book", text=book[:9000])
        rows = list(ruler_task.evaluate(pair, alignments, [text], [DENSE, CASES[0]], **options))
        assert [(row.part, row.text, row.method, row.asked) for row in rows] == [
            (family, "book 1", method, asked)
            for family, asked in (("single", 1), ("multi-value", 4))
            for method in ("dense", "outrider")
        ]
        for row in rows:
            assert (row.task, row.scored_tokens) == ("ruler", 8 * row.asked) and 0 <= row.recalled <= row.asked
            assert row.agreement == row.kept_fraction == 1 if row.method == "dense" else 0.3 <= row.kept_fraction < 0.31
        assert rows[0].conditions["style"] == "facts" and rows[0].conditions["seed"] == 0

    def test_the_built_in_pair_finds_needles(self, builtin_pair, builtin_alignment, book):
        case = Case(method="outrider", budget=Budget(keep=0.2, min_context=256))
        options = {"context": 1200, "families": ("multi-key",), "samples": 1, "style": "facts"}
        text = Text(name="book", text=book)
        rows = list(ruler_task.evaluate(builtin_pair, builtin_alignment, [text], [DENSE, case], **options))
        assert [row.recalled for row in rows] == [1, 1]

    def test_refused_before_any_work(self, pair, alignments, book):
        text = Text(name="book", text=book[:3000])
        for options, says in (
            ({"context": 9000}, "context: got 9000; allowed: 2 .. 4096"),
            ({"context": 200}, "context: got 200; allowed: at least"),
            ({"context": 600, "families": ("needles",)}, "family: got 'needles'; allowed: single"),
            ({"context": 600, "samples": 0}, "samples: got 0"),
        ):
            with pytest.raises(OptionError, match=says):
                ruler_task.evaluate(pair, alignments, [text], [DENSE], **options)  # not even iterated
        with pytest.raises(PromptError, match=r"text book: fills .* allowed: at least 4000"):
            ruler_task.evaluate(pair, alignments, [text], [DENSE], context=4000)


class TestQuestions:
    DOCUMENTS = (
        Document(
            name="tales 1",
            context="Once there was a king.\n\nHe had a stone.",
            asked=(
                Asked(question="Who had a stone?", answers=("a king", "the king")),
                Asked(question="When?", answers=("once",)),
            ),
        ),
        Document(name="tales 2", context="A giant slept.", asked=(Asked(question="Who slept?", answers=("a giant",)),)),
    )

    def test_rows_score_what_was_answered(self, pair, alignments, monkeypatch):
        texts = iter(["The king", "twice", " a giant slept"])
        answer = Answering.answer
        prompts: list[list[str]] = []

        def scripted(self, number, asked, new_tokens, stop):
            prompts.append(list(asked))
            return replace(answer(self, number, asked, new_tokens, stop), texts=[next(texts) for _ in asked])

        monkeypatch.setattr(Answering, "answer", scripted)
        rows = list(qa_task.evaluate(pair, alignments, list(self.DOCUMENTS), [DENSE], context=400, max_new_tokens=5))
        assert [(row.task, row.text, row.asked) for row in rows] == [("qa", "tales 1", 2), ("qa", "tales 2", 1)]
        assert [row.f1 for row in rows] == [0.5, pytest.approx(2 * 1 / 3)]
        assert [row.rouge_l for row in rows] == [0.5, pytest.approx(2 * 2 / 5)]
        assert prompts[0][1].endswith("Once there was a king.\n\nHe had a stone.\n\nQuestion: When?\nAnswer:")

    def test_answers_end_with_their_line(self, pair, alignments):
        rows = list(qa_task.evaluate(pair, alignments, list(self.DOCUMENTS), [DENSE, CASES[0]], context=400, max_new_tokens=5))
        assert [row.method for row in rows] == ["dense", "outrider"] * 2
        assert all(0 <= row.f1 <= 1 and row.scored_tokens <= 5 * row.asked and row.recalled is None for row in rows)

    def test_planted_documents_fill_the_context(self, pair, alignments, book, monkeypatch):
        seen: list[list[str]] = []
        answer = Answering.answer
        monkeypatch.setattr(Answering, "answer", lambda self, n, asked, *o: (seen.append(asked), answer(self, n, asked, *o))[1])
        options = {"context": 900, "max_new_tokens": 5, "plant_in": Text(name="book", text=book[:20000]), "seed": 3}
        rows = list(qa_task.evaluate(pair, alignments, list(self.DOCUMENTS), [DENSE], **options))
        assert rows[0].conditions["plant_in"] == "book" and rows[0].conditions["seed"] == 3
        count = counter(pair[0])
        for document, prompts in zip(self.DOCUMENTS, seen, strict=True):
            assert 870 <= max(map(count, prompts)) + 5 <= 900
            assert all(prompt.count(f"\n\n{document.context}\n\n") == 1 for prompt in prompts)
            assert len({prompt.split("\n\nQuestion: ")[0] for prompt in prompts}) == 1
        places = [prompts[0].index(d.context) / len(prompts[0]) for d, prompts in zip(self.DOCUMENTS, seen, strict=True)]
        assert len(set(places)) == 2
        first = seen[0]
        seen.clear()
        list(qa_task.evaluate(pair, alignments, list(self.DOCUMENTS[:1]), [DENSE], **(options | {"seed": 3})))
        assert seen[0] == first

    def test_long_documents_lose_their_middle(self, pair, alignments, monkeypatch):
        seen: list[str] = []
        answer = Answering.answer
        monkeypatch.setattr(Answering, "answer", lambda self, n, asked, *o: (seen.extend(asked), answer(self, n, asked, *o))[1])
        long = replace(self.DOCUMENTS[1], context=" ".join(f"word{n:03d}" for n in range(100)))
        options = {"context": 500, "max_new_tokens": 5, "truncate": True}
        rows = list(qa_task.evaluate(pair, alignments, [long, self.DOCUMENTS[1]], [DENSE], **options))
        words = [int(word) for word in re.findall(r"word(\d+)", seen[0])]
        assert 486 < counter(pair[0])(seen[0]) + 5 <= 500
        head = words.index(99) + 1 - (len(words) // 2)
        assert words == [*range(head), *range(100 - len(words) // 2, 100)] and head - len(words) // 2 in (0, 1)
        assert "A giant slept." in seen[1] and rows[0].conditions["truncate"] == "middle"

    def test_refused_before_any_work(self, pair, alignments, book):
        documents = list(self.DOCUMENTS)
        for options, error, says in (
            (
                {"context": 120, "max_new_tokens": 5},
                PromptError,
                r"tales 1: .* at most 115 \(.*\), or --truncate",
            ),
            ({"context": 120, "max_new_tokens": 5, "truncate": True}, PromptError, r"at most 115 \(context less answer\)$"),
            ({"context": 400, "max_new_tokens": 0}, OptionError, "max-new-tokens: got 0"),
            ({"context": 400, "max_new_tokens": 400}, OptionError, "context: got 400; allowed: more than max-new-tokens 400"),
            ({"context": 9000}, OptionError, "context: got 9000"),
            ({"context": 4000, "plant_in": Text(name="book", text=book[:900])}, PromptError, "--plant-in: too short"),
        ):
            with pytest.raises(error, match=says):
                qa_task.evaluate(pair, alignments, documents, [DENSE], **options)
