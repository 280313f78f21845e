"""The whole server on its Triton kernels under the interpreter: every kind in one batch, against the real oracles."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftserve_client import AsyncClient, Client
from tests.server.conftest import Case
from tests.server.process import ServerProcess, running_server
from tests.server.test_parity import ask, check

ADAPTERS = (None, "lora-r4", "lora-r8", "prefix-20", "pfeiffer", "parallel")


@pytest.fixture
def triton_server(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    monkeypatch.setenv("PEFTSERVE_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with running_server(
        base_folder,
        tmp_path,
        dtype="float32",
        threads=1,
        page_size=8,
        max_batch_tokens=48,
        kv_cache_bytes="4MiB",
        adapter_device_bytes="4MiB",
        drain_s=1,  # when the test has failed, nobody waits for interpreted steps of what it left running
    ) as process:
        yield process


@pytest.mark.slow
async def test_all_kinds_at_once(
    triton_server: ServerProcess, adapter_folders: dict[str, Path], cases: list[Case]
) -> None:
    with Client(triton_server.http) as client:
        for name in ADAPTERS:
            if name is not None:
                client.adapters.push(name, adapter_folders[name])
    # The shortest prompt of each: an interpreted step takes about half a second.
    chosen = [min((c for c in cases if c.adapter_id == name), key=lambda c: len(c.prompt)) for name in ADAPTERS]
    async with AsyncClient(triton_server.http) as client:
        results = await asyncio.gather(*(ask(client, case) for case in chosen))
    for result, case in zip(results, chosen, strict=True):
        check(result, case)
