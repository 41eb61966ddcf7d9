"""What several ranks do together, compared with one process that has all of the model: run by `test_ranks.py`, once a rank.

Every rank runs these tests in step, computes the results of one process for itself, and compares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding.memory import free_bytes
from outrider.decoding.outrider import Outrider, Result
from outrider.errors import ModelError, OptionError, PromptError
from outrider.models import LanguageModel, wrap
from outrider.models.ranks import ALONE, Ranks, join
from outrider.models.sharding import shard

SIZE = 2
FAMILIES = ("llama", "llama-mha", "mistral", "mistral-window", "qwen2", "qwen3", "gemma3")
# whatever does not depend on a clock
COUNTED = ("rounds", "drafted", "accepted", "accepted_at", "bytes_read", "confirmations", "rolled_back", "audits", "chosen")
AVERAGED = ("listed", "recalled", "differed", "prefill_listed")

Pair = tuple[LanguageModel, LanguageModel]


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return join(SIZE, "cpu")


@pytest.fixture(scope="session")
def share(ranks: Ranks) -> Callable[..., LanguageModel]:
    """`share(model)`: this rank's part of it."""

    def make(model: LanguageModel) -> LanguageModel:
        module = copy.deepcopy(model.module)
        shard(module, ranks, model.spec.name)
        return wrap(module, model.tokenizer, name=model.spec.name, ranks=ranks)

    return make


@pytest.fixture(scope="session")
def share_pair(share: Callable[..., LanguageModel]) -> Callable[..., Pair]:
    """`share_pair(pair, drafts)`: the target's part and all of the draft, or its part, too."""
    return lambda pair, drafts=False: (share(pair[0]), share(pair[1]) if drafts else pair[1])


def in_step(ranks: Ranks, numbers: Any) -> None:
    """All ranks have the same numbers."""
    own = torch.tensor(numbers, dtype=torch.float64).flatten()
    first = ranks.same(own.clone())
    assert torch.equal(own, first), f"rank {ranks.rank} has {own}, the first one {first}"


def equal(found: list[Result], wanted: list[Result], ranks: Ranks) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.finish_reason == other.finish_reason and one.error is None
        assert one.token_ids == other.token_ids
        for name in COUNTED:
            assert getattr(one.statistics, name) == getattr(other.statistics, name), name
        for name in AVERAGED:
            assert getattr(one.statistics, name) == pytest.approx(getattr(other.statistics, name), rel=1e-4), name
        in_step(ranks, [getattr(one.statistics, name) for name in AVERAGED])


def test_collectives_give_every_rank_the_same(ranks: Ranks) -> None:
    own = torch.full((2, 3), float(ranks.rank + 1))
    assert ranks.sum(own.clone()).eq(3).all() and ranks.mean(own.clone()).eq(1.5).all()
    assert ranks.same(own.clone()).eq(1).all()
    assert ranks.least(float(ranks.rank + 5), own.device) == 5
    for dim in (0, 1, -1, -2):
        assert torch.equal(ranks.gather(own, dim), torch.cat([torch.full((2, 3), 1.0), torch.full((2, 3), 2.0)], dim))
    assert [part.tolist() for part in (torch.arange(6)[ranks.own(6)],)] == [[0, 1, 2] if ranks.leads else [3, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_has_its_heads_and_the_logits_of_the_whole(
    family: str, make_model: Any, share: Any, ranks: Ranks, random_prompts: Any
) -> None:
    whole, tokens = make_model(family), torch.tensor(random_prompts([40, 40]))
    part = share(whole)
    assert part.spec.whole == whole.spec and part.spec.digest == whole.spec.digest
    assert part.spec.full_shape.kv_heads * SIZE == whole.spec.full_shape.kv_heads
    parameters = [sum(p.numel() for p in model.module.get_decoder().layers.parameters()) for model in (part, whole)]
    assert parameters[0] < 0.55 * parameters[1]
    caches = [model.new_cache(2, 64) for model in (whole, part)]
    for start, stop in ((0, 30), (30, 33), (33, 34)):
        wanted, found = (
            model.forward(tokens[:, start:stop], cache, stop=stop).logits
            for model, cache in zip((whole, part), caches, strict=True)
        )
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        in_step(ranks, found[:, -1, :8].tolist())
        for cache in caches:
            cache.advance(stop - start)
    heads = ranks.own(whole.spec.full_shape.kv_heads)
    torch.testing.assert_close(caches[1].keys(1, 34), caches[0].keys(1, 34)[:, :, heads], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, mode) for family in ("llama", "gemma3") for mode in ("plain", "dense", "sparse", "exact")]
    + [("mistral-window", "dense"), *((family, "sparse") for family in ("llama-mha", "mistral", "qwen2", "qwen3"))],
)
def test_greedy_text_is_that_of_one_process(
    family: str, mode: str, make_pair: Any, share_pair: Any, make_engine: Any, random_prompts: Any, ranks: Ranks
) -> None:
    pair = make_pair(family)
    prompts, params = random_prompts([30, 5, 61, 12]), SamplingParams(max_new_tokens=16)
    options = {"mode": mode, "batch_size": 3}  # ragged, and one waits
    wanted = make_engine(pair, **options).generate(prompts, params)
    for drafts in (False, True)[: 1 + (family == "llama")]:
        equal(run_shared(pair, prompts, params, share_pair, make_engine, drafts, **options), wanted, ranks)


