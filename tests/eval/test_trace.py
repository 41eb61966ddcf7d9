"""Traces: they say what the engine did, and change nothing about it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider import SamplingParams
from outrider.errors import OptionError
from outrider.eval.trace import Recorder, bit_sets, listed, pieces
from outrider.types import Selection

PARAMS = SamplingParams(max_new_tokens=9, ignore_eos=True)


@pytest.fixture
def traced(make_pair, make_engine, byte_tokenizer):
    """`traced(prompts, recorder=None, method="outrider", **options)`: results, trace lines and the engine."""

    def run(prompts, recorder=None, **options):
        pair = make_pair("llama", vocab_size=257, tokenizer=byte_tokenizer)
        engine = make_engine(pair, **({"mode": "sparse"} | options))
        recorder = recorder or Recorder()
        results = {c.index: c.result for c in engine.stream(prompts, PARAMS, watch=recorder) if c.result is not None}
        names = [f"prompt {i}" for i in range(len(prompts))]
        return results, recorder.lines(names, byte_tokenizer, engine.config, {"target": "tiny"}), engine

    return run


@given(st.lists(st.lists(st.sets(st.integers(0, 40), max_size=41), min_size=2, max_size=2), min_size=1, max_size=3))
def test_bit_sets_decode_to_the_lists(lists):
    """For any lists over 41 tokens: a number that is no multiple of 8, and padding of -1 as selections have it."""
    layers, heads = len(lists), len(lists[0])
    indices = torch.full((layers, 1, heads, 41), -1, dtype=torch.int32)
    for layer, own in enumerate(lists):
        for head, kept in enumerate(own):
            indices[layer, 0, head, : len(kept)] = torch.tensor(sorted(kept), dtype=torch.int32)
    counts = torch.tensor([[[len(kept) for kept in own]] for own in lists], dtype=torch.int32)
    selection = Selection(layers=tuple(range(layers)), indices=indices, counts=counts, lengths=torch.tensor([41]))
    packed = bit_sets(selection, 41)
    assert [[listed(bits) for bits in layer] for layer in packed] == [[sorted(kept) for kept in own] for own in lists]


def test_what_lies_past_a_count_is_not_listed():
    indices = torch.tensor([[[[1, 3, 5, 7]]]], dtype=torch.int32)
    selection = Selection(layers=(0,), indices=indices, counts=torch.tensor([[[2]]]), lengths=torch.tensor([9]))
    assert listed(bit_sets(selection, 9)[0][0]) == [1, 3]


def test_a_trace_says_what_the_engine_did(traced, method, monkeypatch):
    """Lists are compared with what the selector returned, round by round; counts with the statistics."""
    from outrider.guidance.selectors import SELECTORS

    made = []
    select = SELECTORS[method].select

    def spy(self, scores, shares=None):
        selection = select(self, scores, shares)
        lists = [
            [own[: int(n)].tolist() for own, n in zip(layer[0], counts[0], strict=True)]
            for layer, counts in zip(selection.indices, selection.counts, strict=True)
        ]
        made.append((selection.layers, int(selection.lengths), lists))
        return selection

    monkeypatch.setattr(SELECTORS[method], "select", spy)
    prompt = list(b"It is a truth, acknowledged.")
    results, [line], _ = traced([prompt], method=method, drafting="dense", keep=0.8)
    statistics = results[0].statistics
    rounds = line["rounds"]
    assert len(rounds) == line["all_rounds"] == statistics.rounds > 1
    assert sum(one["accepted"] for one in rounds) == statistics.accepted > 0
    assert sum(len(one["drafted"]) for one in rounds) == statistics.drafted
    assert line["tokens"] == prompt + results[0].token_ids and line["prompt_tokens"] == len(prompt)
    assert (line["method"], line["keep"], line["top_p"], line["text"]) == (method, 0.8, None, "prompt 0")
    assert [
        (tuple(line["layers"]), one["cached"], [[listed(b) for b in own] for own in one["lists"]]) for one in rounds
    ] == made
    emitted = [token for one in rounds for token in (*one["drafted"][: one["accepted"]], one["next"])]
    assert emitted[: len(results[0].token_ids)] == results[0].token_ids
    for one in rounds:
        assert 0 <= one["accepted"] <= len(one["drafted"]) == len(one["drafted_pieces"]) == 3


def test_watching_changes_nothing_and_rows_of_a_batch_are_told_apart(traced):
    prompts = [list(b"The quick brown fox jumps"), list(b"over the lazy dog, and then some more of it")]
    together, lines, engine = traced(prompts)
    assert {i: r.token_ids for i, r in together.items()} == dict(
        enumerate(r.token_ids for r in engine.generate(prompts, PARAMS))
    )
    for prompt, line in zip(prompts, lines, strict=True):
        _, [alone], _ = traced([prompt])
        assert alone["tokens"] == line["tokens"] and alone["rounds"] == line["rounds"]


def test_rounds_below_min_context_have_no_lists(traced):
    _, [line], _ = traced([list(b"Emma")], min_context=7)
    dense = [one["lists"] is None for one in line["rounds"]]
    assert dense[0] and not dense[-1] and dense == sorted(dense, reverse=True)
    assert line["layers"] == [0, 1, 2]


def test_only_so_many_rounds_are_kept(traced):
    results, [line], _ = traced([list(b"A prompt of some length.")], Recorder(rounds=2))
    assert len(line["rounds"]) == 2 and line["all_rounds"] == results[0].statistics.rounds > 2
    emitted = sum(one["accepted"] + 1 for one in line["rounds"])
    assert line["tokens"] == list(b"A prompt of some length.") + results[0].token_ids[:emitted]
    assert len(line["pieces"]) == len(line["tokens"])


def test_recording_ends_when_the_room_is_full(traced):
    recorder = Recorder(max_bytes=30)  # a round of 3 layers and 2 heads takes 24
    _, [line], _ = traced([list(b"A prompt of some length.")], recorder)
    assert recorder.full and len(line["rounds"]) == 1
    with pytest.raises(OptionError, match=r"trace: got '24 bytes for the lists of one round'; allowed: at most 23"):
        traced([list(b"A prompt of some length.")], Recorder(max_bytes=23))


def test_captured_rounds_cannot_be_watched(make_pair, make_engine):
    engine = make_engine(make_pair("llama"), mode="sparse")
    engine._engine.captures = True
    with pytest.raises(OptionError, match=r"eager: got False; allowed: True"):
        engine.stream([[1, 2, 3]], watch=Recorder())


@settings(max_examples=40)
@given(st.text(max_size=20))
def test_pieces_put_together_are_the_text(byte_tokenizer, text):
    tokens = list(text.encode("utf-8", "surrogatepass"))
    found = pieces(byte_tokenizer, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == byte_tokenizer.decode(tokens)


def test_a_character_belongs_to_the_token_that_completes_it(byte_tokenizer):
    assert pieces(byte_tokenizer, list("né€".encode())) == ["n", "", "é", "", "", "€"]
    assert pieces(byte_tokenizer, list("€".encode())[1:], before=list("€".encode())[:1])[-1] != ""
    assert pieces(byte_tokenizer, [65, 256, 66, 0xE2]) == ["A", "<end>", "B", "\ufffd"]


def test_long_texts_are_decoded_in_parts(byte_tokenizer, monkeypatch):
    monkeypatch.setattr("outrider.eval.trace._LONG", 5)
    text = "añb€c😀 dé" * 7
    assert "".join(pieces(byte_tokenizer, list(text.encode()))) == text


def test_pieces_of_a_real_tokenizer(builtin_pair, book):
    tokenizer = builtin_pair[0].tokenizer
    tokens = tokenizer(book[:9000] + " naïve 😀 €5")["input_ids"]
    assert "".join(pieces(tokenizer, tokens)) == book[:9000] + " naïve 😀 €5"
