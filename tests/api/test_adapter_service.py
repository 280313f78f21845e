"""The adapter service: what the doors' own tests do not reach."""

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from peftserve.adapters.upload import Upload
from peftserve.text.tokenizer import Tokenizer
from tests.adapters import files
from tests.api.harness import endless, eventually, make_world, resident


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


@pytest.mark.parametrize("change", ["unpin", "delete", "new version"])
async def test_a_client_that_goes_leaves_store_and_engine_agreed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    world = make_world(tmp_path, tokenizer, endless)
    service = world.services.adapters
    first = files.push(world.store, "default", "law", files.lora(seed=1)).digest
    if change != "delete":
        await service.set_pinned("default", "law", True)
    name = {"unpin": "set_pinned", "delete": "delete", "new version": "_publish"}[change]
    done, go_on = threading.Event(), threading.Event()
    real = getattr(world.store, name)

    def slowly(*args: Any) -> Any:
        result = real(*args)
        done.set()
        go_on.wait(20)
        return result

    monkeypatch.setattr(world.store, name, slowly)

    async def work() -> None:
        if change == "unpin":
            await service.set_pinned("default", "law", False)
        elif change == "delete":
            await service.delete("default", "law")
        else:
            async with service.upload("default", "law") as upload:
                config, arrays = files.lora(seed=2)
                upload.write_config(json.dumps(config).encode())
                upload.write_weights(save(arrays))
                await service.commit("default", "law", upload)

    world.engine.prefetched.clear()
    task = asyncio.create_task(work())
    await eventually(done.is_set)
    task.cancel()
    await asyncio.sleep(0.02)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    if change == "unpin":
        await eventually(lambda: world.engine.prefetched == [(first, False)])
    elif change == "delete":
        await eventually(lambda: world.engine.unloaded == [first])
    else:
        await eventually(lambda: world.engine.unloaded == [first])
        second = world.store.get("default", "law")
        assert second.digest != first
        assert world.engine.prefetched == [(second.digest, True)]
    world.store.close()


async def test_versions_that_no_name_means_leave_the_engine_and_do_not_come_back(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    world = make_world(tmp_path, tokenizer, endless)
    service = world.services.adapters
    old = files.push(world.store, "default", "law", files.lora(seed=1))
    new = files.push(world.store, "default", "law", files.lora(seed=2))
    kept = files.push(world.store, "default", "kept", files.lora(seed=3))
    for record in (old, new, kept):
        world.engine.residency[record.digest] = resident(record.ref)
    await service.delete("default", "law")
    assert set(world.engine.unloaded) == {old.digest, new.digest}
    await service.restore([old.ref, new.ref, kept.ref])
    assert world.engine.prefetched == [(kept.digest, False)]
    assert await service.collect_garbage() == [], "the engine has not let go of any yet"
    world.engine.residency = {kept.digest: resident(kept.ref)}
    assert set(await service.collect_garbage()) == {old.digest, new.digest}
    world.store.close()
