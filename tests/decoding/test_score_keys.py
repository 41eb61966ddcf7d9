"""Scoring from keys in few bits: rounds that use them, and records that are those of the cache whatever rows went through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from outrider.config import SamplingParams, engine_config
from outrider.decoding.runner import Runner
from outrider.decoding.scoring import score
from outrider.decoding.statistics import ReadCounter
from outrider.errors import OptionError
from outrider.models import quantized_keys
from outrider.models.quantized_keys import QuantizedKeys, code_bits, coded_bytes
from outrider.ops.quantized_keys.layout import coded_blocks

WIDE = {"head_dim": 64, "num_hidden_layers": 2}  # codes of 2 bits need such heads; a layer has 2 of them for keys
CODES = ("4bit", "2bit")
TOKENS = SamplingParams(max_new_tokens=12)
MODES = [("sparse", "dense"), ("sparse", "sparse"), ("dense", "sparse")]


def tokens_of(results):
    assert {result.error for result in results} == {None}
    return [result.token_ids for result in results]


@pytest.fixture
def checked(monkeypatch):
    """How many blocks were compared: after every sparse round all records are those that a fresh `fill` would write."""
    compared = [0]
    run = Runner.run_stages

    def run_and_check(self, kind, clock, **options):
        before = self.caches[0].lengths.clone()
        outcome = run(self, kind, clock, **options)
        if kind.sparse and self.quantized is not None:
            after = self.caches[1].lengths.clone()
            self.caches[1].lengths.copy_(before)  # those that were scored
            fresh = QuantizedKeys(self.draft, self.quantized.layers, self.quantized.bits, self.slots, self.capacity)
            fresh.fill(self.caches[1])
            self.caches[1].lengths.copy_(after)
            for row in sorted(self._begun):
                coded = int(coded_blocks(before[row]))
                assert torch.equal(self.quantized.records[:, row, :, :coded], fresh.records[:, row, :, :coded])
                compared[0] += coded
        return outcome

    monkeypatch.setattr(Runner, "run_stages", run_and_check)
    return compared


@pytest.mark.parametrize("mode, drafting, codes", [(*mode, "4bit") for mode in MODES] + [(*MODES[1], "2bit")])
def test_with_everything_kept_sparse_is_dense(mode, drafting, codes, make_pair, generate, random_prompts):
    """Law 1, seen through tokens."""
    pair, prompts = make_pair("llama", **WIDE), random_prompts([210, 150])
    dense = generate(pair, prompts, TOKENS)
    everything = {"keep": 1.0, "draft_keep": 1.0, "draft_recent": 512}
    kept = generate(pair, prompts, TOKENS, mode=mode, drafting=drafting, score_keys=codes, **everything)
    assert tokens_of(kept) == tokens_of(dense)
    assert [r.statistics.accepted_at for r in kept] == [r.statistics.accepted_at for r in dense]


@pytest.mark.parametrize("codes, method", [("4bit", "outrider"), ("4bit", "specattn"), ("2bit", "sts")])
def test_rounds_read_the_copy(codes, method, make_pair, generate, random_prompts):
    """Lists come from codes: the text is another one than with exact keys, and less was read for it."""
    pair, prompts = make_pair("llama", **WIDE), random_prompts([300])
    options = {"mode": "sparse", "drafting": "dense", "method": method, "keep": 0.05, "sinks": 0, "recent": 0}
    exact, few = (generate(pair, prompts, TOKENS, score_keys=keys, **options) for keys in ("exact", codes))
    assert tokens_of(exact) != tokens_of(few)
    assert few[0].statistics.kv_read_fraction < exact[0].statistics.kv_read_fraction


@pytest.mark.parametrize("drafting", ["dense", "sparse"])
def test_a_rival_leaves_scoring_to_the_draft(drafting, make_pair, generate, random_prompts):
    """Nobody scores for its lists: with a dense draft no keys are coded, with a sparse one those of the draft's own lists."""
    pair, prompts = make_pair("llama", **WIDE), random_prompts([210])
    options = {"mode": "sparse", "method": "oracle", "drafting": drafting, "keep": 0.2}
    exact, coded = (generate(pair, prompts, TOKENS, score_keys=keys, **options) for keys in ("exact", "4bit"))
    assert tokens_of(coded) == tokens_of(exact)
    assert coded[0].statistics.kept_fraction == exact[0].statistics.kept_fraction < 1


