"""Sparse drafting: the draft's own lists, and rounds that use them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outrider.config import Budget, SamplingParams, engine_config
from outrider.decoding.drafting import Behind, DraftLists, propose
from outrider.decoding.sampling import Sampling
from outrider.errors import OptionError
from outrider.models import LayerShape, ModelSpec
from outrider.types import Selection

FULL = LayerShape(query_heads=4, kv_heads=2, head_dim=8, scale=1.0, window=None)
DRAFT = ModelSpec(
    name="draft",
    digest="0",
    layers=(FULL, replace(FULL, window=5), FULL),
    vocabulary=9,
    context=99,
    eos_tokens=(),
    dtype=torch.float32,
    device=torch.device("cpu"),
)
K = 3
SPARSE = {"drafting": "sparse", "draft_keep": 0.2, "draft_recent": 4}
TOKENS = SamplingParams(max_new_tokens=24)


def entries(lists, lengths, layer, row, head):
    selection = lists.steps(torch.tensor(lengths), 1)[0]
    indices, counts = selection.of(layer)
    return indices[row, head, : counts[row, head]].tolist()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(0, 2 * K + 1), st.data())
def test_lists_grow_by_what_comes_after(lengths, more, data):
    """Chosen tokens first, then every position since, the round's own among them; ascending, none twice."""
    lists = DraftLists(DRAFT, Budget(keep=0.5), len(lengths), 48, K)
    heads = 2 * 2 * len(lengths)
    chosen = [sorted(data.draw(st.sets(st.integers(0, n - 1)) if n else st.just(set()))) for n in lengths * 4][:heads]
    width = max(1, *map(len, chosen))
    at = iter(range(heads))
    order = [[[next(at) for _ in range(2)] for _ in lengths] for _ in range(2)]  # [layer][row][head]
    by_row = [
        [[sorted(x for x in chosen[i] if x < lengths[row]) for i in heads] for row, heads in enumerate(layer)]
        for layer in order
    ]
    padded = [[[one + [-1] * (width - len(one)) for one in row] for row in layer] for layer in by_row]
    lists.replace(
        Selection(
            layers=(0, 2),
            indices=torch.tensor(padded, dtype=torch.int32),
            counts=torch.tensor([[[len(one) for one in row] for row in layer] for layer in by_row], dtype=torch.int32),
            lengths=torch.tensor(lengths),
        )
    )
    now = [min(n + more, 48) for n in lengths]
    for number, layer in enumerate((0, 2)):
        for row, n in enumerate(lengths):
            for head in range(2):
                assert entries(lists, now, layer, row, head) == by_row[number][row][head] + list(range(n, now[row]))
    assert lists.steps(torch.tensor(now), 1)[0].of(1) == (None, None), "a window layer has no lists"


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(0, 12), st.data())
def test_lists_of_a_row_that_is_rolled_back_end_there_and_go_on(lengths, recent, data):
    lists = DraftLists(DRAFT, Budget(sinks=2, recent=recent), len(lengths), 48, K)
    lists.begin(torch.tensor(lengths))
    before = [entries(lists, lengths, 2, row, 1) for row in range(len(lengths))]
    now = [data.draw(st.integers(0, n + 1)) for n in lengths]  # a token more is no roll-back
    lists.truncate(torch.tensor(now))
    for more in (0, K + 1):
        for row, (n, old) in enumerate(zip(now, lengths, strict=True)):
            followed = list(range(min(n, old), n + more))
            assert entries(lists, [at + more for at in now], 2, row, 1) == [x for x in before[row] if x < n] + followed


@given(st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 12))
def test_lists_begin_with_sinks_and_recent_tokens(lengths, sinks, recent):
    lists = DraftLists(DRAFT, Budget(sinks=sinks, recent=recent), len(lengths), 48, K)
    lists.begin(torch.tensor(lengths))
    for row, n in enumerate(lengths):
        wanted = sorted({*range(min(sinks, n)), *range(max(n - recent, 0), n)})
        if n < sinks + recent:
            wanted = list(range(n))
        assert entries(lists, [length + 1 for length in lengths], 0, row, 1) == [*wanted, n]


