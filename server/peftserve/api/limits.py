"""Checks of a request against this server's limits and model: numbers that `api.schemas` cannot know."""

from collections.abc import Sequence

from peftserve.api.request import GenerateRequest
from peftserve.config import LimitsConfig
from peftserve.engine.messages import EngineInfo
from peftserve.errors import InvalidRequestError, PromptTooLongError


def check_sampling(request: GenerateRequest, limits: LimitsConfig, info: EngineInfo) -> None:
    """Raise `InvalidRequestError` with every number over this server's limits, every token outside the vocabulary."""
    sampling, vocab_size = request.sampling, info.spec.vocab_size
    outside = f"outside the vocabulary of {vocab_size} tokens"
    faults: list[tuple[str, str]] = []
    for name, value, limit in (
        ("n", sampling.n, limits.max_n),
        ("logprobs", sampling.logprobs or 0, limits.max_logprobs),
        ("stop", len(sampling.stop), limits.max_stop_strings),
    ):
        if value > limit:
            what = " strings" if name == "stop" else ""
            faults.append((name, f"{value}{what}, and this server's limit is {limit}"))
    faults += [("stop_token_ids", f"{id_} is {outside}") for id_ in sampling.stop_token_ids if id_ >= vocab_size]
    faults += [("logit_bias", f"{id_} is {outside}") for id_ in sampling.logit_bias if id_ >= vocab_size]
    count = len(request.prompts) * sampling.n
    if count > limits.max_waiting:
        faults.append(
            ("n", f"{len(request.prompts)} prompts x {sampling.n} are over the limit of {limits.max_waiting}")
        )
    if faults:
        texts = [f"{request.sampling_prefix}{name}: {text}" for name, text in faults]
        raise InvalidRequestError("; ".join(texts), field=request.sampling_prefix + faults[0][0], faults=texts)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> list[int]:
    """The prompt's tokens as a list; raises `InvalidRequestError` for none, or one outside the vocabulary."""
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{field}: token {token_id} at position {position} is outside the vocabulary of {vocab_size} tokens",
                field=field,
            )
    return check_not_empty(list(token_ids), field)


def check_not_empty(token_ids: list[int], field: str) -> list[int]:
    if not token_ids:
        raise InvalidRequestError(f"{field}: is empty; the model needs at least one token", field=field)
    return token_ids


def resolve_max_tokens(request: GenerateRequest, prompt: int, virtual: int, context: int) -> int:
    """`max_tokens`, or its default; raises `PromptTooLongError` if all together exceed the context. All in tokens."""
    sampling = request.sampling
    room = context - prompt - virtual
    wanted = sampling.max_tokens
    if wanted is None:
        default = room if request.default_max_tokens is None else request.default_max_tokens
        # At least one, and as many as min_tokens asks for: too little room is then an error, not a shorter answer.
        wanted = max(1, sampling.min_tokens, min(room, default))
    if wanted > room:
        parts = f"{prompt} prompt tokens" + (f" + {virtual} virtual tokens of the adapter" if virtual else "")
        total = prompt + virtual + wanted
        raise PromptTooLongError(
            f"{request.prompt_field}: {parts} + max_tokens {wanted} = {total}, over the context of {context} tokens",
            field=request.prompt_field,
        )
    return wanted
