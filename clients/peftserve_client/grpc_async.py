"""The asyncio gRPC client: the blocking one's twin over the same protocol."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typing_extensions import Unpack

from peftserve_client import grpc_protocol as protocol
from peftserve_client._grpc_base import DEFAULT_TARGET, GrpcSettings
from peftserve_client.adapter_files import AdapterFiles, Progress
from peftserve_client.errors import ClientError, ConnectionFailedError
from peftserve_client.request import GenerateOptions, Message, Prompt, conversation
from peftserve_client.retry import RetryPolicy
from peftserve_client.types import Adapter, Chunk, Result, collect
from peftserve_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2_grpc

T = TypeVar("T")
RequestT = TypeVar("RequestT")


class AsyncGrpcClient(GrpcSettings):
    """A peftserve server over gRPC, for the running event loop; close it, or use it as a context manager.

    Methods, errors and retries are those of `GrpcClient`.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        super().__init__(target, api_key=api_key, timeout_s=timeout_s, retry=retry)
        self._channel = grpc.aio.insecure_channel(self.target, options=protocol.CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.adapters = AsyncGrpcAdapters(self, adapters_pb2_grpc.AdaptersStub(self._channel))

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Result:
        """The whole answer to `prompt`."""

        async def once() -> Result:
            async with aclosing(self._chunks(prompt, options)) as chunks:
                return collect([chunk async for chunk in chunks])

        return await self.call(once)

    async def chat(
        self, messages: str | Sequence[Message], *, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """The answer to a conversation, put through the model's chat template. A string is one user's turn."""
        return await self.generate(conversation(messages, system), **options)

    async def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]:
        """The answer as it comes. Retried until the first chunk, never after it; closing the generator stops it."""
        async for attempt in self.retry.asynchronous():
            with attempt:
                chunks = self._chunks(prompt, options)
                first = await anext(chunks)
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    async def health(self) -> bool:
        """Whether the server process answers."""
        return await self._check("")

    async def ready(self) -> bool:
        """Whether it accepts requests now."""
        return await self._check(protocol.INFERENCE)

    async def call(self, once: Callable[[], Awaitable[T]]) -> T:
        """Run `once` with retries, its errors translated."""

        async def translated() -> T:
            with protocol.call_errors(self.target):
                return await once()

        return await self.retry.asynchronous()(translated)

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _chunks(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Chunk, None]:
        request = protocol.generate_request(prompt, options)
        call = self._inference.Generate(request, timeout=self.timeout(options), metadata=self.metadata)
        complete = False
        try:
            with protocol.call_errors(self.target):
                request_id = protocol.request_id_of(await call.initial_metadata())
                async for response in call:
                    chunk = protocol.to_chunk(response, request_id)
                    complete = chunk.usage is not None
                    yield chunk
        finally:
            call.cancel()
        if not complete:
            raise ConnectionFailedError("the stream ended before the answer was complete")

    async def _check(self, service: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            with protocol.call_errors(self.target):
                answer = await self._health.Check(request, timeout=self.probe_timeout_s, metadata=self.metadata)
        except ClientError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class AsyncGrpcAdapters:
    """The adapters of the client's tenant: `client.adapters`."""

    def __init__(self, client: AsyncGrpcClient, stub: "adapters_pb2_grpc.AdaptersAsyncStub") -> None:
        self._client = client
        self._stub = stub

    async def push(
        self, adapter_id: str, source: str | Path | tuple[bytes, bytes], *, progress: Progress | None = None
    ) -> Adapter:
        """Store an adapter, or a new version of it, from a folder or from (config, weights) in memory."""
        files = AdapterFiles.read(source)

        async def once() -> adapters_pb2.Adapter:
            with files.open(progress) as weights:
                messages = protocol.upload_messages(adapter_id, files, weights)
                return await self._stub.Upload(messages, timeout=self._client.timeout_s, metadata=self._client.metadata)

        return protocol.to_adapter(await self._client.call(once))

    async def list(self) -> list[Adapter]:
        """All adapters, by name."""
        found: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=protocol.PAGE_SIZE)
        while True:
            page = await self._call(self._stub.List, request)
            found += map(protocol.to_adapter, page.adapters)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def get(self, adapter_id: str) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return protocol.to_adapter(await self._call(self._stub.Get, request))

    async def delete(self, adapter_id: str) -> None:
        """Remove an adapter; requests that run on it end normally."""
        await self._call(self._stub.Delete, adapters_pb2.DeleteAdapterRequest(adapter_id=adapter_id))

    async def pin(self, adapter_id: str, pinned: bool = True) -> Adapter:
        """Keep an adapter on the device, or no longer."""
        return protocol.to_adapter(await self._call(self._stub.Update, protocol.pin_request(adapter_id, pinned)))

    async def _call(self, method: grpc.aio.UnaryUnaryMultiCallable[RequestT, T], request: RequestT) -> T:
        async def once() -> T:
            return await method(request, timeout=self._client.timeout_s, metadata=self._client.metadata)

        return await self._client.call(once)
