"""Checks of a request against this server's limits and model: numbers that `api.schemas` cannot know."""

from collections.abc import Sequence

from peftserve.api.request import GenerateRequest
from peftserve.config import LimitsConfig
from peftserve.engine.messages import EngineInfo
from peftserve.errors import InvalidRequestError, PromptTooLongError


def check_sampling(request: GenerateRequest, limits: LimitsConfig, info: EngineInfo) -> None:
    """Raise `InvalidRequestError` with every number over this server's limits, every token outside the vocabulary, and
    what contradicts itself: here and not in the bodies' models, so that every route refuses it in the same words."""
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
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        limit_field = request.sampling_prefix + request.max_tokens_field
        faults.append(("min_tokens", f"{sampling.min_tokens} is more than {limit_field}, {sampling.max_tokens}"))
    count = len(request.prompts) * sampling.n
    if count > limits.max_waiting:
        what = f"n {sampling.n} for {len(request.prompts)} prompts are {count} sequences"
        faults.append(("n", f"{what}, and this server's limit is {limits.max_waiting} (max_waiting)"))
    if faults:
        texts = [f"{request.sampling_prefix}{name}: {text}" for name, text in faults]
        raise InvalidRequestError("; ".join(texts), field=request.sampling_prefix + faults[0][0], faults=texts)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> list[int]:
    """The prompt's tokens as a list; raises `InvalidRequestError` for none, or one outside the vocabulary."""
    # The loop is for the message; looking for the extremes is ten times quicker.
    if token_ids and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return list(token_ids)
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{field}: token {token_id} at position {position} is outside the vocabulary of {vocab_size} tokens",
                field=field,
            )
    return check_not_empty(list(token_ids), field)


def check_could_fit(tokens: int, context: int, field: str, found: str) -> None:
    """Raise `PromptTooLongError` if `tokens`, which the prompt has at least, leave no room in the context for another.

    The cheap check before the prompt is encoded; `resolve_max_tokens` is the exact one. `found` is what the prompt is,
    in words: "900000 characters".
    """
    if tokens >= context:
        raise PromptTooLongError(
            f"{field}: {found} are at least {tokens} tokens, and the context is {context} tokens with the answer",
            field=field,
        )


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
