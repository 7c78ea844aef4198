"""Text comes in whole characters and ends before a stop string, wherever tokens are cut."""

import pytest

from solar_jax.decoding.stops import TextStream, check_stops
from solar_jax.errors import UserError
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()  # a token a byte: every character and stop string lies across tokens


def streamed(text: str, *stops: str) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stops)
    pieces = []
    for token in TOKENIZER.encode(text).ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@pytest.mark.parametrize("text", ["plain", "Straße, naïve", "日本語 text", "🙂🙃", "a\N{REPLACEMENT CHARACTER}b", ""])
def test_pieces_add_up_to_the_text_and_none_has_half_a_character(text):
    pieces, stream = streamed(text)
    assert "".join(pieces) == stream.text == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("a stop here", ("stop",), "a "),
        ("ababac", ("abac",), "ab"),
        ("日本語。次", ("。",), "日本語"),
        ("x🙂y", ("🙂",), "x"),
        ("first second", ("second", "first s"), ""),
        ("nothing", ("zz", "nothingx"), "nothing"),
        ("stop", ("stop",), ""),
    ],
)
def test_text_ends_before_a_stop_string(text, stops, expected):
    pieces, stream = streamed(text, *stops)
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == (expected != text)


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else():
    stream = TextStream(TOKENIZER, ("END",))
    found = [stream.push(token) for token in TOKENIZER.encode("aEbENx").ids]
    assert found == ["a", "", "Eb", "", "", "ENx"]


def test_bytes_that_are_no_character_are_shown_at_the_end():
    stream = TextStream(TOKENIZER)
    for token in TOKENIZER.encode("é").ids[:1]:
        assert stream.push(token) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("wrong", [5, [""], ["a", 3], {"a": 1}, None, ""])
def test_a_stop_that_is_no_text_is_named(wrong):
    with pytest.raises(UserError, match="stop must be a string or a list of strings"):
        check_stops(wrong)
