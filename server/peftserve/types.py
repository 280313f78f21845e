"""The values that cross boundaries: front door -> engine and back. A leaf: imports nothing of peftserve.

All are frozen msgspec structs, so that the same object is validated once at the edge, encoded once on the
pipe between the two processes, and never mutated behind anybody's back.
"""

import enum

import msgspec


class AdapterKind(enum.StrEnum):
    """How an adapter changes the model; `BASE` stands for requests without an adapter in metrics and plans."""

    BASE = "base"
    LORA = "lora"
    PREFIX = "prefix"
    BOTTLENECK = "bottleneck"


class FinishReason(enum.StrEnum):
    """Why a request ended. Every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class AdapterRef(msgspec.Struct, frozen=True):
    """One immutable adapter version. Identity is `digest`; `name` and `tenant` are for people and metrics.

    `digest` is 64 hex digits: sha256 over config and weights (see `adapters.manifest`).
    """

    digest: str
    kind: AdapterKind
    name: str
    tenant: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to pick tokens; bounds are checked at the edge (`api.schemas`).

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 are off. Penalties follow OpenAI (presence,
    frequency: over output tokens) and CTRL/Hugging Face (repetition: over prompt and output). `logprobs` is
    the number of alternatives reported beside the sampled token, None for no log-probabilities at all;
    they are of the unmodified model distribution (before penalties and temperature).
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty asks how often each token has come up."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `n > 1` at the front door becomes n of these with ids and seeds of their own.

    `prompt_token_ids` is not empty and, with the adapter's virtual tokens and `max_tokens`, fits the context.
    `tenant` salts the prefix cache, so that no tenant can time another's prompts.
    """

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    tenant: str = "default"
    adapter: AdapterRef | None = None


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one output position, natural log.

    `token_id`, `logprob`: the token that was sampled. `top`: the most likely alternatives, best first.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A `PeftserveError` on the wire; `code` names the class in `errors.ERRORS_BY_CODE`."""

    code: str
    message: str
    field: str | None = None
    faults: list[str] = []
    retry_after_s: float | None = None


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What a step produced for one request. The event with a `finish_reason` is the last one.

    `logprobs` has one entry per token of `token_ids` when they were asked for. `stop_token_id` is the token
    that ended it (it is not among `token_ids`, as end-of-sequence tokens are no text). `error` is set exactly
    when `finish_reason` is ERROR. `num_cached_tokens`, `queued_s` and `adapter_wait_s` are set on the first
    event: prompt tokens answered by the prefix cache, and seconds spent waiting for a place and for the adapter.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: ErrorInfo | None = None
    num_cached_tokens: int | None = None
    queued_s: float | None = None
    adapter_wait_s: float | None = None