def test_short_contexts_have_no_codes(make_pair, generate, random_prompts):
    pair, prompts = make_pair("llama", **WIDE), random_prompts([90, 20])
    exact, few = (generate(pair, prompts, TOKENS, mode="sparse", score_keys=keys) for keys in ("exact", "4bit"))
    assert tokens_of(exact) == tokens_of(few)


@pytest.mark.parametrize("codes, kv_dtype", [("4bit", "auto"), ("2bit", "fp8")])
def test_rows_are_independent_and_records_follow_them(codes, kv_dtype, checked, make_pair, make_engine, random_prompts):
    """Law 7 with slots refilled and moved, and rows that end at different times."""
    prompts = random_prompts([190, 129, 250, 180, 200])
    params = [
        SamplingParams(max_new_tokens=n, temperature=t, seed=s)
        for s, (n, t) in enumerate([(5, 0), (24, 1), (14, 0), (18, 1), (8, 0)])
    ]
    options = {"score_keys": codes, "kv_dtype": kv_dtype, "drafting": "sparse", "draft_keep": 0.2, "draft_recent": 4}
    engine = make_engine(make_pair("qwen3", **WIDE), mode="sparse", batch_size=3, prefill_chunk=90, min_context=128, **options)
    together = engine.generate(prompts, params)
    for prompt, one, result in zip(prompts, params, together, strict=True):
        [alone] = engine.generate([prompt], one)
        assert alone.token_ids == result.token_ids and alone.error is None
        assert alone.statistics.accepted_at == result.statistics.accepted_at
    assert checked[0] > 50


@pytest.mark.parametrize("drafting", ["dense", "sparse"])
def test_records_after_a_dense_beginning_and_a_long_run(drafting, checked, make_pair, generate, random_prompts):
    """Dense rounds are not followed; then as many tokens as several blocks hold, rejected ones in between."""
    pair, params = make_pair("llama", **WIDE), SamplingParams(max_new_tokens=110)
    options = {"mode": "sparse", "drafting": drafting, "score_keys": "4bit", "min_context": 150, "draft_keep": 0.5}
    [result] = generate(pair, random_prompts([120]), params, **options)
    statistics = result.statistics
    assert len(result.token_ids) == 110 and 0 < statistics.accepted < statistics.drafted
    assert checked[0] > 20


def test_rows_that_go_back_to_dense_rounds_are_filled_again(checked, make_pair, generate, random_prompts):
    """The long row makes rounds sparse; when it has ended the short one runs densely, until it is long itself."""
    pair = make_pair("llama", **WIDE)
    params = [SamplingParams(max_new_tokens=n) for n in (6, 50)]
    options = {"mode": "sparse", "score_keys": "4bit", "min_context": 200, "draft_keep": 0.5}
    results = generate(pair, random_prompts([260, 180]), params, **options)
    assert [len(tokens) for tokens in tokens_of(results)] == [6, 50]
    assert checked[0] > 20


def test_rows_share_storage_and_move(make_pair):
    draft = make_pair("llama", **WIDE)[1]
    cache = draft.new_cache(3, 256)
    for layer in range(2):
        cache.keys(layer).normal_(generator=torch.Generator().manual_seed(layer))
    cache.lengths.copy_(torch.tensor([0, 200, 255]))
    records = QuantizedKeys(draft, (0, 1), 2, 3, 256)
    assert records.records.shape == (2, 3, 2, 4, 64 * 5)
    records.rows(1, 3).fill(cache.rows(1, 3))
    assert not records.records[:, 0].any() and not records.records[:, 1, :, 2:].any() and not records.records[:, 2, :, 2:].any()
    records.move(2, 0)
    assert torch.equal(records.records[:, 0], records.records[:, 2]) and records.records[:, 0, :, :2].any()
    cache.lengths[2] = 256
    records.rows(2, 3).follow(cache.rows(2, 3), cache.lengths[2:])
    whole = QuantizedKeys(draft, (0, 1), 2, 3, 256)
    whole.fill(cache)
    assert torch.equal(records.records[:, 1:], whole.records[:, 1:]) and whole.records[:, 2, :, 2].any()


