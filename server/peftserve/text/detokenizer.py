"""Tokens to text, one by one, never half a character."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from peftserve.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """The texts of `push` and the final `flush`, joined, are the tokenizer's decoding of all tokens at once."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""


def detokenizer(tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> Detokenizer:
    """The detokenizer for this tokenizer's way of decoding."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
    if tokenizer.is_byte_level:
        return ByteLevelDetokenizer(tokenizer, skipped)
    return WindowDetokenizer(tokenizer, skipped)


class ByteLevelDetokenizer:
    """GPT-2-style vocabularies (Llama 3, Qwen, SmolLM): each token is bytes, and the bytes are UTF-8. O(1) a token."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = skipped
        # Python's "replace" and Rust's `from_utf8_lossy` both replace maximal subparts (Unicode 15, section 3.9).
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """Any other decoder (SentencePiece with byte fallback: Llama 2, Mistral), through a sliding window.

    A token's text may depend on its neighbours (a leading space, a run of byte tokens), so the window holds the last
    emitted piece as context and what came since; the text is what the window says beyond the context. After text-
    generation-inference's `decode_token`.
    """

    # A character is 4 bytes at most: text still incomplete after 3 byte tokens and a fourth will never be whole.
    _MAX_INCOMPLETE = 3

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
        self._incomplete = 0

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or self._tokenizer.token(token_id) is None:
            return ""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) and self._incomplete < self._MAX_INCOMPLETE:
            self._incomplete += 1
            return ""
        self._incomplete = 0
        return self._emit(text)

    def flush(self) -> str:
        if not self._pending:
            return ""
        return self._emit(self._decode(self._context + self._pending))

    def _emit(self, text: str) -> str:
        new = text[len(self._context_text) :]
        if new:
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        # Special tokens that reach the window are wanted.
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
