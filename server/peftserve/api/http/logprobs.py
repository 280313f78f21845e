"""Log-probabilities in OpenAI's two formats."""

from collections.abc import Sequence
from typing import Any

from peftserve.api.request import TokenLogprob, TokenText


def completion(entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    """The format of `/v1/completions`: four lists. `offset`: characters of the choice's tokens before these."""
    if not entries:
        return None
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.chosen.text)
    return {
        "tokens": [entry.chosen.text for entry in entries],
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        # OpenAI lists the sampled token too; of tokens with one text (parts of characters) the likelier one counts.
        "top_logprobs": [
            {token.text: token.logprob for token in (entry.chosen, *reversed(entry.top))} for entry in entries
        ],
        "text_offset": offsets,
    }


def chat(entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """The format of `/v1/chat/completions`: one object per token."""
    if not entries:
        return None
    content = [{**_token(entry.chosen), "top_logprobs": [_token(token) for token in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}
