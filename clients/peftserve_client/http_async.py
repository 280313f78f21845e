"""The asyncio HTTP client: the blocking one's twin over the same protocol."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from httpx_aiohttp import HttpxAiohttpClient
from typing_extensions import Unpack

from peftserve_client import http_protocol as protocol
from peftserve_client._http_base import HttpSettings, reply_of
from peftserve_client.adapter_files import AdapterFiles, Progress
from peftserve_client.errors import ClientError
from peftserve_client.http_protocol import ChunkDecoder, Operation
from peftserve_client.request import GenerateOptions, Message, Prompt, conversation
from peftserve_client.types import Adapter, Chunk, Model, Result

T = TypeVar("T")


class AsyncClient(HttpSettings):
    """A peftserve server over HTTP, for one event loop; close it, or use it as a context manager.

    Methods, errors and retries are those of `Client`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # aiohttp's parser is C: a streamed chunk takes half the time that it takes with httpx's own transport, and a
        # client of many streams shares the machine's cores with the server more often than not.
        self._http = HttpxAiohttpClient(**self.transport)
        self.adapters = AsyncAdapters(self)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Result:
        """The whole answer to `prompt`."""
        return await self.call(protocol.generate(prompt, options))

    async def chat(
        self, messages: str | Sequence[Message], *, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """The answer to a conversation, put through the model's chat template. A string is one user's turn."""
        return await self.generate(conversation(messages, system), **options)

    async def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes. Retried until the first chunk, never after it; closing the generator stops it."""
        operation = protocol.stream(prompt, options)
        async for attempt in self.retry.asynchronous():
            with attempt:
                chunks = self._chunks(operation)
                first = await anext(chunks)
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    async def models(self) -> list[Model]:
        """The base model and the adapters, as names that `model` may take in the OpenAI routes."""
        return await self.call(protocol.models())

    async def health(self) -> bool:
        """Whether the server process answers."""
        return await self._probe("/livez")

    async def ready(self) -> bool:
        """Whether it accepts requests now."""
        return await self._probe("/readyz")

    async def call(self, operation: Operation[T]) -> T:
        """Run `operation`, with retries."""
        return await self.retry.asynchronous()(self._once, operation, self.request(operation))

    async def push(self, operation: Operation[T], files: AdapterFiles, progress: Progress | None) -> T:
        """Send `files`; each attempt begins anew, which is safe as uploads are idempotent."""

        async def once() -> T:
            with files.open(progress) as weights:
                return await self._once(operation, self.upload(operation.path, files, weights))

        return await self.retry.asynchronous()(once)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _once(self, operation: Operation[T], request: dict[str, Any]) -> T:
        with protocol.transport_errors():
            response = await self._http.send(self._http.build_request(**request))
        return operation.parse(protocol.check(reply_of(response)))

    async def _chunks(self, operation: Operation[None]) -> AsyncGenerator[Chunk, None]:
        with protocol.transport_errors():
            response = await self._http.send(self._http.build_request(**self.request(operation)), stream=True)
            try:
                if response.status_code != 200:
                    await response.aread()
                    protocol.check(reply_of(response))
                decoder = ChunkDecoder(response.status_code)
                async for data in response.aiter_bytes():
                    for chunk in decoder.feed(data):
                        yield chunk
                decoder.end()
            finally:
                await response.aclose()

    async def _probe(self, path: str) -> bool:
        operation = protocol.probe(path)
        try:
            return await self._once(operation, self.request(operation))
        except ClientError:
            return False


class AsyncAdapters:
    """The adapters of the client's tenant: `client.adapters`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def push(
        self, adapter_id: str, source: str | Path | tuple[bytes, bytes], *, progress: Progress | None = None
    ) -> Adapter:
        """Store an adapter, or a new version of it, from a folder or from (config, weights) in memory."""
        files = AdapterFiles.read(source)
        return await self._client.push(protocol.push_adapter(adapter_id), files, progress)

    async def list(self) -> list[Adapter]:
        """All adapters, by name."""
        return await self._client.call(protocol.list_adapters())

    async def get(self, adapter_id: str) -> Adapter:
        return await self._client.call(protocol.get_adapter(adapter_id))

    async def delete(self, adapter_id: str) -> None:
        """Remove an adapter; requests that run on it end normally."""
        await self._client.call(protocol.delete_adapter(adapter_id))

    async def pin(self, adapter_id: str, pinned: bool = True) -> Adapter:
        """Keep an adapter on the device, or no longer."""
        return await self._client.call(protocol.pin_adapter(adapter_id, pinned))