def test_rows_share_storage_and_move():
    lists = DraftLists(DRAFT, Budget(sinks=1, recent=3), 3, 48, K)
    lists.rows(1, 2).begin(torch.tensor([20]))
    lists.move(1, 0)
    assert entries(lists, [21, 0, 0], 2, 0, 0) == [0, 17, 18, 19, 20]


@pytest.mark.parametrize("mode, method", [("dense", "outrider"), ("sparse", "outrider"), ("sparse", "specattn")])
def test_a_draft_that_keeps_everything_drafts_as_densely(mode, method, family, make_pair, generate, random_prompts):
    if method == "specattn" and family not in ("llama", "gemma3"):
        pytest.skip("scores kept apart by query are those of any family")
    if family == "mistral-window":
        pytest.skip("no layer has full attention")
    pair, prompts = make_pair(family), random_prompts([20, 33])
    dense = generate(pair, prompts, TOKENS, mode=mode, method=method)
    kept = generate(pair, prompts, TOKENS, mode=mode, method=method, drafting="sparse", draft_keep=1.0, draft_recent=64)
    assert [r.token_ids for r in kept] == [r.token_ids for r in dense]
    assert [r.statistics.accepted_at for r in kept] == [r.statistics.accepted_at for r in dense]


def test_dense_verification_stays_exact(make_pair, generate, random_prompts):
    """Law 3 holds however little the draft reads; it only drafts worse."""
    pair, prompts = make_pair("llama"), random_prompts([60, 9, 33])
    dense = generate(pair, prompts, TOKENS)
    sparse = generate(pair, prompts, TOKENS, batch_size=2, **(SPARSE | {"draft_recent": 0, "sinks": 0}))
    assert [r.token_ids for r in sparse] == [r.token_ids for r in dense]
    accepted = [sum(r.statistics.accepted for r in results) for results in (sparse, dense)]
    assert 0 < accepted[0] < accepted[1]
    assert {r.statistics.kept_fraction for r in sparse} == {1.0}


def test_the_draft_reads_lists_and_no_more(make_pair, make_engine, random_prompts, monkeypatch):
    """From the second round on a list has the share asked for, recent tokens among it, and all positions since."""
    target, draft = make_pair("llama")
    engine = make_engine((target, draft), mode="sparse", sinks=2, **SPARSE)
    seen = []
    forward = draft.forward

    def spy(tokens, cache, *, selection=None, **options):
        if tokens.shape[1] == 1 and selection is not None:
            seen.append((int(cache.lengths[0]), selection.counts.clone(), selection.indices.clone()))
        return forward(tokens, cache, selection=selection, **options)

    monkeypatch.setattr(draft, "forward", spy)
    [result] = engine.generate(random_prompts([100]), TOKENS)
    assert len(seen) == 4 * result.statistics.rounds
    for length, counts, indices in seen:
        kept = counts.flatten().tolist()
        assert max(kept) <= 0.2 * length + 2 * 4
        for row, count in zip(indices.flatten(0, 2), kept, strict=True):
            listed = row[:count].tolist()
            assert listed == sorted(set(listed)) and listed[:2] == [0, 1] and listed[-1] == length - 1
    assert max(seen[-1][1].flatten().tolist()) > 2 + 4 + 8, "not sinks and recent tokens alone"


@pytest.mark.parametrize("slots", [3, 8])
def test_a_row_of_a_batch_equals_the_row_alone(slots, make_pair, make_engine, random_prompts):
    """Law 7 with refilled slots and idle rows, one of them being filled: lists move with their rows."""
    prompts = random_prompts([50, 9, 33, 60, 21, 40, 12])
    params = [
        SamplingParams(max_new_tokens=n, temperature=t, seed=s)
        for s, (n, t) in enumerate([(9, 0), (18, 1), (12, 0), (24, 1), (8, 0), (15, 0), (3, 1)])
    ]
    engine = make_engine(make_pair("qwen3"), mode="sparse", batch_size=slots, prefill_chunk=16, **SPARSE)
    together = engine.generate(prompts, params)
    for prompt, one, result in zip(prompts, params, together, strict=True):
        [alone] = engine.generate([prompt], one)
        assert alone.token_ids == result.token_ids
        assert alone.statistics.accepted_at == result.statistics.accepted_at


