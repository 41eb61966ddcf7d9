"""Law 8: poisoning every unlisted K/V row with NaN changes nothing; what is reported as read is what was read."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams
from outrider.decoding.statistics import Listed, ReadCounter, total
from outrider.types import Selection

PROMPTS = [41, 23, 30]
BUDGETS = pytest.mark.parametrize("budget", [{"keep": 0.25}, {"top_p": 0.5}], ids=["keep", "top_p"])


def poison(begun, read):
    """NaN in every row of the listed layers that no list names: of the past, and behind the round's own tokens."""
    poisoned = 0
    for row, layer in enumerate(begun.selection.layers):
        for rows in (begun.target_cache.keys(layer), begun.target_cache.values(layer)):
            for b, length in enumerate(begun.lengths.tolist()):
                for head, listed in enumerate(read[row][b]):
                    unlisted = [s for s in range(length) if s not in listed]
                    rows[b, unlisted, head] = torch.nan
                    rows[b, length + begun.tokens.shape[1] :, head] = torch.nan
                    poisoned += len(unlisted)
    return poisoned


def check(begun, read_rows):
    clean = begun.verify(begun.selection)
    assert poison(begun, read_rows(begun.selection, begun.target)) > 0
    assert torch.equal(begun.verify(begun.selection), clean)  # never true of NaN


