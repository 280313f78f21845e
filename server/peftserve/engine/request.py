"""One request inside the engine: a state machine with one transition table."""

import enum
import time
from dataclasses import dataclass, field

from peftserve.engine.plan import count_tokens
from peftserve.types import EngineRequest


class RequestState(enum.Enum):
    """Where a live request stands. Only RUNNING holds KV pages and a reference to its adapter."""

    WAITING_ADAPTER = "waiting_adapter"  # its adapter is on its way to the host tier
    WAITING = "waiting"  # could run; waits for a place, for pages or for its adapter's device copy
    RUNNING = "running"
    FINISHED = "finished"


_TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.WAITING_ADAPTER: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.WAITING: frozenset({RequestState.RUNNING, RequestState.FINISHED}),
    RequestState.RUNNING: frozenset({RequestState.WAITING, RequestState.FINISHED}),
    RequestState.FINISHED: frozenset(),
}


@dataclass(eq=False, slots=True)
class Request:
    """A request and its progress.

    `token_ids` is prompt + output. `num_virtual_tokens` is the length of the adapter's prefix, known once it is loaded.
    `num_computed` counts KV positions that are filled, the prefix included, so the next token goes to position
    `num_computed`. `block_table` holds the adapter's `num_shared_pages` first, then pages of the request's own.
    `token_counts` is how often each token stands in the output, 0 for those of the prompt alone; None when the request
    has no penalty that asks. `page_hashes[i]` is the chained hash of own page i, for every full page whose tokens are
    known.
    """

    spec: EngineRequest
    seed: int
    arrived: float = field(default_factory=time.monotonic)
    refused: float | None = None  # since when it has come up to start, and found no room
    state: RequestState = RequestState.WAITING_ADAPTER
    token_ids: list[int] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    token_counts: dict[int, int] | None = None
    num_virtual_tokens: int = 0
    num_computed: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_shared_pages: int = 0
    page_hashes: list[bytes] = field(default_factory=list)
    slot: int = 0
    adapter_ready: float | None = None
    first_scheduled: float | None = None
    reported: bool = False  # whether an event of this request has gone out

    def __post_init__(self) -> None:
        self.token_ids = list(self.spec.prompt_token_ids)
        if self.spec.sampling.counts_tokens:
            self.token_counts = count_tokens(self.spec.prompt_token_ids, ())

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def digest(self) -> str | None:
        return self.spec.adapter.digest if self.spec.adapter else None

    @property
    def num_positions(self) -> int:
        """KV positions that all known tokens take, the prefix included."""
        return self.num_virtual_tokens + len(self.token_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that are not in the KV cache yet: 1 when decoding, more while the prompt is prefilled."""
        return self.num_positions - self.num_computed

    @property
    def fairness_key(self) -> tuple[str, str]:
        """Who is charged for this request's tokens: the tenant and the adapter."""
        return self.spec.tenant, self.digest or ""

    def append(self, token_id: int) -> None:
        """Add a sampled token."""
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts[token_id] = self.token_counts.get(token_id, 0) + 1

    def move(self, state: RequestState) -> None:
        """Change state; a transition that is not in the table is a bug and raises RuntimeError."""
        if state not in _TRANSITIONS[self.state]:
            raise RuntimeError(f"request {self.id}: no transition {self.state.name} -> {state.name}")
        self.state = state
