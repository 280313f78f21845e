"""What a caller asks for, as the native body that both protocols carry."""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
    name: NotRequired[str]


Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation for the model's chat template."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream` and `chat`; what is left out takes the server's default.

    `adapter_id`: a name or `name@sha256:<digest>`, None for the bare base. `timeout_s` is for the whole answer, and
    the server is told it over gRPC. The others are the server's sampling fields.
    """

    adapter_id: str | None
    timeout_s: float | None
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    logprobs: int
    skip_special_tokens: bool
    include_stop_str_in_output: bool


_NOT_SAMPLING = ("adapter_id", "timeout_s")


def native_body(prompt: Prompt, options: GenerateOptions) -> dict[str, Any]:
    """The body of `POST /v1/generate`, `stream` aside. Raises `TypeError` for an option that does not exist."""
    if unknown := sorted(options.keys() - GenerateOptions.__annotations__.keys()):
        raise TypeError(f"unknown option {', '.join(unknown)}")
    body = _input(prompt)
    if adapter_id := options.get("adapter_id"):
        body["adapter_id"] = adapter_id
    values = cast(dict[str, Any], options)
    sampling = {key: value for key, value in values.items() if key not in _NOT_SAMPLING and value is not None}
    for key in ("stop", "stop_token_ids"):
        if key in sampling:
            sampling[key] = [sampling[key]] if isinstance(sampling[key], str) else list(sampling[key])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = dict(sampling["logit_bias"])
    if sampling:
        body["sampling"] = sampling
    return body


def conversation(messages: str | Sequence[Message], system: str | None = None) -> list[Message]:
    """`messages` as a conversation: a string is one user's turn, `system` goes before all."""
    turns: list[Message] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def _input(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    items = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return {"messages": [dict(cast(Message, item)) for item in items]}
    if all(isinstance(item, int) for item in items):
        return {"token_ids": items}
    raise TypeError("prompt: must be text, token ids, or a list of messages")
