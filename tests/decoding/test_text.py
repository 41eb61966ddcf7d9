"""The text stream: whole characters only, nothing past a stop string, nothing lost, whatever the tokens cut through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outrider.decoding.text import TextStream

LETTERS = st.text(alphabet="ab é“𝄞\n", max_size=14)


class Pieces:
    """A tokenizer whose token i is the i-th of some byte strings: it may cut a character anywhere."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode("utf-8", errors="replace")


@st.composite
def cut_bytes(draw, content):
    """Byte strings that join to the drawn content."""
    data = draw(content)
    cuts = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=len(data)))) if len(data) > 1 else []
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@st.composite
def stops_for(draw, pieces):
    """Stop strings, most of them cut out of the text itself."""
    text = part(pieces)
    spans = draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(1, 4)), max_size=3))
    return (
        *(text[at : at + n] for at, n in spans if text[at : at + n]),
        *draw(st.lists(st.text("ab é“𝄞", min_size=1), max_size=1)),
    )


def part(pieces):
    """The whole characters of some pieces."""
    return b"".join(pieces).decode("utf-8", errors="ignore")


VALID = cut_bytes(LETTERS.map(str.encode))
BROKEN = cut_bytes(st.builds(lambda text, n: text.encode()[: n % 40], LETTERS, st.integers(1, 39)))  # may end in a character
VALID_AND_STOPS = VALID.flatmap(lambda pieces: st.tuples(st.just(pieces), stops_for(pieces)))
BROKEN_AND_STOPS = BROKEN.flatmap(lambda pieces: st.tuples(st.just(pieces), stops_for(pieces)))


def run(pieces, stop=()):
    """Push every piece; returns (the stream, chunks shown on the way, last chunk, tokens pushed)."""
    stream, chunks = TextStream(Pieces(pieces), stop), []
    for token in range(len(pieces)):
        stopped = stream.push(token)
        chunks.append(stream.take(final=stopped))
        if stopped:
            return stream, chunks, "", token + 1
    return stream, chunks, stream.take(final=True), len(pieces)


@given(VALID_AND_STOPS)
def test_valid_text(case):
    pieces, stop = case
    text = b"".join(pieces).decode()
    found = [at for s in stop if (at := text.find(s)) >= 0]
    stream, chunks, last, pushed = run(pieces, stop)
    shown = "".join(chunks) + last
    assert shown == stream.text
    assert "\ufffd" not in shown
    if found:  # ends at the first token that completes a stop string, before the earliest one complete by then
        first = next(n for n in range(len(pieces) + 1) if any(s in part(pieces[:n]) for s in stop))
        assert (stream.stopped, pushed) == (True, first)
        by_then = part(pieces[:first])
        assert shown == text[: min(by_then.find(s) for s in stop if s in by_then)]
    else:
        assert (stream.stopped, shown) == (False, text)


@given(cut_bytes(st.binary(min_size=1, max_size=12)))
def test_any_bytes_give_the_text_that_decoding_all_at_once_gives(pieces):
    stream, chunks, last, _ = run(pieces)
    assert "".join(chunks) + last == stream.text == b"".join(pieces).decode("utf-8", errors="replace")


@given(BROKEN_AND_STOPS)
def test_text_never_holds_a_stop_string(case):
    """Not even when the run ends while the last character is incomplete, and the rest is flushed."""
    pieces, stop = case
    stream, chunks, last, _ = run(pieces, stop)
    assert not any(s in stream.text for s in stop)
    assert "".join(chunks) + last == stream.text


@given(VALID_AND_STOPS)
def test_what_was_shown_is_never_taken_back(case):
    pieces, stop = case
    stream, shown = TextStream(Pieces(pieces), stop), ""
    for token in range(len(pieces)):
        stopped = stream.push(token)
        shown += stream.take()
        assert stream.text.startswith(shown)
        if stopped:
            break


@pytest.mark.parametrize(
    "pieces, stop, chunks, last",
    [
        pytest.param(["ab", "cd", "ef"], (), ["ab", "cd", "ef"], "", id="no stop"),
        pytest.param(["ab", "cd", "ef"], ("bcde",), ["a", "", ""], "", id="across three tokens"),
        pytest.param(["ab", "cX", "ef"], ("bcde",), ["a", "bcX", "ef"], "", id="held back, then shown"),
        pytest.param(["aab", "aa"], ("aaac",), ["aab", ""], "aa", id="held back until the end"),
        pytest.param(["xab", "ab"], ("abab", "b"), ["xa"], "", id="first of two stops"),
    ],
)
def test_what_is_held_back(pieces, stop, chunks, last):
    _, found, rest, _ = run([piece.encode() for piece in pieces], stop)
    assert (found, rest) == (chunks, last)


def test_stop_string_in_the_token_that_ends_inside_a_character():
    """Byte-level vocabularies have tokens such as a space and half a quotation mark: the space alone is a stop string."""
    quote = "“".encode()
    stream, chunks, last, _ = run([b"Hi", b" " + quote[:2]], (" ",))
    assert "".join(chunks) + last == stream.text == "Hi"


def test_incomplete_characters_wait_for_their_last_byte():
    clef = "𝄞".encode()
    _, chunks, last, _ = run([b"a" + clef[:1], clef[1:2], clef[2:] + b"b"])
    assert "".join(chunks[:2]) in ("", "a")
    assert "".join(chunks) + last == "a𝄞b"


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None)
    assert [stream.push(token) for token in (1, 2)] == [False, False]
    assert (stream.take(final=True), stream.text) == ("", "")


def test_real_tokenizer(byte_tokenizer):
    text = "Ein Bär sagt “é”."
    stream = TextStream(byte_tokenizer, ("”.",))
    shown = ""
    for token in byte_tokenizer(text)["input_ids"]:
        stopped = stream.push(token)
        shown += stream.take()
    assert (shown, stopped) == ("Ein Bär sagt “é", True)


def test_the_first_space_is_kept_where_a_tokenizer_drops_leading_ones():
    """Tokenizers of the SentencePiece kind decode "▁word" without its space when nothing stands before it."""
    pieces = {"▁It": 0, "▁was": 1, "▁dark": 2, "▁": 3}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    metaspace = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    stream = TextStream(metaspace, before=[0])
    for token in (1, 2):
        stream.push(token)
    assert stream.take(final=True) == " was dark"
    alone = TextStream(metaspace)
    alone.push(1)
    assert alone.take(final=True) == "was"
