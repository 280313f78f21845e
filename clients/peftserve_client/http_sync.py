"""The blocking HTTP client."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from typing_extensions import Unpack

from peftserve_client import http_protocol as protocol
from peftserve_client._http_base import HttpSettings, reply_of
from peftserve_client.adapter_files import AdapterFiles, Progress
from peftserve_client.errors import ClientError
from peftserve_client.http_protocol import ChunkDecoder, Operation
from peftserve_client.request import GenerateOptions, Message, Prompt, conversation
from peftserve_client.types import Adapter, Chunk, Model, Result

T = TypeVar("T")


class Client(HttpSettings):
    """A peftserve server over HTTP. Usable from several threads; close it, or use it as a context manager.

    Errors are those of `peftserve_client.errors`. Connection errors, 429 and 503 are retried as `retry` says.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._http = httpx.Client(**self.transport)
        self.adapters = Adapters(self)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Result:
        """The whole answer to `prompt`."""
        return self.call(protocol.generate(prompt, options))

    def chat(
        self, messages: str | Sequence[Message], *, system: str | None = None, **options: Unpack[GenerateOptions]
    ) -> Result:
        """The answer to a conversation, put through the model's chat template. A string is one user's turn."""
        return self.generate(conversation(messages, system), **options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """The answer as it comes. Retried until the first chunk, never after it; closing the iterator stops it."""
        operation = protocol.stream(prompt, options)
        for attempt in self.retry.sync():
            with attempt:
                chunks = self._chunks(operation)
                first = next(chunks)
        yield first
        yield from chunks

    def models(self) -> list[Model]:
        """The base model and the adapters, as names that `model` may take in the OpenAI routes."""
        return self.call(protocol.models())

    def health(self) -> bool:
        """Whether the server process answers."""
        return self._probe("/livez")

    def ready(self) -> bool:
        """Whether it accepts requests now."""
        return self._probe("/readyz")

    def call(self, operation: Operation[T]) -> T:
        """Run `operation`, with retries."""
        return self.retry.sync()(lambda: self._once(operation, self.request(operation)))

    def push(self, operation: Operation[T], files: AdapterFiles, progress: Progress | None) -> T:
        """Send `files`; each attempt begins anew, which is safe as uploads are idempotent."""

        def once() -> T:
            with files.open(progress) as weights:
                return self._once(operation, self.upload(operation.path, files, weights))

        return self.retry.sync()(once)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _once(self, operation: Operation[T], request: dict[str, Any]) -> T:
        with protocol.transport_errors():
            response = self._http.send(self._http.build_request(**request))
        return operation.parse(protocol.check(reply_of(response)))

    def _chunks(self, operation: Operation[None]) -> Iterator[Chunk]:
        with protocol.transport_errors():
            response = self._http.send(self._http.build_request(**self.request(operation)), stream=True)
            try:
                if response.status_code != 200:
                    response.read()
                    protocol.check(reply_of(response))
                decoder = ChunkDecoder(response.status_code)
                for data in response.iter_bytes():
                    yield from decoder.feed(data)
                decoder.end()
            finally:
                response.close()

    def _probe(self, path: str) -> bool:
        operation = protocol.probe(path)
        try:
            return self._once(operation, self.request(operation))
        except ClientError:
            return False


class Adapters:
    """The adapters of the client's tenant: `client.adapters`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(
        self, adapter_id: str, source: str | Path | tuple[bytes, bytes], *, progress: Progress | None = None
    ) -> Adapter:
        """Store an adapter, or a new version of it, from a folder or from (config, weights) in memory."""
        files = AdapterFiles.read(source)
        return self._client.push(protocol.push_adapter(adapter_id), files, progress)

    def list(self) -> list[Adapter]:
        """All adapters, by name."""
        return self._client.call(protocol.list_adapters())

    def get(self, adapter_id: str) -> Adapter:
        return self._client.call(protocol.get_adapter(adapter_id))

    def delete(self, adapter_id: str) -> None:
        """Remove an adapter; requests that run on it end normally."""
        self._client.call(protocol.delete_adapter(adapter_id))

    def pin(self, adapter_id: str, pinned: bool = True) -> Adapter:
        """Keep an adapter on the device, or no longer."""
        return self._client.call(protocol.pin_adapter(adapter_id, pinned))
