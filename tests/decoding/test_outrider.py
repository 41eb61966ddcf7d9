"""The public face: prompts in, results and chunks out; what it refuses, and how it says so."""

from __future__ import annotations

import doctest

import pytest

import outrider.decoding.outrider
from outrider.config import Budget, EngineConfig, SamplingParams, engine_config
from outrider.decoding.outrider import Outrider
from outrider.errors import AlignmentError, OptionError, OutriderError, PromptError

FEW = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(text_pair, make_engine):
    return make_engine(text_pair, batch_size=2)


def test_text_and_token_ids_are_the_same_prompt(engine, byte_tokenizer):
    text = "Once upon a time"
    ids = byte_tokenizer(text)["input_ids"]
    [one], [other], both = engine.generate(text, FEW), engine.generate(ids, FEW), engine.generate([text, ids], FEW)
    assert one.token_ids == other.token_ids == both[0].token_ids == both[1].token_ids
    assert one.text == byte_tokenizer.decode(one.token_ids)


def test_prompt_of_one_token(engine):
    [result] = engine.generate([[65]], FEW)
    assert len(result.token_ids) == 6
    assert result.statistics.seconds["prefill"] >= 0


def test_default_params_and_one_for_all(engine):
    assert len(engine.generate("abc")[0].token_ids) == SamplingParams().max_new_tokens
    assert [len(r.token_ids) for r in engine.generate(["a", "b"], FEW)] == [6, 6]


def test_chunks_add_up_to_the_results(engine):
    prompts = ["one", "another prompt", "a third", "x"]
    params = [SamplingParams(max_new_tokens=n) for n in (3, 9, 5, 7)]
    chunks = list(engine.stream(prompts, params))
    results = engine.generate(prompts, params)
    for index, result in enumerate(results):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert "".join(chunk.text for chunk in own) == result.text
        assert [token for chunk in own for token in chunk.token_ids] == result.token_ids
        assert [chunk.result is None for chunk in own] == [True] * (len(own) - 1) + [False]
        assert own[-1].result.text == result.text
        assert own[-1].result.finish_reason == "length"


def test_stream_checks_before_it_starts(engine):
    with pytest.raises(PromptError):
        engine.stream(["good", ""], FEW)


@pytest.mark.parametrize(
    "prompts, message",
    [
        pytest.param("", "empty", id="empty text"),
        pytest.param([[]], "empty", id="no tokens"),
        pytest.param(["good", ""], "empty", id="one of two is empty"),
        pytest.param([], "none", id="no prompts"),
        pytest.param(None, "allowed: a text", id="None"),
        pytest.param([[1, 257]], "257.*0 .. 256", id="token past the vocabulary"),
        pytest.param([[1, -1]], "-1.*0 .. 256", id="negative token"),
        pytest.param([[1, 2.0]], "2.0", id="float token"),
        pytest.param([[1, True]], "True", id="bool token"),
        pytest.param([5, "text"], "5", id="numbers and texts mixed"),
        pytest.param([["text"]], "text", id="text as a token"),
        pytest.param([None], "None", id="a prompt that is None"),
    ],
)
def test_bad_prompts(engine, prompts, message):
    with pytest.raises(PromptError, match=message):
        engine.generate(prompts, FEW)


def test_text_needs_a_tokenizer(make_pair, make_engine):
    with pytest.raises(PromptError, match=r"'tiny-llama' has no tokenizer; allowed: lists of token ids"):
        make_engine(make_pair("llama")).generate("text", FEW)


def test_context_is_the_limit(engine):
    prompt = [65] * 500
    assert len(engine.generate([prompt], SamplingParams(max_new_tokens=12))[0].token_ids) == 12
    with pytest.raises(PromptError, match=r"prompt 1: 500 tokens \+ max-new-tokens 13; allowed: at most 512"):
        engine.generate([[65], prompt], SamplingParams(max_new_tokens=13))


