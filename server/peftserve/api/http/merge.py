"""Deltas put together again, for answers that are not streamed."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from peftserve.api.request import Delta, Summary, TokenLogprob
from peftserve.errors import InternalError
from peftserve.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Everything of one sequence."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None
    stop_reason: str | int | None


async def collect(deltas: AsyncGenerator[Delta, None]) -> tuple[list[Choice], Summary]:
    """All choices by index, and the summary that came with the last delta. Closes `deltas`, cancelled or not."""
    by_index: dict[int, list[Delta]] = {}
    summary: Summary | None = None
    async with aclosing(deltas):
        async for delta in deltas:
            by_index.setdefault(delta.index, []).append(delta)
            summary = delta.summary or summary
    if summary is None:
        raise InternalError("the request ended without a summary")
    return [_choice(by_index[index]) for index in sorted(by_index)], summary


def _choice(deltas: list[Delta]) -> Choice:
    last = deltas[-1]
    return Choice(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
