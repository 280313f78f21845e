"""Deltas, joined, are the full decoding; no delta has half a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftserve.text.detokenizer import ByteLevelDetokenizer, WindowDetokenizer, detokenizer
from peftserve.text.tokenizer import Tokenizer

texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé€😀한\u200d\ufffd ▁")), max_size=40
)


def decode(tokenizer: Tokenizer, token_ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    stream = detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*(stream.push(each) for each in token_ids), stream.flush()]


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.backend.token_to_id(token)
    assert found is not None
    return found


@given(texts)
def test_byte_level_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    deltas = decode(byte_level, byte_level.encode(text))
    assert "".join(deltas) == text
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in deltas)


@given(texts)
def test_sentencepiece_text_comes_back(sentencepiece: Tokenizer, text: str) -> None:
    token_ids = sentencepiece.encode(text, add_special_tokens=False)
    deltas = decode(sentencepiece, token_ids)
    assert "".join(deltas) == sentencepiece.decode(token_ids)
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in deltas)


@given(st.lists(st.integers(0, 330), max_size=60), st.booleans())
def test_byte_level_any_tokens_equal_the_full_decoding(byte_level: Tokenizer, token_ids: list[int], skip: bool) -> None:
    """Also where the bytes are no UTF-8, and for ids outside the vocabulary."""
    deltas = decode(byte_level, token_ids, skip_special_tokens=skip)
    assert "".join(deltas) == byte_level.decode(token_ids, skip_special_tokens=skip)


def test_each_strategy_is_chosen(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert isinstance(detokenizer(byte_level), ByteLevelDetokenizer)
    assert isinstance(detokenizer(sentencepiece), WindowDetokenizer)


def test_a_character_comes_with_its_last_byte(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("😀")
    assert len(token_ids) == 4
    assert decode(byte_level, token_ids) == ["", "", "", "😀", ""]


def test_an_unfinished_character_is_a_replacement_character_at_the_end(
    byte_level: Tokenizer, sentencepiece: Tokenizer
) -> None:
    assert decode(byte_level, byte_level.encode("a€")[:-1]) == ["a", "", "", "\ufffd"]
    lead = token_id(sentencepiece, "<0xE2>")
    assert "".join(decode(sentencepiece, [lead])) == "\ufffd"


def test_invalid_bytes_are_not_held_back_for_ever(sentencepiece: Tokenizer) -> None:
    invalid = token_id(sentencepiece, "<0xFF>")
    deltas = decode(sentencepiece, [invalid] * 8)
    assert "".join(deltas[:5]) == "\ufffd" * 4


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(byte_level: Tokenizer, sentencepiece: Tokenizer, skip: bool) -> None:
    for tokenizer, special in ((byte_level, "<|im_end|>"), (sentencepiece, "</s>")):
        token_ids = [*tokenizer.encode("he", add_special_tokens=False), token_id(tokenizer, special)]
        text = "".join(decode(tokenizer, token_ids, skip_special_tokens=skip))
        assert text == ("he" if skip else f"he{special}")


def test_special_tokens_do_not_break_the_spacing_of_their_neighbours(sentencepiece: Tokenizer) -> None:
    bos = token_id(sentencepiece, "<s>")
    the = token_id(sentencepiece, "▁the")
    assert decode(sentencepiece, [bos, the, bos, the]) == ["", "the", "", " the", ""]