def test_number_of_params_must_fit(engine):
    with pytest.raises(OptionError, match=r"params: got '2 SamplingParams'.*3 prompts"):
        engine.generate(["a", "b", "c"], [FEW, FEW])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kep": 0.1}, "option: got 'kep'; allowed: .*keep.*"),
        ({"budget": Budget()}, "option: got 'budget'"),
        ({"keep": 0}, "keep: got 0; allowed: a number in"),
        ({"keep": 1.5}, "keep: got 1.5"),
        ({"keep": "0.1"}, "keep: got '0.1'"),
        ({"top_p": -0.1}, "top-p: got -0.1"),
        ({"top_p": float("nan")}, "top-p: got nan"),
        ({"keep": 0.1, "top_p": 0.9}, "keep and top-p.*only one"),
        ({"mode": "exactly"}, "mode: got 'exactly'; allowed: plain, dense, sparse"),
        ({"draft_tokens": 0}, r"K \(draft-tokens\): got 0; allowed: a whole number >= 1"),
        ({"draft_tokens": 2.0}, "draft-tokens"),
        ({"batch_size": 0}, "batch-size: got 0"),
        ({"prefill_chunk": 0}, "prefill-chunk: got 0"),
        ({"backend": "magic"}, "backend: got 'magic'; allowed: auto, reference, triton, cuda"),
        ({"sinks": -1}, "sinks: got -1"),
        ({"recent": True}, "recent: got True"),
        ({"min_context": 1.5}, "min-context: got 1.5"),
    ],
)
def test_bad_options_name_what_came_and_what_is_allowed(options, message):
    with pytest.raises(OptionError, match=message):
        engine_config(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max-new-tokens: got 0"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_k": -1}, "sampling top-k: got -1"),
        ({"top_p": 0.0}, "sampling top-p: got 0.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**63}, "seed: got"),
        ({"stop": ("a", "")}, "stop: got"),
    ],
)
def test_bad_sampling_params(options, message):
    with pytest.raises(OptionError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_unknown_method_is_refused_in_every_mode(mode, text_pair, engine):
    with pytest.raises(OptionError, match=r"method: got 'magic'; allowed: outrider, sts, specattn, dustin, oracle"):
        Outrider.load("nowhere", "nowhere", mode=mode, method="magic")
    with pytest.raises(OptionError, match=r"method: got 'magic'; allowed: outrider, sts, specattn, dustin, oracle"):
        engine.with_options(mode=mode, method="magic")


def test_unknown_map_names_those_present(text_pair, align):
    with pytest.raises(AlignmentError, match=r"'joint[+]magic'; allowed .*joint[+]divergence"):
        Outrider(*text_pair, engine_config(mode="sparse"), align(*text_pair), "joint+magic")


def test_sparse_without_an_alignment_says_how_to_make_one(text_pair):
    with pytest.raises(OptionError, match=r"alignment: got None; allowed: .*outrider calibrate"):
        Outrider(*text_pair, engine_config(mode="sparse"))


def test_with_options_changes_only_what_is_named(engine):
    sparse = engine.with_options(mode="sparse", top_p=0.9)
    assert (sparse.config.mode, sparse.config.budget.top_p, sparse.config.budget.keep) == ("sparse", 0.9, None)
    assert (sparse.config.batch_size, sparse.config.budget.sinks) == (2, 2)
    assert sparse.with_options(keep=0.5).config.budget.top_p is None
    assert (sparse.target, sparse.draft, sparse.alignments) == (engine.target, engine.draft, engine.alignments)
    assert engine.config.mode == "dense"


def test_default_configuration():
    config = engine_config()
    assert config == EngineConfig()
    assert (config.mode, config.method, config.budget.keep, config.budget.sinks, config.budget.recent) == (
        "sparse",
        "outrider",
        0.1,
        4,
        64,
    )


def test_errors_are_standard_errors_too():
    for error in (OptionError("a", 1, "b"), PromptError("x")):
        assert isinstance(error, OutriderError)
        assert isinstance(error, ValueError)


def test_examples_in_docstrings_run(builtin_pair):
    assert builtin_pair
    outcome = doctest.testmod(outrider.decoding.outrider)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_builtin_pair_runs_sparse_by_default(builtin_alignment, book):
    engine = Outrider.load()
    assert engine.alignments.text_digest == builtin_alignment.text_digest
    [result] = engine.generate(book[5000:12000], SamplingParams(max_new_tokens=8, ignore_eos=True))
    assert result.statistics.prompt_tokens > 1100, "longer than min_context"
    assert 0.09 < result.statistics.kept_fraction < 0.12
    assert result.text