def run_shared(
    pair: Pair, prompts: Any, params: Any, share_pair: Any, make_engine: Any, drafts: bool, **options: Any
) -> list[Result]:
    """By this rank's part of a pair, with the alignment of the whole one."""
    engine: Outrider = make_engine(pair, **options)
    shared = Outrider(*share_pair(pair, drafts), engine.config, engine.alignments)
    return shared.generate(prompts, params)


@pytest.mark.parametrize(
    ("drafts", "options"),
    [
        (False, {"method": "outrider", "allocation": "fitted"}),
        (True, {"method": "outrider", "allocation": "flat", "unlisted": "mean"}),
        (False, {"method": "outrider", "top_p": 0.8}),
        (False, {"method": "sts", "unlisted": "mean"}),
        (True, {"method": "sts"}),
        (True, {"method": "specattn", "top_p": 0.8}),
        (False, {"method": "specattn", "unlisted": "mean"}),
        (False, {"method": "dustin", "unlisted": "mean"}),
        (True, {"drafting": "dense"}),
        (True, {"kv_dtype": "fp8"}),
        (True, {"score_keys": "4bit"}),
        (False, {"audit": True}),
        (False, {"guard_every": 1}),
        (False, {"guard_every": 1, "guard_tolerance": 0.02}),
        (False, {"prefill": "sparse"}),
        (True, {"prefill": "sparse"}),
    ],
    ids=str,
)
def test_options_do_what_they_do_in_one_process(
    options: dict[str, Any], drafts: bool, make_pair: Any, share_pair: Any, make_engine: Any, random_prompts: Any, ranks: Ranks
) -> None:
    pair = make_pair("llama-mha", head_dim=32)
    prompts, params = random_prompts([90, 33]), SamplingParams(max_new_tokens=12)
    blocks = {"prefill_block": 8, "prefill_chunk": 32, "prefill_min_context": 16, "prefill_draft_least": 16}
    options = {"mode": "sparse", "prefill_keep": 0.3} | blocks | options
    wanted = make_engine(pair, **options).generate(prompts, params)
    assert any(one.statistics.kept_fraction < 0.9 for one in wanted) or "guard_tolerance" in options, (
        "lists leave out something"
    )
    equal(run_shared(pair, prompts, params, share_pair, make_engine, drafts, **options), wanted, ranks)


@pytest.mark.parametrize("mode", ["dense", "sparse", "exact"])
def test_drawn_text_is_that_of_one_process(
    mode: str, make_pair: Any, share_pair: Any, make_engine: Any, random_prompts: Any, ranks: Ranks
) -> None:
    pair = make_pair("llama")
    params = [SamplingParams(max_new_tokens=16, temperature=0.8, top_k=20, seed=seed) for seed in range(2)]
    prompts = random_prompts([30, 40])
    wanted = make_engine(pair, mode=mode).generate(prompts, params)
    drafts = mode == "exact"
    equal(run_shared(pair, prompts, params, share_pair, make_engine, drafts, mode=mode), wanted, ranks)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_that_differ_from_rank_to_rank_part_nobody(
    temperature: float,
    make_pair: Any,
    noisy: Any,
    share: Any,
    make_engine: Any,
    random_prompts: Any,
    ranks: Ranks,
) -> None:
    """What the first rank drafts counts, and what it judges: others may round otherwise."""
    pair = make_pair("llama")
    prompts, params = random_prompts([30, 40]), SamplingParams(max_new_tokens=24, temperature=temperature)
    wanted = make_engine(pair).generate(prompts, params)
    own = pair[1] if ranks.leads else noisy(pair[0], 0.2)
    engine = make_engine(pair)
    found = Outrider(share(pair[0]), own, engine.config, None).generate(prompts, params)
    equal(found, wanted, ranks)


