"""The shapes of answers, for the OpenAPI document. Handlers write plain dicts: a model per token would cost more than
the token. Tests hold the answers to these models."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Answer):
    message: str
    type: str = Field(description="OpenAI's class of error, e.g. invalid_request_error")
    param: str | None = Field(description="The offending field, e.g. sampling.top_p")
    code: str = Field(description="This server's name of the error, e.g. adapter_not_found")
    faults: list[str] = Field(description="Every fault, where there may be several")
    request_id: str


class ErrorAnswer(_Answer):
    error: ErrorDetail


class Token(_Answer):
    token_id: int
    token: str
    bytes: list[int]
    logprob: float


class TokenAlternatives(Token):
    top: list[Token] = Field(description="The most likely tokens, best first")


class NativeUsage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = Field(description="Prompt tokens that the prefix cache answered")


class NativeTimings(_Answer):
    """Seconds."""

    queued_s: float
    adapter_wait_s: float
    first_token_s: float
    total_s: float


class AdapterVersion(_Answer):
    name: str
    kind: str
    digest: str


class NativeChoice(_Answer):
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenAlternatives] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = Field(description="The stop string or stop token id; null for the model's own end")


class GenerateResponse(_Answer):
    id: str
    model: str
    choices: list[NativeChoice]
    usage: NativeUsage
    timings: NativeTimings
    adapter: AdapterVersion | None


class GenerateChunk(NativeChoice):
    """One event. The last of a stream has the optional fields."""

    id: str
    model: str | None = None
    usage: NativeUsage | None = None
    timings: NativeTimings | None = None
    adapter: AdapterVersion | None = None


class CachedTokens(_Answer):
    cached_tokens: int


class OpenAIUsage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class _OpenAIAnswer(_Answer):
    id: str
    created: int
    model: str


class CompletionResponse(_OpenAIAnswer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class CompletionChunk(_OpenAIAnswer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = None


class ChatToken(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenAlternatives(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(_Answer):
    content: list[ChatTokenAlternatives]
    refusal: None


class AssistantMessage(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatResponse(_OpenAIAnswer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: OpenAIUsage


class MessageDelta(_Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Answer):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatChunk(_OpenAIAnswer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None


class Model(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = Field(description="The base model's name, for an adapter")
    root: str = Field(description="The name without its version")
    max_model_len: int | None


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class Residency(_Answer):
    state: str = Field(description="loading, host, device or failed")
    refs: int = Field(description="Requests that use it now")
    host_bytes: int
    device_bytes: int
    load_s: float | None
    error: str | None


class AdapterAnswer(_Answer):
    adapter_id: str
    object: Literal["adapter"]
    kind: str
    digest: str = Field(description="sha256 over config and weights; also the ETag")
    pinned: bool
    created_at: datetime
    size_bytes: int
    base_model_name: str = Field(description="What the adapter's config says it was trained on, or empty")
    details: dict[str, Any]
    residency: Residency | None = Field(description="Null while it lies in the store only")


class AdapterList(_Answer):
    object: Literal["list"]
    data: list[AdapterAnswer]


class Health(_Answer):
    status: str


class Version(_Answer):
    version: str
    model: str
    kinds: list[str]


class Tokens(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(_Answer):
    prompt: str
