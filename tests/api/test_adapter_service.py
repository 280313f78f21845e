"""The adapter service: what the doors' own tests do not reach."""

import asyncio
import time
from pathlib import Path

import pytest

from peftserve.adapters.upload import Upload
from peftserve.text.tokenizer import Tokenizer
from tests.api.harness import endless, eventually, make_world


async def test_an_upload_whose_client_goes_while_it_is_begun_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path, tokenizer, endless)
    staging = world.store.root / "staging"
    new_upload = world.store.new_upload

    def slowly(tenant: str, name: str) -> Upload:
        upload = new_upload(tenant, name)
        time.sleep(0.2)
        return upload

    monkeypatch.setattr(world.store, "new_upload", slowly)

    async def begin() -> None:
        async with world.services.adapters.upload("default", "law"):
            await asyncio.Event().wait()

    task = asyncio.create_task(begin())
    await eventually(lambda: any(staging.iterdir()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not any(staging.iterdir()))
    world.store.close()
