"""Laws 1, 7 and 8 of prompts that are read from lists; chunks and memory are nobody's business."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding import sparse_prefill
from outrider.decoding.draft_blocks import EVERYTHING, DraftBlocks, DraftReading
from outrider.decoding.sparse_prefill import SparsePrefill
from outrider.errors import OptionError, PromptError

BLOCK = 8
SPARSE = {"prefill": "sparse", "prefill_block": BLOCK, "prefill_chunk": 4 * BLOCK, "prefill_min_context": 0}
FEW = SamplingParams(max_new_tokens=8)


@pytest.fixture
def read(make_selector):
    """`read(pair, prompt, keep, chunk)`: the target's logits and the lists by chunk, read sparsely from the start."""

    def run(pair, prompt, keep, chunk=4 * BLOCK, watch=None, drafted=EVERYTHING, **budget):
        selector = make_selector(pair, "outrider", keep=keep, **({"min_context": 0} | budget))
        reader = SparsePrefill(selector, BLOCK, 0, drafted)
        rows = [(model, model.new_cache(1, len(prompt) + 3)) for model in pair]
        logits, lists = [], []
        for start in range(0, len(prompt), chunk):
            part = torch.tensor([prompt[start : start + chunk]])
            if watch is not None:
                watch(rows, start)
            found, made = reader.read(rows, part, start + part.shape[1], logits=True)
            logits.append(found)
            lists.append(made)
        return torch.cat(logits, dim=1), lists

    return run


def densely(model, prompt):
    cache = model.new_cache(1, len(prompt))
    return model.forward(torch.tensor([prompt]), cache).logits


@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral-window", "qwen3", "gemma3"])
@pytest.mark.parametrize("draft", ["noisy", "other"])
def test_law_1_keeping_everything_is_dense(family, draft, make_pair, random_prompts, read):
    pair, [prompt] = make_pair(family, draft), random_prompts([77])
    if not pair[0].spec.full_layers:
        pytest.skip("every layer looks at a window")
    logits, lists = read(pair, prompt, 1.0)
    torch.testing.assert_close(logits, densely(pair[0], prompt), rtol=1e-4, atol=1e-4)
    starts = torch.arange(0, 77, BLOCK)
    counts = torch.cat([made.counts for made in lists], dim=2)
    assert torch.equal(counts, starts.view(1, 1, -1, 1).expand_as(counts).int())


@pytest.mark.parametrize("drafting", ["dense", "sparse"])
def test_law_1_for_prompts_of_the_engine(drafting, make_pair, generate, random_prompts):
    """More prompts than slots, of any length against chunks and blocks: what follows is what follows a dense prompt."""
    pair, prompts = make_pair("qwen3"), random_prompts([90, 33, 64, 5, 65])
    options = {"batch_size": 2, "drafting": drafting}
    dense = generate(pair, prompts, FEW, **options)
    sparse = generate(pair, prompts, FEW, **options, **SPARSE, prefill_keep=1.0)
    assert [x.token_ids for x in sparse] == [x.token_ids for x in dense]
    assert [x.statistics.prefill_kept_fraction for x in sparse] == [1.0] * 5
    less = generate(pair, prompts, FEW, **options, **SPARSE, prefill_keep=0.2)
    assert [x.token_ids for x in less] != [x.token_ids for x in dense]
    assert all(0.15 < x.statistics.prefill_kept_fraction < 0.5 for x in (less[0], less[2]))


