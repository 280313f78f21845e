"""What the clients return: the same over HTTP and gRPC. Counts in tokens, times in seconds, sizes in bytes."""

import datetime as dt
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length"]


class TokenText(msgspec.Struct, frozen=True):
    """A token, its log-probability (natural log, before penalties and temperature), its text and bytes.

    `token` has U+FFFD where the bytes are a part of a character only. `bytes` is a list of numbers, as in OpenAI's
    format.
    """

    token_id: int
    token: str
    logprob: float
    bytes: list[int] = []


class TokenLogprob(TokenText, frozen=True):
    """One position: the token sampled, and the most likely ones, best first."""

    top: list[TokenText] = []


class Usage(msgspec.Struct, frozen=True):
    """Over all choices; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Timings(msgspec.Struct, frozen=True):
    """The server's clock: waiting for a place, for the adapter, and from arrival to the first and last token."""

    queued_s: float
    adapter_wait_s: float
    first_token_s: float
    total_s: float


class AdapterVersion(msgspec.Struct, frozen=True):
    """The version of an adapter that served a request."""

    name: str
    kind: str
    digest: str


class Chunk(msgspec.Struct, frozen=True):
    """What is new for the choice `index`. The last chunk of a choice has a `finish_reason`; the last of all also has
    `usage`, `timings` and `adapter` (None for the bare base model).

    `text` may lag behind `token_ids`: half characters and what may become a stop string are held back.
    `stop_reason` is the stop string or stop token that ended the choice, None for the model's own end.
    """

    id: str
    index: int
    text: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    adapter: AdapterVersion | None = None


class Choice(msgspec.Struct, frozen=True):
    """One whole completion."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None


class Result(msgspec.Struct, frozen=True):
    """An answer: `n` choices, ordered by index. `id` finds the request in the server's log."""

    id: str
    choices: list[Choice]
    usage: Usage
    timings: Timings | None = None
    adapter: AdapterVersion | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class Residency(msgspec.Struct, frozen=True):
    """Where the engine holds an adapter, and how many requests use it now."""

    state: str
    refs: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    load_s: float | None = None
    error: str | None = None


class Adapter(msgspec.Struct, frozen=True):
    """A stored adapter. `digest` is its identity; `details` depend on the kind (rank, virtual tokens, ...)."""

    adapter_id: str
    kind: str
    digest: str
    pinned: bool
    created_at: dt.datetime
    size_bytes: int
    base_model_name: str = ""
    details: dict[str, Any] = {}
    residency: Residency | None = None


class Model(msgspec.Struct, frozen=True):
    """An entry of `/v1/models`: the base model, or an adapter with the base as `parent`."""

    id: str
    parent: str | None = None
    max_model_len: int | None = None


def collect(chunks: Sequence[Chunk]) -> Result:
    """All chunks of an answer as one result; raises `ValueError` when the last is missing."""
    if not chunks or (last := chunks[-1]).usage is None:
        raise ValueError("the answer is not complete")
    by_index: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_index.setdefault(chunk.index, []).append(chunk)
    choices = [_choice(parts) for _, parts in sorted(by_index.items())]
    return Result(last.id, choices, last.usage, last.timings, last.adapter)


def _choice(chunks: Sequence[Chunk]) -> Choice:
    last = chunks[-1]
    if last.finish_reason is None:
        raise ValueError(f"choice {last.index} has no end")
    return Choice(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=[position for chunk in chunks for position in chunk.logprobs or ()] or None,
    )
