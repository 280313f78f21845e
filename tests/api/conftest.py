from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from peftserve.text.tokenizer import Tokenizer
from tests.api.harness import World, make_world, says
from tests.text import folders

MakeWorld = Callable[..., World]


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(folders.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def make(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[MakeWorld]:
    """Makes a world: `make(script, **settings)`."""
    with ExitStack() as stack:

        def made(script: Any = None, **settings: Any) -> World:
            world = make_world(tmp_path, tokenizer, script or says(tokenizer, "hello world"), **settings)
            stack.callback(world.store.close)
            return world

        yield made


@pytest.fixture
def world(make: MakeWorld) -> World:
    """A server that always answers `hello world`."""
    return make()


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(world) as client:
        yield client


def client_of(world: World, **options: Any) -> httpx.AsyncClient:
    """A client of the application, without a socket."""
    transport = httpx.ASGITransport(world.app)
    return httpx.AsyncClient(transport=transport, base_url="http://server", **options)
