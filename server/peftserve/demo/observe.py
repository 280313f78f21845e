"""What the server's own metrics say about the batch while it runs."""

import asyncio
from types import TracebackType
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

_PERIOD_S = 0.02


class BatchWatch:
    """Reads `/metrics` again and again while the block runs, and keeps the fullest moment.

    `running`: most sequences in the running batch at once; `adapters`: those that were in it then.
    """

    def __init__(self, url: str) -> None:
        self.running = 0
        self.adapters: list[str] = []
        self._client = httpx.AsyncClient(base_url=url)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    async def _watch(self) -> None:
        while True:
            text = (await self._client.get("/metrics")).text
            running, adapters = read_batch(text)
            if (len(adapters), running) > (len(self.adapters), self.running):
                self.running, self.adapters = running, adapters
            await asyncio.sleep(_PERIOD_S)


def read_batch(text: str) -> tuple[int, list[str]]:
    """(sequences running, adapters among them) from one scrape, which is one engine step's state."""
    running, adapters = 0, ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:num_requests_running":
                running = int(sample.value)
            elif sample.name == "vllm:lora_requests_info":
                adapters = sample.labels["running_lora_adapters"]
    return running, sorted(filter(None, adapters.split(",")))