@pytest.mark.parametrize("per_query", [False, True])
def test_scores_are_near_those_of_exact_keys(per_query, make_pair, random_prompts):
    draft = make_pair("llama", **WIDE)[1]
    cache = draft.new_cache(1, 320)
    draft.forward(torch.tensor(random_prompts([300])), cache, logits=False)
    cache.advance(300)
    queries = draft.forward(torch.tensor(random_prompts([4])), cache, record_queries=True, logits=False).queries
    records = QuantizedKeys(draft, (0, 1), 4, 1, 320)
    records.fill(cache)
    given = draft, cache, queries, cache.lengths, (0, 1)
    exact, few = (score(*given, per_query=per_query, quantized=keys).mass for keys in (None, records))
    assert exact.shape == few.shape and not torch.equal(exact, few)
    assert (exact - few).abs().sum(-1).mean() < 0.2 * exact.sum(-1).mean()


def test_reads_are_counted_by_hand(make_pair):
    """A dim is 4 bits and its share of the float16 low and step of 64 tokens: 4.5; with 2 bits 2.5."""
    target, draft = (replace(model.spec, dtype=torch.bfloat16) for model in make_pair("llama", **WIDE))
    shape = draft.layers[0]
    assert [coded_bytes([shape], bits) for bits in (4, 2)] == [2 * 64 * 4.5 / 8, 2 * 64 * 2.5 / 8]
    exact, few = (ReadCounter(target, draft, (0, 1), bits) for bits in (None, 4))
    for length, coded in ((40, 0), (127, 0), (128, 64), (300, 192)):
        found = [counter.of(length, 5, (0, 1)).bytes_read for counter in (exact, few)]
        assert found[0] - found[1] == coded * 2 * 2 * 64 * (16 - 4.5) / 8, "layers, KV heads, dims, bits"
        dense = [counter.of(length, 5) for counter in (exact, few)]
        assert dense[0] == dense[1], "nothing is scored in a dense round"


def test_memory_is_planned_with_records(make_pair, make_engine, random_prompts, monkeypatch):
    seen = []
    plan = "outrider.decoding.engine.plan_rows"
    monkeypatch.setattr(plan, lambda demand, wanted, free, **_: seen.append(demand) or wanted)
    made = []
    init = QuantizedKeys.__init__
    monkeypatch.setattr(QuantizedKeys, "__init__", lambda self, *given: (init(self, *given), made.append(self))[0])
    pair = make_pair("llama", **WIDE)
    for keys in ("exact", *CODES):
        make_engine(pair, mode="sparse", score_keys=keys).generate(random_prompts([150]), SamplingParams(max_new_tokens=2))
    assert [demand.coded_bytes for demand in seen] == [0, *(records.records.nbytes for records in made)]
    make_engine(pair, score_keys="4bit").generate(random_prompts([20]), SamplingParams(max_new_tokens=2))
    assert seen[-1].coded_bytes == 0 and len(made) == 2, "in mode dense nothing is scored"


@pytest.mark.parametrize(
    "family, shape, options, message",
    [
        ("llama", {}, {}, "score-keys: got '4bit'; allowed: exact for a draft with head dim 8"),
        (
            "llama",
            {"head_dim": 32},
            {"score_keys": "2bit"},
            "score-keys: got '2bit'; allowed: exact, 4bit for a draft with head",
        ),
        ("llama", WIDE, {"draft_tokens": 64}, r"K \(draft-tokens\): got 64; allowed: at most 63 with score-keys 4bit"),
    ],
)
def test_what_cannot_be_coded_is_refused_before_any_work(family, shape, options, message, make_pair, make_engine):
    pair, options = make_pair(family, **shape), {"score_keys": "4bit"} | options
    for mode, drafting in MODES:
        with pytest.raises(OptionError, match=message):
            make_engine(pair, mode=mode, drafting=drafting, **options)
    make_engine(pair, **options)  # nothing is scored


