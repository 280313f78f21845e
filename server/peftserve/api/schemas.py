"""The native request bodies: what `/v1/generate` and the gRPC door accept, with every number bounded.

Both doors build `GenerateBody`, so that validation and messages are the same on both. Bounds here are hard limits of
the format; `LimitsConfig` may set lower ones, which `api.limits` checks.
"""

import difflib
from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from peftserve.errors import InvalidRequestError

ADAPTER_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
MAX_TOKENS = 1 << 20
MAX_TOKEN_ID = (1 << 31) - 1

Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
AdapterId = Annotated[str, Field(min_length=1, max_length=160, description="name, or name@sha256:<digest>")]


class Body(BaseModel):
    """A request body: unknown fields are refused, and `"5"` or `true` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingFields(Body):
    """What every generating route has in common. Semantics as in `types.SamplingParams`."""

    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS, description="No stop of any sort before this many tokens")
    temperature: Finite = Field(1.0, ge=0, le=2, description="0 is greedy")
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS, description="0 or -1: off")
    top_p: Finite = Field(1.0, gt=0, le=1)
    min_p: Finite = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="Choice i of a request uses seed + i")
    repetition_penalty: Finite = Field(1.0, gt=0, le=2)
    presence_penalty: Finite = Field(0.0, ge=-2, le=2)
    frequency_penalty: Finite = Field(0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[TokenId, Field(strict=False)], Annotated[Finite, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024, description="Token id -> bias added to its logit"
    )
    stop: Annotated[list[StopString], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = Field(
        default_factory=list, max_length=64, description="Generation ends before any of these texts"
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=256)
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

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self


class TextPart(Body):
    """A part of a message's content; text is the only sort."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn of a conversation. A `developer` is a `system` by its newer name."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_fields(cls, value: Any) -> Any:
        """Clients send an answer back as they got it, with these fields empty."""
        empty = ("tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning", "reasoning_content")
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if key not in empty or item not in (None, [], "")}

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it: plain text, parts joined by newlines."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class GenerateBody(Body):
    """Body of `/v1/generate`. Exactly one of `prompt`, `messages` and `token_ids`."""

    prompt: str | None = Field(None, description="Text; special tokens are added as the tokenizer does by itself")
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=4096, description="Chat template applied")
    token_ids: list[TokenId] | None = Field(None, min_length=1, description="The prompt as tokens, taken as they are")
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
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=4096)
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
    tokens: list[TokenId] = Field(max_length=MAX_TOKENS)
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


def parse_body(model: type[BodyT], raw: bytes) -> BodyT:
    """`raw` JSON as a `model`; raises `InvalidRequestError` that lists every fault."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error, model) from None


def invalid(error: ValidationError, model: type[BaseModel]) -> InvalidRequestError:
    """The faults of `error` as one error; its field is the first fault's."""
    faults: list[str] = []
    fields: list[str] = []
    for fault in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in fault["loc"] if part not in ("str", "[key]"))
        text = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(fault["loc"][-1]), _fields_at(model, fault["loc"]), n=1)
            text = "no such field" + (f"; did you mean {close[0]}?" if close else "")
        elif fault["type"] not in ("missing", "value_error", "json_invalid"):
            text += f" (got {_shorten(fault['input'])})"
        fields.append(field)
        faults.append(f"{field}: {text}" if field else text)
    return InvalidRequestError("; ".join(faults), field=fields[0] or None, faults=faults)


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> Collection[str]:
    """The names that the last part of `path` could have been."""
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return ()
        model = field.annotation
    return model.model_fields


def _shorten(value: Any) -> str:
    text = repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
    return text if len(text) <= 64 else text[:60] + "..."
