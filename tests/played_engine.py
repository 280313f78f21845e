"""The part of an engine client that every scripted engine shares: requests that are played, and may be aborted."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from peftserve.types import EngineRequest, TokenEvent


@dataclass(kw_only=True)
class PlayedEngine(ABC):
    """`requests` were started, `running` have not ended, `aborted` were ended by their consumer before that."""

    requests: list[EngineRequest] = field(default_factory=list)
    running: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)

    @abstractmethod
    def play(self, request: EngineRequest) -> AsyncIterator[TokenEvent]:
        """What the engine answers; nothing is asked for after an event with a finish reason."""

    def submit(self, request: EngineRequest, take: Callable[[TokenEvent], None]) -> None:
        async def run() -> None:
            async for event in self.play(request):
                if event.finish_reason is not None:
                    del self.running[request.id]
                take(event)
                if event.finish_reason is not None:
                    return

        self.requests.append(request)
        self.running[request.id] = asyncio.create_task(run())

    def abort(self, request_id: str) -> None:
        if (task := self.running.pop(request_id, None)) is not None:
            self.aborted.append(request_id)
            task.cancel()
