"""The native request bodies: what `/v1/generate` and the gRPC door accept, with every number bounded.

Both doors build `GenerateBody`, so that validation and messages are the same on both. Bounds here are hard limits of
the format; `LimitsConfig` may set lower ones, which `api.limits` checks.

Lists end at their first fault: a body of a million bad elements must cost no more than one of a million good ones.
"""

import re
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

ADAPTER_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1
_MAX_BIASES = 1024
_MAX_MESSAGES = 4096
_MAX_PARTS = 4096

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
AdapterId = Annotated[str, Field(min_length=1, max_length=160, description="name, or name@sha256:<digest>")]


class Body(BaseModel):
    """A request body: unknown fields are refused, and `"5"` or `true` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _few_biases(value: Any) -> Any:
    """Before pydantic, which counts them after it has looked at each, and reads "05" and "5 " as one and the same."""
    if not isinstance(value, dict):
        return value
    if len(value) > _MAX_BIASES:
        raise ValueError(f"{len(value)} entries, and the limit is {_MAX_BIASES}")
    for key in value:
        if isinstance(key, str) and re.fullmatch(r"-?(0|[1-9][0-9]*)", key) is None:
            raise ValueError(f"{key[:32]!r} is no token id; write it in digits, without anything before or after")
    return value


class SamplingFields(Body):
    """What every generating route has in common. Semantics as in `types.SamplingParams`."""

    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS, description="No stop of any sort before this many tokens")
    temperature: Finite = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS, description="0 or -1: off")
    top_p: Finite = Field(1.0, gt=0, le=1)
    min_p: Finite = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, description="Choice i of a request uses seed + i")
    repetition_penalty: Finite = Field(1.0, gt=0, le=2)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[Annotated[TokenId, Field(strict=False)], Annotated[Finite, Field(ge=-100, le=100)]],
        Field(max_length=_MAX_BIASES),
        BeforeValidator(_few_biases, json_schema_input_type=dict[int, float]),
    ] = Field(default_factory=dict, description="Token id -> bias added to its logit")
    stop: Annotated[list[StopString], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        default_factory=list, max_length=64, fail_fast=True, description="Generation ends before any of these texts"
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=256, fail_fast=True)
    ignore_eos: bool = Field(False, description="Go on past the model's own end-of-sequence tokens")
    n: int = Field(1, ge=1, le=128, description="Choices per prompt")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text")
    include_stop_str_in_output: bool = False


class Sampling(SamplingFields):
    """The native `sampling` object."""

    max_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Without it: 256, or what the context leaves if that is less"
    )
    logprobs: int | None = Field(
        None, ge=0, le=100, description="Alternatives reported per token beside the sampled one; null for none at all"
    )


class TextPart(Body):
    """A part of a message's content; text is the only sort."""

    type: Literal["text"]
    text: str


def _content_shape(value: Any) -> str:
    return "[parts]" if isinstance(value, list) else "[text]"


class ChatMessage(Body):
    """One turn of a conversation. A `developer` is a `system` by its newer name."""

    role: Literal["system", "developer", "user", "assistant"]
    # By shape, so that a fault is told once, and not once for each shape that it might have been.
    content: Annotated[
        Annotated[str, Tag("[text]")]
        | Annotated[list[TextPart], Field(max_length=_MAX_PARTS, fail_fast=True), Tag("[parts]")],
        Discriminator(_content_shape),
    ]
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_fields(cls, value: Any) -> Any:
        """Clients send an answer back as they got it, with these fields empty."""
        empty = ("tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning", "reasoning_content")
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if key not in empty or item not in (None, [], "")}

    @property
    def size(self) -> int:
        """Characters of the content."""
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(part.text) for part in self.content)

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it: plain text, parts joined by newlines."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)]


class GenerateBody(Body):
    """Body of `/v1/generate`. Exactly one of `prompt`, `messages` and `token_ids`."""

    prompt: str | None = Field(None, description="Text; special tokens are added as the tokenizer does by itself")
    messages: Messages | None = Field(None, description="Chat template applied")
    token_ids: TokenIds | None = Field(None, min_length=1, description="The prompt as tokens, taken as they are")
    adapter_id: AdapterId | None = Field(None, description="None: the bare base model")
    sampling: Sampling = Field(default_factory=Sampling)
    stream: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [key for key in ("prompt", "messages", "token_ids") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of prompt, messages and token_ids; found {found}")
        return self


class TokenizeBody(Body):
    """Body of `/tokenize`. Exactly one of `prompt` and `messages`."""

    model: str | None = Field(None, description="Ignored: all adapters share the base's tokenizer")
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class DetokenizeBody(Body):
    """Body of `/detokenize`."""

    model: str | None = Field(None, description="Ignored: all adapters share the base's tokenizer")
    tokens: TokenIds
    skip_special_tokens: bool = False


class PatchAdapterBody(Body):
    """Body of `PATCH /v1/adapters/{id}`."""

    pinned: bool


class LoadAdapterBody(Body):
    """vLLM's `/v1/load_lora_adapter`; the path must lie under a folder of `adapter_roots`."""

    lora_name: str = Field(min_length=1, max_length=64)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = Field(False, description="Replace an adapter of this name")


class UnloadAdapterBody(Body):
    """vLLM's `/v1/unload_lora_adapter`."""

    lora_name: str = Field(min_length=1, max_length=64)
    lora_int_id: int | None = Field(None, description="Ignored: adapters are found by name")


BodyT = TypeVar("BodyT", bound=BaseModel)