@pytest.mark.parametrize(
    "budget", [{"keep": 0.25}, {"top_p": 0.5}, {"keep": 0.25, "unlisted": "mean"}], ids=["keep", "top_p", "unlisted"]
)
def test_every_method(method, budget, make_pair, begin_round, read_rows, random_prompts):
    check(begin_round(make_pair("llama", "other"), random_prompts(PROMPTS), method, **budget), read_rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family(family, dtype, make_pair, begin_round, read_rows, random_prompts):
    pair = make_pair(family, "other", dtype=dtype)
    if not pair[0].spec.full_layers:
        pytest.skip("no layer with full attention, so no lists")
    check(begin_round(pair, random_prompts(PROMPTS), "sts", keep=0.25), read_rows)


def test_more_tokens_than_a_kernel_takes(make_pair, begin_round, read_rows, random_prompts):
    """A round as long as a short prompt still reads its lists."""
    check(begin_round(make_pair("llama", "other"), random_prompts([41, 60]), k=20, keep=0.25), read_rows)


def test_a_poisoned_listed_row_does_change_the_logits(make_pair, begin_round, read_rows, random_prompts):
    """The poison works: the law above is not green because nothing can be seen."""
    begun = begin_round(make_pair("llama", "other"), random_prompts(PROMPTS), keep=0.25)
    listed = next(iter(read_rows(begun.selection, begun.target)[-1][1][0]))
    begun.target_cache.keys(begun.selection.layers[-1])[1, listed, 0] = torch.nan
    assert begun.verify(begun.selection).isnan().flatten(1).any(1).tolist() == [False, True, False]


def rows_read(begun, row):
    """The cached rows that verifying sequence `row` reads, [(layer, kv head)][...]: those whose poison reaches the logits.

    One forward a layer and head: sequence s of a batch of copies has row s poisoned, keys and values.
    """
    length = int(begun.lengths[row])
    selection, target = begun.selection, begun.target
    copies = Selection(
        layers=selection.layers,
        indices=selection.indices[:, row : row + 1].expand(-1, length, -1, -1),
        counts=selection.counts[:, row : row + 1].expand(-1, length, -1),
        lengths=selection.lengths[row].expand(length),
    )
    cache = target.new_cache(length, begun.target_cache.capacity)
    cache.lengths[:] = length
    every = torch.arange(length)
    found = {}
    for layer, shape in enumerate(target.spec.layers):
        if shape.window is not None:
            continue
        for head in range(shape.kv_heads):
            for number in range(len(target.spec.layers)):
                cache.keys(number)[:] = begun.target_cache.keys(number)[row]
                cache.values(number)[:] = begun.target_cache.values(number)[row]
            cache.keys(layer)[every, every, head] = torch.nan
            cache.values(layer)[every, every, head] = torch.nan
            logits = target.forward(begun.tokens[row].expand(length, -1), cache, selection=copies).logits
            found[layer, head] = logits.isnan().flatten(1).any(1).nonzero().flatten().tolist()
    return found


@BUDGETS
def test_reported_reads_are_the_rows_read(method, budget, make_pair, begin_round, read_rows, random_prompts):
    """Every row is poisoned alone and looked for in the logits; the counter must have said as much."""
    pair = make_pair("phi3", "other")
    begun = begin_round(pair, random_prompts(PROMPTS), method, **budget)
    target, draft = (model.spec for model in pair)
    t = begun.tokens.shape[1]
    counted = Listed.of(begun.selection, target, int(begun.lengths.max()))
    counter = ReadCounter(target, draft, begun.selector.draft_layers)
    scoring = sum(draft.layers[layer].kv_heads * draft.layers[layer].head_dim * 4 for layer in begun.selector.draft_layers)
    naive = read_rows(begun.selection, pair[0])
    for row, length in enumerate(begun.lengths.tolist()):
        found = rows_read(begun, row)
        for number, layer in enumerate(begun.selection.layers):
            for head, listed in enumerate(naive[number][row]):
                assert found[layer, head] == sorted(listed)
        row_bytes = 2 * target.layers[0].head_dim * 4
        heads = len(found)
        read = sum(map(len, found.values())) + heads * t
        reported = counter.of(length, t, counted.layers, float(counted.tokens[row]), float(counted.rows[row]))
        assert reported.bytes_read == read * row_bytes + scoring * (length + t)
        assert reported.bytes_dense == heads * (length + t) * row_bytes
        if method != "sts":  # lists per query head overlap: the rows read are their union, the list length their mean
            assert reported.listed == pytest.approx(sum(map(len, found.values())) / heads)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_statistics_of_a_run_add_up_its_rounds(mode, method, make_pair, make_engine, random_prompts, monkeypatch):
    """kept_fraction and kv_read_fraction of a run equal the naive count over the selections that reached the target."""
    pair = target, draft = make_pair("qwen3")
    engine = make_engine(pair, mode=mode, method=method)
    rounds = []
    forward = target.forward

    def spy(tokens, cache, *, selection=None, **options):
        if options.get("logits") is not False:  # a verification, not the prefill
            rounds.append((selection, int(cache.lengths[0]), tokens.shape[1]))
        return forward(tokens, cache, selection=selection, **options)

    monkeypatch.setattr(target, "forward", spy)
    [result] = engine.generate(random_prompts([6]), SamplingParams(max_new_tokens=20))
    assert len(rounds) == result.statistics.rounds
    row_bytes = {model: model.spec.layers[0].head_dim * 4 for model in pair}
    kept = cached = read = dense = 0.0
    for selection, length, t in rounds:
        for layer, shape in enumerate(target.spec.layers):
            whole = length
            lists = [[length]]
            if selection is not None and layer in selection.layers:
                number = selection.layers.index(layer)
                whole, lists = None, selection.counts[number].tolist()
                group = max(1, selection.counts.shape[2] // shape.kv_heads)
                for head in range(shape.kv_heads):
                    owners = range(head * group, head * group + group) if len(lists[0]) > 1 else [0]
                    union = {i for o in owners for i in selection.indices[number, 0, o, : lists[0][o]].tolist()}
                    read += 2 * row_bytes[target] * (len(union) + t)
            if whole is not None:
                read += 2 * row_bytes[target] * (whole + t) * shape.kv_heads
            kept += sum(lists[0]) / len(lists[0]) / len(target.spec.layers)
            dense += 2 * row_bytes[target] * (length + t) * shape.kv_heads
        cached += length
        if selection is not None:
            scored = engine._engine.guidance.layers
            read += sum(row_bytes[draft] * draft.spec.layers[layer].kv_heads * (length + t) for layer in scored)
    assert result.statistics.kept_fraction == pytest.approx(kept / cached)
    assert result.statistics.kv_read_fraction == pytest.approx(read / dense)
    assert total([result.statistics, result.statistics]).kept_fraction == pytest.approx(kept / cached)
    if mode == "dense":
        assert (result.statistics.kept_fraction, result.statistics.kv_read_fraction) == (1.0, 1.0)
    else:
        assert {selection is None for selection, *_ in rounds} == {True, False}, "short rounds are dense, later ones sparse"
        assert result.statistics.kept_fraction < 0.9


def test_builtin_pair(method, builtin_pair, begin_round, read_rows, book):
    tokens = builtin_pair[0].tokenizer(book, verbose=False)["input_ids"]
    prompts = [tokens[3000:3200], tokens[7000:7120]]
    check(begin_round(builtin_pair, prompts, method, keep=0.1), read_rows)
