"""A running server over a scripted engine, and the four clients as one."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from peftserve_client import AsyncClient, AsyncGrpcClient, Client, GrpcClient
from tests.scripted_server import ScriptedEngine, ScriptedServer
from tests.scripted_thread import serve_in_thread


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with serve_in_thread(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def server(shared_server: ScriptedServer) -> ScriptedServer:
    """A server as good as new: opening a store takes longer than most tests."""
    shared_server.reset()
    return shared_server


@pytest.fixture
def engine(server: ScriptedServer) -> ScriptedEngine:
    return server.engine


class Blocking:
    """A blocking client with the asyncio clients' calls, so that one test holds all four to the same behaviour."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if name == "adapters":
            return Blocking(found)
        if name == "stream":
            return lambda *args, **options: _steps(found(*args, **options))

        async def call(*args: Any, **options: Any) -> Any:
            return await asyncio.to_thread(found, *args, **options)

        return call


async def _steps(chunks: Any) -> AsyncIterator[Any]:
    done = object()
    try:
        while (chunk := await asyncio.to_thread(next, chunks, done)) is not done:
            yield chunk
    finally:
        chunks.close()


CLIENTS = {"http": Client, "http-async": AsyncClient, "grpc": GrpcClient, "grpc-async": AsyncGrpcClient}


def make_client(kind: str, server: ScriptedServer, **options: Any) -> Any:
    """A client of this kind as an asyncio one."""
    client: Any = CLIENTS[kind](server.target if "grpc" in kind else server.url, **options)
    return client if "async" in kind else Blocking(client)


@pytest_asyncio.fixture(params=CLIENTS)
async def client(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Any]:
    made = make_client(request.param, server)
    yield made
    closed = made.close()
    if inspect.isawaitable(closed):
        await closed
