"""Tokenizer round trips, planted facts, windows that depend on nothing but seed and number."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from outrider.eval.facts import draw_facts

PAIR = Path(__file__).parents[2] / "src" / "outrider" / "pair"
SHIPPED = [PAIR / name / "tokenizer.json" for name in ("target", "draft")]


@pytest.fixture(params=["trained here", "shipped"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_file: Path) -> Tokenizer:
    if request.param == "trained here":
        return Tokenizer.from_file(str(tokenizer_file))
    if not SHIPPED[0].exists():
        pytest.skip("no checkpoints in the package yet")
    return Tokenizer.from_file(str(SHIPPED[0]))


@pytest.mark.parametrize(
    "text",
    ["Plain words.", "“Naïve—œuvre…”\n\n\tΔx ≥ 3½", "日本語 🜁🜂 عربى", " \r\n  x\u00a0y ", "don’t DON'T 1900-05", "\x00\x7f"],
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_an_answer_is_six_tokens_and_facts_tokenise_alike_everywhere(tokenizer: Tokenizer) -> None:
    for fact in draw_facts(random.Random(5), 300):
        question, answer, closing = (tokenizer.encode(t).ids for t in (fact.question, fact.answer, fact.closing))
        assert len(answer) == 6
        assert tokenizer.encode(fact.exchange).ids == question + answer + closing
        assert answer == tokenizer.encode(fact.statement).ids[-6 - len(closing) : -len(closing)]


def test_both_shipped_models_share_one_tokenizer() -> None:
    if not all(path.exists() for path in SHIPPED):
        pytest.skip("no checkpoints in the package yet")
    assert SHIPPED[0].read_bytes() == SHIPPED[1].read_bytes()


def find(tokens: list[int], piece: list[int]) -> list[int]:
    return [i for i in range(len(tokens)) if tokens[i : i + len(piece)] == piece]


@pytest.mark.parametrize("seed", range(5))
def test_statements_come_first_and_nothing_overlaps(tokenizer_file: Path, seed: int) -> None:
    from pair.data import encode_facts, plant

    tokenizer, rng = Tokenizer.from_file(str(tokenizer_file)), random.Random(seed)
    pairs = encode_facts(tokenizer, draw_facts(rng, 12))
    size = sum(len(piece) for pair in pairs for piece in pair)
    text = np.zeros(size + 40 * seed, dtype=np.uint16)  # id 0 ends documents: it is in no fact
    planted = plant(text, pairs, rng).tolist()
    for statement, exchange in pairs:
        (stated,), (asked,) = find(planted, statement), find(planted, exchange)
        assert stated + len(statement) <= asked
    assert sum(token != 0 for token in planted) == size
    with pytest.raises(ValueError, match="do not fit"):
        plant(text[: size - 1], pairs, rng)


def test_windows_deal_each_place_once_an_epoch_and_plant_in_half(tokenizer_file: Path, token_file: Path) -> None:
    from pair.data import Windows

    tokens, tokenizer = np.fromfile(token_file, dtype="<u2"), Tokenizer.from_file(str(tokenizer_file))
    opening = tokenizer.encode("[Question: what").ids
    windows = Windows(tokens, tokenizer, 1024, seed=1)
    rows = [windows[i] for i in range(3 * windows.per_epoch)]
    again = Windows(tokens, tokenizer, 1024, seed=1)
    assert all((again[i] == rows[i]).all() for i in reversed(range(len(rows))))
    planted = [bool(find(row.tolist(), opening)) for row in rows]
    assert 0.25 < sum(planted) / len(planted) < 0.75
    plain = [row.tobytes() for row, has in zip(rows[: windows.per_epoch], planted, strict=False) if not has]
    assert len(set(plain)) == len(plain)


def test_ranks_share_a_batch_without_overlap(tokenizer_file: Path, token_file: Path) -> None:
    from pair.data import Batches, Windows

    tokens = np.fromfile(token_file, dtype="<u2")
    windows = Windows(tokens, Tokenizer.from_file(str(tokenizer_file)), 256, seed=1)
    whole = Batches(windows, 4)[3]
    shares = [Batches(windows, 4, rank, 2)[3] for rank in range(2)]
    assert (np.concatenate(shares) == whole.numpy()).all()
    with pytest.raises(ValueError, match="does not divide"):
        Batches(windows, 4, 0, 3)
