"""`scripted_server.serve` in a thread, so that blocking clients can talk to it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.scripted_server import ScriptedEngine, ScriptedServer, serve


@contextmanager
def serve_in_thread(folder: Path, engine: ScriptedEngine | None = None, **settings: object) -> Iterator[ScriptedServer]:
    """Both doors on free ports for as long as the block runs."""
    started = threading.Event()
    running: list[ScriptedServer] = []
    failures: list[BaseException] = []
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def main() -> None:
        async with serve(folder, engine, **settings) as server:
            running.append(server)
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(main())
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    try:
        if not running:
            raise failures[0]
        yield running[0]
    finally:
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        thread.join()
    if failures:
        raise failures[0]