def test_layers_of_several_shapes_are_refused(make_pair, make_engine, monkeypatch):
    target, draft = make_pair("llama", **WIDE)
    first, *others = draft.spec.layers
    mixed = replace(draft.spec, layers=(replace(first, kv_heads=4), *others))
    monkeypatch.setattr(draft, "spec", mixed)
    with pytest.raises(
        OptionError, match="score-keys: got '4bit'; allowed: exact for a draft whose scored layers have not one"
    ):
        make_engine((target, draft), mode="sparse", score_keys="4bit")


def test_a_backend_without_such_kernels_is_refused(make_pair, make_engine, monkeypatch):
    pytest.importorskip("triton", reason="kernels need triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(OptionError, match="score-keys: got '4bit'; allowed: exact with backend triton"):
        make_engine(make_pair("llama", **WIDE), mode="sparse", score_keys="4bit", backend="triton")


def test_a_draft_with_window_layers(make_pair, make_engine, checked, random_prompts):
    engine = make_engine(make_pair("gemma3", head_dim=64), mode="sparse", score_keys="4bit")
    [result] = engine.generate(random_prompts([200]), TOKENS)
    assert result.error is None and checked[0] > 0


def test_auto_is_exact_where_no_kernel_reads_codes(make_pair, make_engine, monkeypatch):
    pair = make_pair("llama", **WIDE)
    assert make_engine(pair, mode="sparse").score_bits is None, "on a CPU"
    assert [make_engine(pair, mode="sparse", score_keys=keys).score_bits for keys in ("exact", *CODES)] == [None, 4, 2]
    assert make_engine(pair, mode="dense", score_keys="4bit").score_bits is None, "nothing is scored"

    draft, refusals = pair[1], []

    def check(model, layers, bits, t):
        assert (model, layers, bits, t) == (draft, draft.spec.full_layers, 4, 5)
        if refusals:
            raise OptionError("score-keys", "4bit", refusals[0])

    monkeypatch.setattr(quantized_keys, "check_codes", check)
    monkeypatch.setattr(draft, "spec", replace(draft.spec, device=torch.device("cuda")))
    assert code_bits("auto", draft, 5) == 4
    refusals.append("exact on this device")
    assert code_bits("auto", draft, 5) is None
    refusals.clear()
    monkeypatch.setattr(draft, "backend", "reference")
    assert code_bits("auto", draft, 5) is None


@pytest.mark.parametrize("value", ["8bit", None, 4, ["4bit"]])
def test_bad_options(value):
    with pytest.raises(OptionError, match=r"score-keys: got .*; allowed: auto, exact, 4bit, 2bit"):
        engine_config(score_keys=value)


def test_the_builtin_pair_chooses_almost_the_same(builtin_pair, book):
    """Of the tenth of the tokens that exact keys choose, most are chosen from 4 bits, and about as many from 2."""
    draft = builtin_pair[1]
    tokens = torch.tensor([draft.tokenizer(book, verbose=False)["input_ids"][3000:3805]])
    cache = draft.new_cache(1, 832)
    draft.forward(tokens[:, :800], cache, logits=False)
    cache.advance(800)
    queries = draft.forward(tokens[:, 800:], cache, record_queries=True, logits=False).queries
    layers = draft.spec.full_layers
    chosen = []
    for bits in (None, 4, 2):
        records = QuantizedKeys(draft, layers, bits, 1, 832) if bits else None
        if records is not None:
            records.fill(cache)
        mass = score(draft, cache, queries, cache.lengths, layers, per_query=False, quantized=records).mass
        chosen.append(torch.zeros_like(mass).scatter_(-1, mass.topk(80).indices, 1))
    shared = [float((chosen[0] * few).sum() / chosen[0].sum()) for few in chosen[1:]]
    assert shared[0] > 0.9 and shared[1] > 0.7, shared