def test_fused_layers_add_the_residual_once(make_model: Any, share: Any, random_prompts: Any) -> None:
    whole = make_model("qwen3")
    part = share(whole).with_backend("reference").fuse()
    assert len(part.fused_layers) == len(whole.spec.layers)
    tokens = torch.tensor(random_prompts([4]))
    wanted, found = (model.forward(tokens, model.new_cache(1, 8)).logits for model in (whole, part))
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_rows_that_fit_are_those_of_the_rank_with_least_memory(
    make_pair: Any, share_pair: Any, make_engine: Any, random_prompts: Any, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, prompts = make_pair("llama"), random_prompts([30])
    free = free_bytes(torch.device("cpu")) if ranks.leads else 1000
    monkeypatch.setattr("outrider.decoding.engine.free_bytes", lambda device: free)
    with pytest.raises(PromptError, match="allowed: at most 0 tokens"):
        run_shared(pair, prompts, SamplingParams(), share_pair, make_engine, False)


def test_a_rank_without_memory_stops(
    make_pair: Any, share_pair: Any, make_engine: Any, random_prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone its sequences would end with an error, and others go on: the other ranks would wait for it."""

    def full(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("outrider.decoding.runner.verify", full)
    with pytest.raises(torch.OutOfMemoryError):
        run_shared(make_pair("llama"), random_prompts([30]), SamplingParams(), share_pair, make_engine, False)


def test_refused(
    make_pair: Any, make_module: Any, share_pair: Any, make_engine: Any, random_prompts: Any, ranks: Ranks
) -> None:
    pair, prompts = make_pair("llama"), random_prompts([30])
    with pytest.raises(OptionError, match="mode: got 'auto'; allowed: plain, dense, sparse, exact with tensor-parallel"):
        run_shared(pair, prompts, SamplingParams(), share_pair, make_engine, False, mode="auto")
    with pytest.raises(OptionError, match=r"method: got 'quest'; allowed: outrider, .* with tensor-parallel"):
        run_shared(pair, prompts, SamplingParams(), share_pair, make_engine, False, mode="sparse", method="quest")
    engine = make_engine(pair)
    shared = Outrider(*share_pair(pair), engine.config, None)
    with pytest.raises(OptionError, match="tensor-parallel: got 2; allowed: 1 for rounds that are watched"):
        next(shared.stream(prompts, watch=lambda *given: None))
    with pytest.raises(
        OptionError, match=r"tensor-parallel: got 2; allowed: 1, 3 for it \(key value heads 3, attention heads 6"
    ):
        shard(make_module("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=3), ranks, "it")
    with pytest.raises(ModelError, match=r"it \(phi3\): .* allowed: tensor-parallel 1, or a family"):
        shard(make_module("phi3", num_key_value_heads=2), ranks, "it")
    mixture = make_module("MixtralConfig", num_local_experts=2, sliding_window=None)
    with pytest.raises(ModelError, match=r"it \(mixtral\): "):
        shard(mixture, ranks, "it")
    with pytest.raises(OptionError, match="tensor-parallel: got 3; allowed: 2, as many as there are processes"):
        join(3, "cpu")
    assert join(1, "cpu") is ALONE


def test_a_whole_output_layer_where_the_vocabulary_is_odd(make_model: Any, share: Any) -> None:
    assert make_model("llama").spec.vocabulary % SIZE, "the other tests have one that is"
    for vocabulary, width in ((97, 97), (96, 48)):
        whole = make_model("llama", vocab_size=vocabulary)
        part = share(whole)
        assert part.module.get_output_embeddings().weight.shape[0] == width
        tokens = torch.arange(5)[None]
        wanted, found = (model.forward(tokens, model.new_cache(1, 8)).logits for model in (whole, part))
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_a_spec_knows_the_whole(make_model: Any, share: Any) -> None:
    part = share(make_model("gemma3"))
    assert replace(part.spec.whole, ranks=SIZE) != part.spec and part.spec.ranks == SIZE
    assert [layer.window for layer in part.spec.layers] == [layer.window for layer in part.spec.whole.layers]
