"""What the outside hears of a request. Imports no torch."""

from collections.abc import Sequence

from peftserve.engine.request import Request
from peftserve.errors import PeftserveError
from peftserve.types import FinishReason, TokenEvent, TokenLogprobs


def next_event(
    request: Request,
    token_ids: Sequence[int] = (),
    logprobs: Sequence[TokenLogprobs] = (),
    *,
    finish_reason: FinishReason | None = None,
    stop_token_id: int | None = None,
    error: PeftserveError | None = None,
) -> TokenEvent:
    """The next event of `request`; the first one also tells how long it waited and what the prefix cache gave."""
    first, request.reported = not request.reported, True
    ready, started = request.adapter_ready, request.first_scheduled
    return TokenEvent(
        request_id=request.id,
        token_ids=list(token_ids),
        logprobs=list(logprobs),
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        error=error.to_info() if error else None,
        num_cached_tokens=request.num_cached_tokens if first else None,
        queued_s=started - request.arrived if first and started is not None else None,
        adapter_wait_s=ready - request.arrived if first and ready is not None else None,
    )
