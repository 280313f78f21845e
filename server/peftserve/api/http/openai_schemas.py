"""Bodies of OpenAI's routes. What would change the answer and is not supported is refused by name."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Discriminator, Field, Tag, model_validator

from peftserve.api.request import ChatPrompt, GenerateRequest, Prompt, TextPrompt, TokenPrompt
from peftserve.api.schemas import MAX_TOKENS, AdapterId, Body, Messages, Sampling, SamplingFields, TokenIds
from peftserve.errors import InvalidRequestError

_COMPLETION_MAX_TOKENS = 16  # OpenAI's default
_MAX_PROMPTS = 4096

# Bookkeeping of OpenAI's own service: no answer depends on it.
_IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)

# Not supported, with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "prompt_logprobs": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "use_beam_search": (False,),
    "best_of": (1,),
}


class StreamOptions(Body):
    """`include_usage` adds an event with the token counts before the end."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Ignored")


class _OpenAIBody(SamplingFields):
    """What both routes share."""

    model: str = Field(min_length=1, max_length=256, description="The base model's name, or an adapter_id")
    adapter_id: AdapterId | None = Field(None, description="An adapter, where `model` is the base's name")
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    stream: bool = False
    stream_options: StreamOptions | None = None

    _default_max_tokens: ClassVar[int | None] = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields.keys() | _IGNORED | _REFUSED.keys()
        value = {key: item for key, item in value.items() if item is not None or key not in known}
        refused = [key for key in _REFUSED if key in value and not _asks_for_nothing(key, value)]
        if refused:
            raise ValueError("not supported by this server: " + ", ".join(refused))
        return {key: item for key, item in value.items() if key not in _IGNORED and key not in _REFUSED}

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def request(
        self, prompts: tuple[Prompt, ...], prompt_field: str, logprobs: int | None, *, id_: str, tenant: str, base: str
    ) -> GenerateRequest:
        """`base` is the base model's name: any other `model` is an adapter."""
        adapter_id, field = self.adapter_id, "adapter_id"
        if self.model != base:
            if adapter_id not in (None, self.model):
                raise InvalidRequestError(
                    f"model: {self.model!r} is not the base model {base!r}, and adapter_id names another adapter, "
                    f"{adapter_id!r}",
                    field="model",
                )
            adapter_id, field = self.model, "model"
        shared = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return GenerateRequest(
            id=id_,
            tenant=tenant,
            prompts=prompts,
            sampling=Sampling.model_construct(**shared, max_tokens=self._max_tokens(), logprobs=logprobs),
            adapter_id=adapter_id,
            default_max_tokens=self._default_max_tokens,
            adapter_field=field,
            prompt_field=prompt_field,
            max_tokens_field=self._max_tokens_field(),
            sampling_prefix="",
        )

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def _max_tokens_field(self) -> str:
        return "max_tokens"


def _asks_for_nothing(key: str, body: dict[str, Any]) -> bool:
    # `best_of` equal to `n` picks the best n of n.
    return body[key] in _REFUSED[key] or (key == "best_of" and body[key] == body.get("n", 1))


def _prompt_shape(value: Any) -> str | None:
    """The sort of prompt by its first element: a fault is then told once, not for each sort that it might have been."""
    if not isinstance(value, list):
        return "[text]" if isinstance(value, str) else None
    first = value[0] if value else ""
    shapes = (("[texts]", str), ("[tokens]", int), ("[token_lists]", list))
    return next((shape for shape, type_ in shapes if isinstance(first, type_)), None)


_SeveralPrompts = Field(max_length=_MAX_PROMPTS, fail_fast=True)
_PromptField = Annotated[
    Annotated[str, Tag("[text]")]
    | Annotated[list[str], _SeveralPrompts, Tag("[texts]")]
    | Annotated[TokenIds, Tag("[tokens]")]
    | Annotated[list[TokenIds], _SeveralPrompts, Tag("[token_lists]")],
    Discriminator(
        _prompt_shape,
        custom_error_type="prompt_shape",
        custom_error_message="must be a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]


class CompletionBody(_OpenAIBody):
    """Body of `/v1/completions`. Several prompts give `n` choices each, in their order."""

    prompt: _PromptField = Field(description="Text or tokens, one or several")
    logprobs: int | None = Field(None, ge=0, le=100)

    _default_max_tokens = _COMPLETION_MAX_TOKENS

    def to_request(self, *, id_: str, tenant: str, base: str) -> GenerateRequest:
        """The request that this body stands for."""
        return self.request(self._prompts(), "prompt", self.logprobs, id_=id_, tenant=tenant, base=base)

    def _prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (TextPrompt(self.prompt),)
        if not self.prompt:
            raise InvalidRequestError("prompt: the list is empty", field="prompt")
        if isinstance(self.prompt[0], int):
            return (TokenPrompt(tuple(self.prompt)),)
        several = self.prompt
        return tuple(TextPrompt(item) if isinstance(item, str) else TokenPrompt(tuple(item)) for item in several)


class ChatCompletionBody(_OpenAIBody):
    """Body of `/v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="`max_tokens` by its newer name")
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same setting, and they differ")
        return self

    def to_request(self, *, id_: str, tenant: str, base: str) -> GenerateRequest:
        """The request that this body stands for."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        prompt = ChatPrompt(tuple(self.messages))
        return self.request((prompt,), "messages", logprobs, id_=id_, tenant=tenant, base=base)

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def _max_tokens_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
