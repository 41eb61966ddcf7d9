"""The laws of the guard: who only watches changes nothing, who falls back is the dense target, neighbours do not matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from outrider import Outrider
from outrider.config import SamplingParams, engine_config
from outrider.decoding.audits import Audits
from outrider.decoding.guard import WINDOW
from outrider.decoding.statistics import total
from outrider.guidance.selectors.outrider import Outrider as Selector

BOOKS = Path(__file__).parents[2] / "examples" / "books"
STARVED = {"mode": "sparse", "keep": 0.005, "sinks": 0, "recent": 0}  # one listed token, or two
SETTINGS = [{}, {"temperature": 0.8}, {"temperature": 1.1, "top_p": 0.7, "top_k": 12}]
LENGTHS = [23, 1, 40, 2, 31, 11]  # more than slots; some below the shortest context of a sparse round (8)
COUNTED = ("rounds", "accepted_at", "audits", "audited_positions", "budget_raised", "budget_lowered", "fell_back_at")


def tokens(results):
    return [result.token_ids for result in results]


def params_for(lengths, count=24):
    return [SamplingParams(max_new_tokens=count + i % 5, seed=100 + i, **SETTINGS[i % 3]) for i in range(len(lengths))]


def check_continuation(result, prompt, dense):
    """From where it fell back on a greedy text is what the dense target makes of the text until there."""
    at = result.statistics.fell_back_at
    [wanted] = dense.generate([prompt + result.token_ids[:at]], SamplingParams(max_new_tokens=len(result.token_ids) - at))
    assert result.token_ids[at:] == wanted.token_ids and wanted.token_ids


@pytest.mark.parametrize("family", ["llama", "gemma3"])  # layers with lists alone, and between others with a window
def test_who_only_watches_changes_nothing(family, make_pair, generate, random_prompts):
    pair, prompts, params = make_pair(family), random_prompts(LENGTHS), params_for(LENGTHS)
    watched = generate(pair, prompts, params, guard_every=2, guard_tolerance=1.0, batch_size=3, **STARVED)
    plain = generate(pair, prompts, params, batch_size=3, **STARVED)
    assert tokens(watched) == tokens(plain)
    counted = total([result.statistics for result in watched])
    assert counted.audits > 0 and counted.disagreement > 0.2 and 0 <= counted.recalled_mass < 0.9
    assert counted.audited_positions == counted.audits * 4
    assert counted.bytes_read > total([result.statistics for result in plain]).bytes_read


@pytest.mark.parametrize("options", [{"unlisted": "mean"}, {"kv_dtype": "fp8"}, {"draft_tokens": 17}, {"method": "specattn"}],
                         ids=str)  # fmt: skip
def test_whatever_the_options(options, make_pair, generate, random_prompts):
    pair, prompts, params = make_pair("qwen3"), random_prompts([40, 25]), SamplingParams(max_new_tokens=16)
    given = STARVED | {"guard_every": 1, "guard_tolerance": 1.0} | options
    watched, plain = (generate(pair, prompts, params, **chosen) for chosen in (given, given | {"guard_every": None}))
    assert tokens(watched) == tokens(plain)
    assert total([result.statistics for result in watched]).disagreement > 0.2


@pytest.mark.parametrize("setting", SETTINGS[::2], ids=str)
def test_law_1_all_listed_nothing_differs(setting, method, make_pair, generate, random_prompts):
    results = generate(make_pair("llama"), random_prompts([40, 25]), SamplingParams(max_new_tokens=16, **setting),
                       mode="sparse", method=method, keep=0.9999, guard_every=2)  # fmt: skip
    for result in results:
        counted = result.statistics
        assert counted.audits == counted.rounds // 2
        assert counted.disagreement == pytest.approx(0, abs=1e-4) and counted.recalled_mass == pytest.approx(1)
        assert counted.budget_raised == 0


@pytest.mark.parametrize("method", ["outrider", "sts", "dustin"])  # lists per KV head, per query head, one for all heads
def test_figures_of_an_audit_by_their_definition(method, make_pair, make_engine, random_prompts, monkeypatch):
    """Against an ordinary dense forward, a softmax in fp64 over its queries and keys, and distributions one by one; what stays
    is what a sparse forward alone leaves."""
    verify, checked = Audits.verify, []

    def check(self, cache, drafted, inputs, lists):
        spec, tokens = self._target.spec, torch.cat([inputs.pending[:, None], drafted], dim=1)
        dense = self._target.forward(tokens, cache, record_queries=True)
        dense_keys = [cache.keys(layer).clone() for layer in range(len(spec.layers))]
        sparse = self._target.forward(tokens, cache, selection=lists).logits
        stored = [part(layer).clone() for layer in range(len(spec.layers)) for part in (cache.keys, cache.values)]
        logits, figures = verify(self, cache, drafted, inputs, lists)
        torch.testing.assert_close(logits, sparse, rtol=1e-4, atol=1e-5)
        left = [part(layer) for layer in range(len(spec.layers)) for part in (cache.keys, cache.values)]
        for found, wanted in zip(left, stored, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        rows = (inputs.audited > 0) & (cache.lengths >= self._least)
        assert figures[:, -1].tolist() == rows.tolist()
        for row in rows.nonzero()[:, 0].tolist():
            length, shares, done = int(cache.lengths[row]), [], int(inputs.audited[row]) - 1
            for layer in lists.layers[done % min(WINDOW, len(lists.layers)) :: WINDOW]:
                indices, counts = (x[row] for x in lists.of(layer))
                queries, keys = dense.queries[layer][row].double(), dense_keys[layer][row].double()
                heads = queries.shape[1]
                for owner in range(len(counts)):
                    held = whole = 0.0
                    for head in range(owner * heads // len(counts), (owner + 1) * heads // len(counts)):
                        seen = keys[:, head * keys.shape[1] // heads]
                        for t, query in enumerate(queries[:, head]):
                            mass = (seen[: length + t + 1] @ query * spec.layers[layer].scale).softmax(-1)
                            held += float(mass[indices[owner, : counts[owner]].long()].sum())
                            whole += float(mass[:length].sum())
                    shares.append(held / whole)
            *differences, recalled, kept, _ = figures[row].tolist()
            assert recalled == pytest.approx(sum(shares) / len(shares), rel=1e-3)
            assert kept == pytest.approx(lists.counts[:, row].double().mean().item() / length)
            temperature = inputs.sampling.temperature[row]
            for found, one, other in zip(differences, logits[row], dense.logits[row], strict=True):
                if temperature == 0:
                    assert found == float(one.argmax() != other.argmax())
                else:
                    p, q = ((x.double() / temperature).softmax(-1) for x in (one, other))
                    assert found == pytest.approx(float((p - q).abs().sum() / 2), abs=1e-4)
            checked.append(row)
        return logits, figures

    monkeypatch.setattr(Audits, "verify", check)
    params = [SamplingParams(max_new_tokens=12, temperature=t) for t in (0.0, 0.9, 0.0)]
    engine = make_engine(make_pair("qwen2"), mode="sparse", method=method, keep=0.2, guard_every=2, guard_tolerance=1.0)
    results = engine.generate(random_prompts([30, 41, 6]), params)
    assert len(checked) == total([result.statistics for result in results]).audits > 5


@pytest.mark.parametrize("options", [{}, {"drafting": "dense"}, {"keep": None, "top_p": 0.05}], ids=str)
def test_who_falls_back_goes_on_as_the_dense_target(options, make_pair, make_engine, random_prompts):
    """By a random alignment; keys that sparse rounds have written are written anew."""
    pair, prompts = make_pair("llama"), random_prompts([40, 33, 25], seed=2)
    given = {name: value for name, value in (STARVED | options).items() if value is not None}
    engine = make_engine(pair, guard_every=2, batch_size=2, **given)
    dense = make_engine(pair)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=90))
    assert all(result.statistics.budget_raised for result in results)
    fallen = [(result, prompt) for result, prompt in zip(results, prompts, strict=True) if result.statistics.fallbacks]
    assert len(fallen) >= 2
    for result, prompt in fallen:
        assert result.statistics.fell_back_at < 80
        check_continuation(result, prompt, dense)


def test_law_7_a_row_of_a_batch_equals_the_row_alone(make_pair, make_engine, random_prompts):
    """Some rows fall back while others go on; what a row reads follows from its own audits."""
    engine = make_engine(make_pair("qwen2"), guard_every=2, batch_size=3, **STARVED)
    prompts, params = random_prompts(LENGTHS), params_for(LENGTHS, count=40)
    params[2] = replace(params[2], max_new_tokens=12)
    together = engine.generate(prompts, params)
    for prompt, own, result in zip(prompts, params, together, strict=True):
        [single] = engine.generate([prompt], [own])
        assert (result.token_ids, result.text) == (single.token_ids, single.text)
        for name in COUNTED:
            assert getattr(result.statistics, name) == getattr(single.statistics, name), name
        assert result.statistics.differed == pytest.approx(single.statistics.differed, abs=1e-3)
        assert result.statistics.recalled == pytest.approx(single.statistics.recalled, abs=1e-3)
    counted = total([result.statistics for result in together])
    assert 0 < counted.fallbacks < len(prompts)


def test_streaming_goes_on(make_pair, make_engine, random_prompts):
    engine = make_engine(make_pair("llama"), guard_every=2, **STARVED)
    prompts, params = random_prompts([40, 33]), SamplingParams(max_new_tokens=60)
    found = {0: [], 1: []}
    for chunk in engine.stream(prompts, params):
        found[chunk.index] += chunk.token_ids
        assert chunk.statistics.generated_tokens == len(found[chunk.index])
    assert list(found.values()) == tokens(engine.generate(prompts, params))


@pytest.fixture
def lost(monkeypatch):
    """Lists of method outrider name tokens drawn at random, as many as ever; the draft's own are as they are."""
    select = Selector.select

    def at_random(self, scores, shares=None):
        if self.budget.recent == 0:
            generator = torch.Generator().manual_seed(int(scores.lengths[0]))
            scores = replace(scores, mass=torch.rand(scores.mass.shape, generator=generator))
        return select(self, scores, shares)

    monkeypatch.setattr(Selector, "select", at_random)


