"""Detokenising and stop strings together."""

from peftserve.text.stream import TextStream
from peftserve.text.tokenizer import Tokenizer


def push_all(stream: TextStream, token_ids: list[int]) -> tuple[str, str | None, int]:
    """The text, the stop string, and how many tokens were pushed."""
    texts = []
    for token_id in token_ids:
        text, stop = stream.push(token_id)
        texts.append(text)
        if stop is not None:
            return "".join(texts), stop, stream.num_tokens
    text, stop = stream.finish()
    return "".join(texts) + text, stop, stream.num_tokens


def test_a_stop_string_across_tokens(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("one; two")
    text, stop, used = push_all(TextStream(byte_level, stop=["; t"]), token_ids)
    assert (text, stop) == ("one", "; t")
    assert byte_level.decode(token_ids[:used]).startswith("one; t")


def test_included(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, stop=["; t"], include_stop=True)
    assert push_all(stream, byte_level.encode("one; two"))[:2] == ("one; t", "; t")


def test_a_stop_string_of_several_bytes_a_character(byte_level: Tokenizer) -> None:
    assert push_all(TextStream(byte_level, stop=["😀"]), byte_level.encode("ok 😀 no"))[:2] == ("ok ", "😀")


def test_min_tokens_lets_early_stops_pass(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("x;y;z")
    assert len(token_ids) == 5
    assert push_all(TextStream(byte_level, stop=[";"], min_tokens=2), token_ids)[:2] == ("x;y", ";")


def test_a_stop_completed_only_by_the_end(byte_level: Tokenizer) -> None:
    """Half a character at the end becomes U+FFFD, which may itself be asked for."""
    token_ids = byte_level.encode("a€")[:-1]
    assert push_all(TextStream(byte_level, stop=["\ufffd"]), token_ids)[:2] == ("a", "\ufffd")


def test_held_text_comes_at_the_end(byte_level: Tokenizer) -> None:
    assert push_all(TextStream(byte_level, stop=["abc"]), byte_level.encode("xab"))[:2] == ("xab", None)
