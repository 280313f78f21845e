"""The blocking gRPC client: `Client`'s methods over `peftserve.v1`."""

from collections.abc import Callable, Iterator, Sequence
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


class GrpcClient(GrpcSettings):
    """A peftserve server over gRPC. Usable from several threads; close it, or use it as a context manager.

    Errors and retries are `Client`'s. There is no `models`: ask HTTP, or `adapters.list`.
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
        self._channel = grpc.insecure_channel(self.target, options=protocol.CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self.adapters = GrpcAdapters(self, adapters_pb2_grpc.AdaptersStub(self._channel))

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Result:
        """The whole answer to `prompt`."""
        return self.call(lambda: collect(list(self._chunks(prompt, options))))

    def chat(
        self, messages: str | Sequence[Message], *, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """The answer to a conversation, put through the model's chat template. A string is one user's turn."""
        return self.generate(conversation(messages, system), **options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """The answer as it comes. Retried until the first chunk, never after it; closing the iterator stops it."""
        for attempt in self.retry.sync():
            with attempt:
                chunks = self._chunks(prompt, options)
                first = next(chunks)
        yield first
        yield from chunks

    def health(self) -> bool:
        """Whether the server process answers."""
        return self._check("")

    def ready(self) -> bool:
        """Whether it accepts requests now."""
        return self._check(protocol.INFERENCE)

    def call(self, once: Callable[[], T]) -> T:
        """Run `once` with retries, its errors translated."""
        return self.retry.sync()(protocol.call_errors(self.target)(once))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chunks(self, prompt: Prompt, options: GenerateOptions) -> Iterator[Chunk]:
        request = protocol.generate_request(prompt, options)
        call = self._inference.Generate(request, timeout=self.timeout(options), metadata=self.metadata)
        complete = False
        try:
            with protocol.call_errors(self.target):
                request_id = protocol.request_id_of(call.initial_metadata())
                for response in call:
                    chunk = protocol.to_chunk(response, request_id)
                    complete = chunk.usage is not None
                    yield chunk
        finally:
            call.cancel()  # type: ignore[no-untyped-call]
        if not complete:
            raise ConnectionFailedError("the stream ended before the answer was complete")

    def _check(self, service: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            with protocol.call_errors(self.target):
                answer = self._health.Check(request, timeout=self.probe_timeout_s, metadata=self.metadata)
        except ClientError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class GrpcAdapters:
    """The adapters of the client's tenant: `client.adapters`."""

    def __init__(self, client: GrpcClient, stub: adapters_pb2_grpc.AdaptersStub) -> None:
        self._client = client
        self._stub = stub

    def push(
        self, adapter_id: str, source: str | Path | tuple[bytes, bytes], *, progress: Progress | None = None
    ) -> Adapter:
        """Store an adapter, or a new version of it, from a folder or from (config, weights) in memory."""
        files = AdapterFiles.read(source)

        def once() -> adapters_pb2.Adapter:
            with files.open(progress) as weights:
                messages = protocol.upload_messages(adapter_id, files, weights)
                return self._stub.Upload(messages, timeout=self._client.timeout_s, metadata=self._client.metadata)

        return protocol.to_adapter(self._client.call(once))

    def list(self) -> list[Adapter]:
        """All adapters, by name."""
        found: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=protocol.PAGE_SIZE)
        while True:
            page = self._call(self._stub.List, request)
            found += map(protocol.to_adapter, page.adapters)
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    def get(self, adapter_id: str) -> Adapter:
        request = adapters_pb2.GetAdapterRequest(adapter_id=adapter_id)
        return protocol.to_adapter(self._call(self._stub.Get, request))

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter; requests that run on it end normally."""
        self._call(self._stub.Delete, adapters_pb2.DeleteAdapterRequest(adapter_id=adapter_id))

    def pin(self, adapter_id: str, pinned: bool = True) -> Adapter:
        """Keep an adapter on the device, or no longer."""
        return protocol.to_adapter(self._call(self._stub.Update, protocol.pin_request(adapter_id, pinned)))

    def _call(self, method: "grpc.UnaryUnaryMultiCallable[RequestT, T]", request: RequestT) -> T:
        return self._client.call(
            lambda: method(request, timeout=self._client.timeout_s, metadata=self._client.metadata)
        )