@pytest.fixture(scope="module")
def builtin(builtin_pair, builtin_alignment):
    """`builtin(**options)`: an engine over the pair that ships with Outrider, with its alignment."""
    return lambda **options: Outrider(*builtin_pair, engine_config(**options), builtin_alignment)


def test_a_lost_guide_is_found_out_within_four_audits(lost, builtin, book):
    text = builtin(mode="dense").tokenize(book)
    prompts = [text[2000:3300], text[9000:10100]]
    engine = builtin(mode="sparse", sinks=0, recent=0, guard_every=2)
    results = engine.generate(prompts, SamplingParams(max_new_tokens=100))
    dense = builtin(mode="dense")
    for prompt, result in zip(prompts, results, strict=True):
        counted = result.statistics
        assert (counted.budget_raised, counted.fallbacks) == (2, 1)
        assert counted.audits <= 2 * 4, "four to read twice as much, four more to read everything"
        check_continuation(result, prompt, dense)


@pytest.mark.parametrize("title", ["persuasion", "the-age-of-innocence"])
def test_a_good_guide_gives_no_alarm(title, builtin):
    engine = builtin(mode="sparse", guard_every=1)
    text = engine.tokenize((BOOKS / f"{title}.txt").read_text(encoding="utf-8"))
    prompts = [text[start : start + 1100] for start in (3000, 12000)]
    params = [SamplingParams(max_new_tokens=50), SamplingParams(max_new_tokens=50, temperature=1.0)]
    for result in engine.generate(prompts, params):
        counted = result.statistics
        assert counted.audits == counted.rounds and counted.budget_raised == 0
        assert counted.disagreement < 0.2 and counted.recalled_mass > 0.45
