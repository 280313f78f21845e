"""The values between a front door and `GenerationService`: one request down, deltas up."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import msgspec

from peftserve.api.schemas import ChatMessage, GenerateBody, Sampling
from peftserve.types import AdapterRef, FinishReason

NATIVE_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text; the tokenizer adds the special tokens that it adds by itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation that the model's chat template turns into text."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Tokens, taken as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One call of a client: `len(prompts) * sampling.n` sequences; prompt p's choice i has index p * n + i.

    `default_max_tokens` applies when `sampling.max_tokens` is None: at most this many, or what the context leaves
    (None: all of it). `adapter_field`, `prompt_field` and `max_tokens_field` are those inputs' names in the client's
    own format, for error messages. `timeout_s` lowers the server's own limit.
    """

    id: str
    tenant: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    adapter_id: str | None = None
    default_max_tokens: int | None = NATIVE_MAX_TOKENS
    adapter_field: str = "adapter_id"
    prompt_field: str = "prompt"
    max_tokens_field: str = "max_tokens"
    sampling_prefix: str = "sampling."
    timeout_s: float | None = None

    @classmethod
    def from_body(cls, body: GenerateBody, *, request_id: str, tenant: str, timeout_s: float | None = None) -> Self:
        """The request that a native body stands for."""
        prompt: Prompt
        if body.prompt is not None:
            field, prompt = "prompt", TextPrompt(body.prompt)
        elif body.messages is not None:
            field, prompt = "messages", ChatPrompt(tuple(body.messages))
        else:
            field, prompt = "token_ids", TokenPrompt(tuple(body.token_ids or ()))
        return cls(
            id=request_id,
            tenant=tenant,
            prompts=(prompt,),
            sampling=body.sampling,
            adapter_id=body.adapter_id,
            prompt_field=field,
            timeout_s=timeout_s,
        )


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token with its log-probability (natural log), its text and the bytes that it stands for.

    `text` has U+FFFD where the bytes are a part of a character only.
    """

    token_id: int
    logprob: float
    text: str
    bytes: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One output position: the token sampled, and the most likely ones, best first."""

    chosen: TokenText
    top: tuple[TokenText, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts over all sequences of a request. `cached_tokens` of the prompts came from the prefix cache.

    Adapters' virtual tokens and tokens past a stop string are not counted.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds. `queued_s` and `adapter_wait_s` are the largest over the sequences; the others count from arrival."""

    queued_s: float
    adapter_wait_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What is known at the end of a request. `adapter` is the version that served it, None for the base."""

    adapter: AdapterRef | None
    usage: Usage
    timings: Timings


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What came for the sequence `index`. `text` may lag behind `token_ids` (half characters, possible stop strings).

    The delta with a `finish_reason` (STOP or LENGTH) is that sequence's last; `stop_reason` is the stop string or the
    id out of `stop_token_ids` that ended it, None for the model's own end. The last delta of a request has `summary`.

    A struct, where the others are dataclasses: one is made for every token, and a frozen dataclass costs ten times as
    much.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    summary: Summary | None = None

    @property
    def usage(self) -> Usage | None:
        return None if self.summary is None else self.summary.usage


def merge(deltas: Sequence[Delta]) -> Delta:
    """Consecutive deltas of one sequence (at least one) as one, nothing lost."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return Delta(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        summary=last.summary,
    )
