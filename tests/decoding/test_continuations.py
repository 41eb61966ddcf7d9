"""Continuations are scored as the target would write them: densely as transformers does, sparsely in rounds behind a prefix."""

from __future__ import annotations

import pytest
import torch

from outrider.decoding.continuations import Continuation, Score, Scorer
from outrider.decoding.teacher_forced import TeacherForced

CONTEXTS = [40, 25, 40, 1]  # tokens; the first and the third context are the same
WANTED = [7, 1, 12, 5]


@pytest.fixture(scope="module")
def pair(make_pair):
    return make_pair("llama")


@pytest.fixture(scope="module")
def continuations(random_prompts) -> list[Continuation]:
    contexts, wanted = random_prompts(CONTEXTS), random_prompts(WANTED, seed=1)
    contexts[2] = contexts[0]
    return [Continuation.of(i, *both) for i, both in enumerate(zip(contexts, wanted, strict=True))]


@pytest.fixture(scope="module")
def scores(make_engine, pair, continuations):
    """`scores(**options)`: of all continuations, in order."""

    def run(**options) -> list[Score]:
        found = {one.index: score for one, score in Scorer(make_engine(pair, **options)).score(continuations)}
        return [found[one.index] for one in continuations]

    return run


def logprobs(scores: list[Score]) -> list[float]:
    return [score.logprob for score in scores]


@pytest.mark.parametrize("mode", ["plain", "dense"])
@pytest.mark.parametrize("chunk", [4, 2048])
def test_dense_scores_are_those_of_transformers(independent, pair, continuations, scores, mode, chunk):
    module = independent(pair[0])
    for one, score in zip(continuations, scores(mode=mode, prefill_chunk=chunk), strict=True):
        tokens = torch.tensor([[*one.prefix, *one.given]])
        with torch.inference_mode():
            logits = module(input_ids=tokens, use_cache=False).logits[0, len(one.prefix) :]
        wanted = torch.tensor(one.wanted)
        expected = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
        assert score.logprob == pytest.approx(float(expected), rel=1e-4)
        assert score.is_greedy == bool((logits.argmax(-1) == wanted).all())
        assert score.statistics.kept_fraction == 1


def test_what_greedy_decoding_writes_is_greedy(make_engine, alone, pair, random_prompts):
    [prompt] = random_prompts([30])
    written = alone(pair[0], prompt, 9)
    other = [*written[:-1], (written[-1] + 1) % 97]
    scorer = Scorer(make_engine(pair))
    found = scorer.score([Continuation.of(0, prompt, written), Continuation.of(1, prompt, other)])
    assert {one.index: score.is_greedy for one, score in found} == {0: True, 1: False}


def test_keeping_everything_changes_nothing(scores, method):
    sparse = scores(mode="sparse", method=method, keep=1.0, min_context=1)
    assert logprobs(sparse) == pytest.approx(logprobs(scores(mode="dense")), rel=1e-5)
    assert {score.statistics.method for score in sparse} == {method}


def test_sparse_scores_are_those_of_rounds_behind_the_prefix(make_engine, pair, continuations, scores, method):
    options = {"mode": "sparse", "method": method, "keep": 0.2, "recent": 2}
    sparse, dense = scores(**options), scores(mode="dense")
    selector = Scorer(make_engine(pair, **options)).selector
    for one, score, exact in zip(continuations, sparse, dense, strict=True):
        reader = TeacherForced(pair, 64, 3)
        reader.read([list(one.prefix)], 2048)
        [run] = reader.run([one.given], selector, 8)
        expected = run.logits.log_softmax(-1)[range(len(one.wanted)), one.wanted].sum()
        assert score.logprob == pytest.approx(float(expected), rel=1e-5)
        assert score.statistics.kept_fraction == pytest.approx(run.kept_fraction)
        assert score.statistics.kv_read_fraction == pytest.approx(run.kv_read_fraction)
        assert (score.logprob != exact.logprob) == (len(one.prefix) >= 8)  # else no round is behind min_context tokens


def test_short_contexts_are_dense_in_mode_sparse(scores):
    short = scores(mode="sparse", min_context=1024)
    assert logprobs(short) == logprobs(scores(mode="dense"))
    assert {score.statistics.kept_fraction for score in short} == {1}


def test_a_shared_context_is_read_once(make_engine, pair, continuations, monkeypatch):
    read, original = [], TeacherForced.read

    def counted(self, documents, chunk):
        read.extend(map(len, documents))
        original(self, documents, chunk)

    monkeypatch.setattr(TeacherForced, "read", counted)
    order = [one.index for one, _ in Scorer(make_engine(pair, mode="sparse")).score(continuations)]
    assert (order, read) == ([0, 2, 1, 3], [39, 24, 0])


def test_nothing_to_score(make_engine, pair):
    assert list(Scorer(make_engine(pair)).score([])) == []
