"""OpenAI's completions format where tokens are parts of characters."""

from itertools import pairwise

from peftserve.api.http import logprobs
from peftserve.api.request import TokenLogprob, TokenText


def _entry(*alternatives: bytes) -> TokenLogprob:
    texts = [TokenText(i, -float(i + 1), raw.decode(errors="replace"), raw) for i, raw in enumerate(alternatives)]
    return TokenLogprob(texts[0], tuple(texts))


def test_offsets_are_places_in_the_text_and_no_two_tokens_are_called_the_same() -> None:
    emoji = "😀".encode()
    pieces = [b"a ", emoji[:1], emoji[1:3], emoji[3:] + b"b", "日本".encode()[:4], "日本".encode()[4:], b"c"]
    entries = [_entry(piece, b"\xf0", b"\x9f", b"\xe6") for piece in pieces]
    made = logprobs.completion(entries, 0)
    assert made is not None
    text = b"".join(pieces).decode()
    assert made["text_offset"] == [0, 2, 2, 2, 4, 5, 6]
    assert [text[offset] for offset in made["text_offset"]] == list("a 😀😀😀日本c".replace(" ", ""))
    assert made["tokens"][:3] == ["a ", "bytes:\\xf0", "bytes:\\x9f\\x98"]
    assert [len(top) for top in made["top_logprobs"]] == [4, 3, 4, 4, 4, 4, 4]


def test_streamed_offsets_go_on() -> None:
    pieces = ["é".encode()[:1], "é".encode()[1:], b"x"]
    whole = logprobs.completion([_entry(piece) for piece in pieces], 5)
    assert whole is not None
    parts, offset = [], 5
    for piece in pieces:
        part = logprobs.completion([_entry(piece)], offset)
        assert part is not None
        parts += part["text_offset"]
        offset += logprobs.num_characters(piece)
    assert parts == whole["text_offset"] == [5, 5, 6]
    assert all(a <= b for a, b in pairwise(parts))