def test_law_6_lists_of_blocks(make_pair, random_prompts, read):
    """Unique, ascending, before the block, with sinks and recent tokens, as many as asked for."""
    pair, [prompt] = make_pair("llama"), random_prompts([150])
    _, lists = read(pair, prompt, 0.3, sinks=2, recent=4, allocation="flat")
    start = 0
    for made in lists:
        for block in range(made.counts.shape[2]):
            for indices, count in zip(
                made.indices[:, 0, block].flatten(0, 1).tolist(), made.counts[:, 0, block].flatten().tolist(), strict=True
            ):
                listed = indices[:count]
                assert listed == sorted(set(listed)) and all(0 <= token < start for token in listed)
                assert {*range(min(2, start)), *range(max(0, start - 4), start)} <= {*listed}
                assert count == max(-(-3 * start // 10), min(start, 6))
            start += BLOCK


def test_law_7_a_prompt_among_others(make_pair, generate, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts([90, 33, 64, 65])
    options = SPARSE | {"prefill_keep": 0.2, "mode": "sparse"}
    together = generate(pair, prompts, FEW, batch_size=3, **options)
    for prompt, result in zip(prompts, together, strict=True):
        assert generate(pair, [prompt], FEW, **options)[0].token_ids == result.token_ids


def test_law_8_unlisted_rows_are_not_read(make_pair, random_prompts, read):
    """NaN in every row of the target's cache that no block of the chunk has listed, and behind it, changes nothing."""
    pair, [prompt] = make_pair("llama"), random_prompts([120])
    clean, lists = read(pair, prompt, 0.2)
    poisoned = 0

    def poison(rows, start):
        nonlocal poisoned
        cache, made = rows[0][1], lists[start // (4 * BLOCK)]
        for layer in made.layers:
            indices, counts = made.of(layer)
            for head in range(counts.shape[2]):
                listed = {
                    token
                    for block in range(counts.shape[1])
                    for token in indices[0, block, head, : counts[0, block, head]].tolist()
                }
                unread = [token for token in range(cache.capacity) if token not in listed]
                for stored in (cache.keys(layer), cache.values(layer)):
                    stored[0, unread, head] = torch.nan
                poisoned += len([token for token in unread if token < start])

    kept = {}

    def poison_and_restore(rows, start):
        """A later chunk may list what an earlier one has not: what was there comes back first."""
        cache = rows[0][1]
        for stored, held in kept.items():
            stored[:, :, : held.shape[2]] = torch.where(
                stored[:, :, : held.shape[2]].isnan(), held, stored[:, :, : held.shape[2]]
            )
        kept.clear()
        kept.update({stored: stored[:, :, :start].clone() for stored in (*cache._keys, *cache._values)})
        poison(rows, start)

    found, _ = read(pair, prompt, 0.2, watch=poison_and_restore)
    assert poisoned > 100
    assert torch.equal(found, clean)  # never true of NaN


def test_chunks_change_nothing(make_pair, random_prompts, read):
    """Neither dense results nor, blocks being the same, sparse ones."""
    pair, [prompt] = make_pair("llama"), random_prompts([150])
    dense = densely(pair[0], prompt)
    for chunk in (BLOCK, 2 * BLOCK, 8 * BLOCK):
        torch.testing.assert_close(read(pair, prompt, 1.0, chunk)[0], dense, rtol=1e-4, atol=1e-4)
        found, wanted = (read(pair, prompt, 0.2, size)[0] for size in (chunk, 4 * BLOCK))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Listed(DraftReading):
    """Everything, by lists that hold everything."""

    def lists(self, draft, cache, start, stop, block):
        return DraftBlocks(draft, cache, start, stop, block, [*range(start // block, -(-stop // block))])


def test_law_1_of_the_draft(make_pair, random_prompts, read):
    """With every block listed the draft and its scores are those without lists; with fewer they are not."""
    pair, [prompt] = make_pair("llama"), random_prompts([150])
    logits, lists = read(pair, prompt, 0.2)
    found, made = read(pair, prompt, 0.2, drafted=Listed())
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(mine.counts, theirs.counts) for mine, theirs in zip(made, lists, strict=True))
    fewer, _ = read(pair, prompt, 0.2, drafted=DraftReading(keep=0.5))
    assert not torch.allclose(fewer, logits, rtol=1e-2)


def test_law_8_what_the_draft_does_not_list_is_not_read(monkeypatch, make_pair, random_prompts, read):
    """NaN in every value, by layer and KV head, that no block of the chunk reads, and in keys where bounds were taken."""
    pair, [prompt] = make_pair("llama"), random_prompts([150])
    reading, poisoned = DraftReading(keep=0.3), []
    clean, _ = read(pair, prompt, 0.2, drafted=reading)
    inner = DraftBlocks.of

    def poison(self, layer, queries):
        indices, counts = inner(self, layer, queries)
        start = int(self._lengths[0])
        unread = ~self.listed[layer][0].any(0).repeat_interleave(BLOCK, -1)[:, :start]  # [Hkv, tokens before]
        for stored in (self.cache.keys(layer), self.cache.values(layer)):
            held = stored[0, :start].clone()
            stored[0, :start].masked_fill_(unread.T[..., None], torch.nan)
            poisoned.append((stored, held, int(unread.sum())))
        return indices, counts

    def restore(rows, start):
        for stored, held, _ in poisoned:
            stored[0, : len(held)] = held

    monkeypatch.setattr(DraftBlocks, "of", poison)
    found, _ = read(pair, prompt, 0.2, drafted=reading, watch=restore)
    assert sum(count for *_, count in poisoned) > 100
    assert torch.equal(found, clean)  # never true of NaN


def test_chunks_change_nothing_for_the_draft(make_pair, random_prompts, read):
    pair, [prompt] = make_pair("llama"), random_prompts([150])
    wanted, _ = read(pair, prompt, 0.2, drafted=DraftReading(keep=0.4))
    for chunk in (BLOCK, 2 * BLOCK, 8 * BLOCK):
        found, _ = read(pair, prompt, 0.2, chunk, drafted=DraftReading(keep=0.4))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_draft_with_lists_in_the_engine(make_pair, generate, random_prompts):
    """Law 7, and that the option reaches the draft."""
    pair, prompts = make_pair("llama"), random_prompts([90, 33, 64, 150])
    options = SPARSE | {"prefill_keep": 0.2, "prefill_draft_keep": 0.3, "prefill_draft_least": 0}
    together = generate(pair, prompts, FEW, batch_size=3, **options)
    for prompt, result in zip(prompts, together, strict=True):
        assert generate(pair, [prompt], FEW, **options)[0].token_ids == result.token_ids
    whole = generate(pair, prompts, FEW, **(options | {"prefill_draft_keep": 1.0}))
    assert [x.token_ids for x in whole] != [x.token_ids for x in together]


def test_memory_of_scores_is_bounded(monkeypatch, make_pair, random_prompts, read):
    """No more masses at a time than the bound, but those of one block, and the same lists."""
    pair, [prompt] = make_pair("llama"), random_prompts([150])
    wanted, _ = read(pair, prompt, 0.2)
    made = []
    inner = sparse_prefill.score_blocks
    monkeypatch.setattr(sparse_prefill, "score_blocks", lambda *a, **k: made.append(inner(*a, **k)) or made[-1])
    for bound, blocks in ((0, 1), (2 * 192 * 12 * 4, 2), (2**30, 4)):  # up to 192 tokens wide, 3 layers of 4 heads, fp32
        monkeypatch.setattr(sparse_prefill, "SCORE_BYTES", bound)
        made.clear()
        found, _ = read(pair, prompt, 0.2)
        assert torch.equal(found, wanted)
        most = max(scores.mass.numel() * 4 for scores in made)
        assert most <= max(bound, 192 * 12 * 4) and max(len(scores.mass) for scores in made) >= min(blocks, 4)


def test_what_reading_needs_beside_caches_is_planned(monkeypatch, make_pair, make_engine, random_prompts):
    """A gigabyte is free: enough for a dense prompt, and not for one more gigabyte of masses. Refused before any work."""
    monkeypatch.setattr("outrider.decoding.engine.free_bytes", lambda device: 2**30)
    pair, prompts = make_pair("llama"), random_prompts([90])
    assert make_engine(pair).generate(prompts, FEW)[0].error is None
    with pytest.raises(
        PromptError, match=r"prompt 0: 98 tokens need .* allowed: at most 0 tokens in the 0.0 GB that are free beside 1.1 GB to"
    ):
        make_engine(pair, **SPARSE).generate(prompts, FEW)


def test_each_prompt_may_say_how_it_is_read(make_pair, make_engine, random_prompts):
    pair, [prompt] = make_pair("llama"), random_prompts([90])
    engine = make_engine(pair, **(SPARSE | {"prefill": "dense", "prefill_keep": 0.2}))
    ways = {"prefill": None}, {"prefill": "sparse"}, {"prefill": "sparse", "prefill_keep": 1.0}
    params = [SamplingParams(max_new_tokens=8, **way) for way in ways]
    dense, sparse, whole = engine.generate([prompt] * 3, params)
    assert dense.token_ids == whole.token_ids != sparse.token_ids
    assert dense.statistics.prefill_before == 0 and sparse.statistics.prefill_kept_fraction < 0.5


def test_short_prompts_are_read_densely(make_pair, generate, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts([40, 90])
    short, long = generate(pair, prompts, FEW, **(SPARSE | {"prefill_min_context": 64, "prefill_keep": 0.1}))
    assert short.statistics.prefill_before == 0
    assert 0 < long.statistics.prefill_kept_fraction < 1


def test_what_cannot_be_is_refused_before_any_work(make_pair, make_engine, random_prompts):
    pair, prompts = make_pair("llama"), random_prompts([40])
    for options, message in (
        ({"prefill": "some"}, "prefill: got 'some'; allowed: dense, sparse"),
        (SPARSE | {"prefill_keep": 0}, r"prefill-keep: got 0; allowed: a number in \(0, 1\]"),
        (SPARSE | {"prefill_block": 0}, "prefill-block: got 0; allowed: a whole number >= 1"),
        (SPARSE | {"prefill_min_context": -1}, "prefill-min-context: got -1; allowed: a whole number >= 0"),
        (SPARSE | {"prefill_chunk": 12}, "prefill-chunk: got 12; allowed: a multiple of prefill-block = 8"),
        (SPARSE | {"prefill_draft_keep": 0}, r"prefill-draft-keep: got 0; allowed: a number in \(0, 1\]"),
        (SPARSE | {"prefill_draft_least": -1}, "prefill-draft-least: got -1; allowed: a whole number >= 0"),
        (
            SPARSE | {"prefill_block": 24, "prefill_chunk": 48},
            "prefill-block: got 24; allowed: a power of 2 with prefill-draft-keep below 1",
        ),
        (SPARSE | {"mode": "plain"}, "prefill: got 'sparse'; allowed: dense with mode plain"),
    ):
        with pytest.raises(OptionError, match=message):
            make_engine(pair, **options)
    engine = make_engine(pair, mode="plain")
    with pytest.raises(OptionError, match="prefill: got 'sparse'; allowed: dense with mode plain"):
        engine.generate(prompts, SamplingParams(prefill="sparse"))
    with pytest.raises(OptionError, match="prefill-keep: got 2; allowed"):
        SamplingParams(prefill_keep=2)


def test_an_alignment_is_needed(make_pair, random_prompts):
    from outrider.config import engine_config
    from outrider.decoding.outrider import Outrider

    with pytest.raises(OptionError, match="alignment: got None; allowed: a file made by `outrider calibrate`"):
        Outrider(*make_pair("llama"), engine_config(mode="dense", **SPARSE))