@pytest.mark.parametrize(
    "options, message",
    [
        ({"drafting": "some"}, "drafting: got 'some'; allowed: auto, dense, sparse"),
        ({"draft_keep": 0.0}, "draft-keep: got 0.0; allowed: a number in"),
        ({"draft_recent": -1}, "draft-recent: got -1; allowed: a whole number >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        engine_config(**options)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_token_that_is_lacking_is_read_first(family, temperature, make_pair, random_prompts):
    """Rows that lack one, rows that do not and an empty one, side by side: drafted tokens, distributions, queries and what is
    cached are those of a draft that lacks none. Behind what is cached lies what must not be read."""
    _, draft = make_pair(family)
    draft = draft.with_backend("reference")
    lengths, lacking, spoilt = torch.tensor([30, 41, 0, 30]), torch.tensor([1, 0, 0, 1]), 1e4
    [text] = random_prompts([64])
    tokens = torch.tensor([text, text[::-1], text, text[::-1]])
    caches = [draft.new_cache(4, 64) for _ in range(2)]
    for cache in caches:
        draft.forward(tokens[:, :41], cache, logits=False)
    caches[0].advance(lengths)
    caches[1].advance(lengths - lacking)
    for layer in range(len(draft.spec.layers)):
        for row, cached in enumerate((lengths - lacking).tolist()):
            caches[1].keys(layer)[row, cached:] = caches[1].values(layer)[row, cached:] = spoilt
    pending, previous = tokens.gather(1, lengths[:, None])[:, 0], tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    sampling = Sampling.of([SamplingParams(temperature=temperature)] * 4)
    drafting = pending, sampling, torch.rand(4, K, generator=torch.Generator().manual_seed(3)).double(), draft.spec.vocabulary
    whole = propose(draft, caches[0], *drafting)
    late = propose(draft, caches[1], *drafting, behind=Behind(previous, lengths))
    assert torch.equal(late.tokens, whole.tokens)
    assert torch.equal(caches[1].lengths, caches[0].lengths)
    given = [*late.queries, *(late.probs,)] if temperature else [*late.queries]
    wanted = [*whole.queries, *(whole.probs,)] if temperature else [*whole.queries]
    for layer in range(len(draft.spec.layers)):
        for row, cached in enumerate(caches[0].lengths.tolist()):
            given += [caches[1].keys(layer)[row, :cached], caches[1].values(layer)[row, :cached]]
            wanted += [caches[0].keys(layer)[row, :cached], caches[0].values(layer)[row, :cached]]
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    caches[1].truncate(lengths)
    unscored = propose(draft, caches[1], *drafting, behind=Behind(previous, lengths), scored=False)
    assert torch.equal(unscored.tokens, whole.tokens) and unscored.queries == ()
    assert torch.equal(caches[1].lengths, lengths + K), "the last drafted token is lacking now"


@pytest.mark.parametrize("mode, drafting", [("dense", "dense"), ("exact", "dense"), ("exact", "sparse")])
def test_a_draft_that_is_its_target_is_never_wrong(mode, drafting, make_pair, make_engine, random_prompts):
    """Each round that passes whole leaves its last token out of the draft's cache, and each next one would be wrong without it.
    A prompt of one token has nothing cached."""
    target, _ = make_pair("llama")
    options = {"keep": 1.0, "draft_keep": 1.0, "min_context": 16}
    engine = make_engine((target, target), mode=mode, drafting=drafting, draft_tokens=K, **options)
    params = SamplingParams(max_new_tokens=50, ignore_eos=True)
    alone = make_engine((target, target), mode="plain").generate(prompts := random_prompts([1, 40, 23]), params)
    for result, plain in zip(engine.generate(prompts, params), alone, strict=True):
        counted = result.statistics
        assert result.token_ids == plain.token_ids
        assert counted.accepted == counted.drafted > 0 and counted.rolled_back == 0
