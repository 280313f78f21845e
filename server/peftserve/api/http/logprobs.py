"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Sequence
from typing import Any

from peftserve.api.request import TokenLogprob, TokenText


def completion(entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    """The format of `/v1/completions`: four lists. `offset`: characters that begin in the choice's tokens before."""
    if not entries:
        return None
    offsets: list[int] = []
    for entry in entries:
        # What goes on with a character has the place of that character.
        goes_on = offset > 0 and entry.chosen.bytes[:1] and not num_characters(entry.chosen.bytes[:1])
        offsets.append(offset - bool(goes_on))
        offset += num_characters(entry.chosen.bytes)
    return {
        "tokens": [_name(entry.chosen) for entry in entries],
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        # OpenAI lists the sampled token too; of tokens with one text the likelier one counts.
        "top_logprobs": [
            {_name(token): token.logprob for token in (entry.chosen, *reversed(entry.top))} for entry in entries
        ],
        "text_offset": offsets,
    }


def num_characters(utf8: bytes) -> int:
    """How many characters begin in a piece of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in utf8)


def _name(token: TokenText) -> str:
    """Its text, or where that is no whole characters its bytes, written as OpenAI does: `bytes:\\xf0\\x9f`."""
    try:
        return token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def chat(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """The format of `/v1/chat/completions`: one object per token."""
    if not entries:
        return None
    content = [{**_token(entry.chosen), "top_logprobs": [_token(token) for token in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}
