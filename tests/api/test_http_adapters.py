"""Adapters over HTTP: streamed uploads with caps, listing, pinning, deleting; and vLLM's routes with their fences."""

import os
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from peftserve.api.http import responses
from peftserve.engine.messages import AdapterResidency
from tests.adapters import files
from tests.api.conftest import MakeWorld, client_of
from tests.api.harness import World, adapter_files, add_adapter


async def put(client: httpx.AsyncClient, name: str, made: tuple[Any, Any] | None = None) -> httpx.Response:
    config, weights = adapter_files(made or files.lora())
    parts = {"config": ("adapter_config.json", config), "weights": ("adapter_model.safetensors", weights)}
    return await client.put(f"/v1/adapters/{name}", files=parts)


def staging(world: World) -> list[Path]:
    """What uploads under way, or badly ended ones, hold."""
    return [path for path in (world.store.root / "staging").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("made", "kind"), [(files.lora(), "lora"), (files.prefix(3), "prefix"), (files.bottleneck(), "bottleneck")]
)
async def test_upload_list_show(client: httpx.AsyncClient, world: World, made: Any, kind: str) -> None:
    response = await put(client, "mine", made)
    assert response.status_code == 200, response.text
    adapter = responses.AdapterAnswer.model_validate(response.json())
    assert (adapter.adapter_id, adapter.kind, adapter.pinned, adapter.residency) == ("mine", kind, False, None)
    assert response.headers["etag"] == f'"{adapter.digest}"'
    assert world.engine.prefetched == [(adapter.digest, False)]
    assert (await client.get("/v1/adapters/mine")).json() == response.json()
    listed = responses.AdapterList.model_validate((await client.get("/v1/adapters")).json())
    assert listed.data == [adapter]
    assert staging(world) == []


async def test_residency_is_shown(client: httpx.AsyncClient, world: World) -> None:
    digest = add_adapter(world, "mine")
    world.engine.residency[digest] = AdapterResidency(
        digest=digest,
        name="mine",
        tenant="default",
        kind="lora",
        state="device",
        refs=2,
        pinned=False,
        host_bytes=10,
        device_bytes=20,
        load_s=0.5,
    )
    adapter = responses.AdapterAnswer.model_validate((await client.get("/v1/adapters/mine")).json())
    assert adapter.residency == responses.Residency(
        state="device", refs=2, host_bytes=10, device_bytes=20, load_s=0.5, error=None
    )


async def test_the_same_again_changes_nothing_and_a_new_version_drops_the_old(
    client: httpx.AsyncClient, world: World
) -> None:
    first = (await put(client, "mine")).json()["digest"]
    assert (await put(client, "mine")).json()["digest"] == first
    assert world.engine.unloaded == []
    second = (await put(client, "mine", files.lora(seed=1))).json()["digest"]
    assert second != first
    assert world.engine.unloaded == [first]


async def test_an_old_version_that_another_name_means_stays(client: httpx.AsyncClient, world: World) -> None:
    await put(client, "one")
    await put(client, "two")
    await put(client, "one", files.lora(seed=1))
    assert world.engine.unloaded == []


async def test_pin_and_unpin(client: httpx.AsyncClient, world: World) -> None:
    digest = (await put(client, "mine")).json()["digest"]
    assert (await client.patch("/v1/adapters/mine", json={"pinned": True})).json()["pinned"] is True
    assert world.engine.prefetched[-1] == (digest, True)
    refused = await client.delete("/v1/adapters/mine")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    # The same bytes under another, unpinned name: the pin holds.
    await put(client, "other")
    assert world.engine.prefetched[-1] == (digest, True)
    assert (await client.patch("/v1/adapters/mine", json={"pinned": False})).json()["pinned"] is False
    assert world.engine.prefetched[-1] == (digest, False)


async def test_delete(client: httpx.AsyncClient, world: World) -> None:
    digest = (await put(client, "mine")).json()["digest"]
    response = await client.delete("/v1/adapters/mine")
    assert (response.status_code, response.content) == (204, b"")
    assert world.engine.unloaded == [digest]
    for method in ("GET", "DELETE"):
        assert (await client.request(method, "/v1/adapters/mine")).status_code == 404
    assert (await client.patch("/v1/adapters/mine", json={"pinned": True})).status_code == 404


@pytest.mark.parametrize(
    ("made", "settings", "words"),
    [
        (files.lora, {"adapter_device_bytes": "8KiB"}, ["bytes of adapter memory", "4096", "adapter_device_bytes"]),
        (files.bottleneck, {"max_device_adapters": 1}, ["1 bottleneck slots", "limit is 0", "max_device_adapters"]),
        (files.prefix, {"max_pinned_share": 0.0}, ["1 pages of the KV cache", "limit is 0", "max_pinned_share 0 of"]),
    ],
)
async def test_a_pin_over_the_quota_is_refused(
    make: MakeWorld, made: Any, settings: dict[str, Any], words: list[str]
) -> None:
    world = make(**settings)
    add_adapter(world, "mine", made())
    async with client_of(world) as client:
        response = await client.patch("/v1/adapters/mine", json={"pinned": True})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (409, "conflict", "pinned")
        assert all(word in error["message"] for word in words), error["message"]
        assert (await client.get("/v1/adapters/mine")).json()["pinned"] is False
        assert (await client.patch("/v1/adapters/mine", json={"pinned": False})).status_code == 200
    assert world.engine.prefetched == [(world.store.get("default", "mine").digest, False)]


async def test_pins_share_one_quota_and_equal_bytes_count_once(make: MakeWorld) -> None:
    world = make(max_device_adapters=2)  # a share of 0.5: one slot
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        add_adapter(world, name, files.lora(seed=seed))
    async with client_of(world) as client:
        answers = [await client.patch(f"/v1/adapters/{name}", json={"pinned": True}) for name in ("one", "same")]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert (await client.patch("/v1/adapters/other", json={"pinned": True})).status_code == 409
        # A pin stays with its name: a version of other bytes would be one too many as well.
        config, weights = adapter_files(files.lora(seed=1))
        parts = {"config": ("c", config), "weights": ("w", weights)}
        refused = await client.put("/v1/adapters/one", files=parts)
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "pinned")
        assert world.store.get("default", "one").digest == world.store.get("default", "same").digest
        await client.patch("/v1/adapters/one", json={"pinned": False})
        await client.patch("/v1/adapters/same", json={"pinned": False})
        assert (await client.patch("/v1/adapters/other", json={"pinned": True})).status_code == 200


async def test_pinned_adapters_come_back(world: World) -> None:
    digest = add_adapter(world, "mine", tenant="somebody")
    world.store.set_pinned("somebody", "mine", True)
    await world.services.adapters.restore([])
    assert world.engine.prefetched == [(digest, True)]


async def test_faults_of_an_adapter_come_all_at_once(client: httpx.AsyncClient, world: World) -> None:
    config, arrays = files.lora(use_qalora=True)
    arrays.pop(next(iter(arrays)))
    response = await put(client, "mine", (config, arrays))
    assert response.status_code == 422
    error = responses.ErrorAnswer.model_validate(response.json()).error
    assert error.code == "invalid_adapter"
    assert len(error.faults) >= 2
    assert staging(world) == []


async def test_a_pickle_is_refused(client: httpx.AsyncClient) -> None:
    config, _ = adapter_files(files.lora())
    parts = {"config": ("c", config), "weights": ("adapter_model.safetensors", pickle.dumps({"x": 1}))}
    response = await client.put("/v1/adapters/mine", files=parts)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_adapter")


@pytest.mark.parametrize("name", ["UPPER", "-x", "a" * 65, "a%20b", "tiny-base"])
async def test_bad_names(client: httpx.AsyncClient, name: str) -> None:
    response = await put(client, name)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "adapter_id")


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"config": b"{}"}, "weights: the part is missing"),
        ({"weights": b""}, "config: the part is missing"),
        ({"config": b"{}", "weights": b"", "extra": b""}, "unknown part 'extra'"),
        ([("config", b"{}"), ("config", b"{}")], "config: the part comes twice"),
    ],
)
async def test_bad_forms(client: httpx.AsyncClient, world: World, parts: Any, word: str) -> None:
    response = await client.put("/v1/adapters/mine", files=parts)
    assert response.status_code == 400
    assert word in response.json()["error"]["message"]
    assert staging(world) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=" + "x" * 300, b""),
        ("multipart/form-data; boundary=b", b"junk"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\n{}'),
        ("multipart/form-data; boundary=b", b""),
    ],
)
async def test_broken_forms(client: httpx.AsyncClient, world: World, content_type: str, body: bytes) -> None:
    response = await client.put("/v1/adapters/mine", content=body, headers={"content-type": content_type})
    assert response.status_code == 400
    assert staging(world) == []


@pytest.mark.parametrize("declared", [True, False])
async def test_too_large(make: MakeWorld, declared: bool) -> None:
    """Refused by its declared length before anything is read, and while reading where none is declared."""
    world = make(max_adapter_bytes=2048)
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="weights"\r\n\r\n'
        for _ in range(1000):
            sent += 1024
            yield bytes(1024)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    if declared:
        headers["content-length"] = str(10**9)
    async with client_of(world) as client:
        response = await client.put("/v1/adapters/mine", content=body(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
    assert sent <= (0 if declared else 8 * 1024)
    assert staging(world) == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An operator's folder with one adapter in it."""
    folder = tmp_path / "roots" / "lora"
    folder.mkdir(parents=True)
    config, weights = adapter_files(files.lora())
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return tmp_path / "roots"


async def load(world: World, **body: Any) -> httpx.Response:
    async with client_of(world) as client:
        return await client.post("/v1/load_lora_adapter", json=body)


async def test_vllm_load_and_unload(make: MakeWorld, root: Path) -> None:
    world = make(adapter_roots=[str(root)])
    for path in (str(root / "lora"), "lora"):
        response = await load(world, lora_name="mine", lora_path=path, load_inplace=True)
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    again = await load(world, lora_name="mine", lora_path="lora")
    assert (again.status_code, again.json()["error"]["param"]) == (409, "lora_name")
    async with client_of(world) as client:
        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})).status_code == 200
        assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})).status_code == 404


async def test_without_roots_every_path_is_refused(world: World, root: Path) -> None:
    response = await load(world, lora_name="mine", lora_path=str(root / "lora"))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_denied")


@pytest.mark.parametrize("path", ["..", "../outside", "lora/../../outside", "/etc", "/", "~", "link", "loop", "a\0b"])
async def test_paths_outside_the_roots(make: MakeWorld, root: Path, path: str) -> None:
    """Existing or not, the answer is one."""
    outside = root.parent / "outside"
    (root / "lora").rename(outside)
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    response = await load(make(adapter_roots=[str(root)]), lora_name="mine", lora_path=path)
    assert (response.status_code, response.json()["error"]["message"]) == (
        403,
        "lora_path: is not in a folder that this server may read from",
    )


async def test_links_inside_an_adapter_do_not_lead_out(make: MakeWorld, root: Path) -> None:
    secret = root.parent / "secret"
    secret.write_bytes(b"{}")
    config = root / "lora" / "adapter_config.json"
    config.unlink()
    config.symlink_to(secret)
    response = await load(make(adapter_roots=[str(root)]), lora_name="mine", lora_path="lora")
    assert response.status_code == 403


async def test_pipes_and_folders_are_no_adapters(make: MakeWorld, root: Path) -> None:
    """Opening a pipe would wait for its writer."""
    weights = root / "lora" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    response = await load(make(adapter_roots=[str(root)]), lora_name="mine", lora_path="lora")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    assert "not a regular file" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("made", "settings", "words"),
    [
        (files.lora, {"adapter_device_bytes": "4KiB"}, ["weights take", "adapter_device_bytes is 4096"]),
        (lambda: files.prefix(100), {"page_size": 1}, ["needs 101 KV pages", "kv_cache_bytes holds 64"]),
    ],
)
async def test_what_the_device_could_never_hold_is_refused_when_it_comes(
    make: MakeWorld, made: Any, settings: dict[str, Any], words: list[str]
) -> None:
    world = make(**settings)
    async with client_of(world) as client:
        refused = await put(client, "mine", made())
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_adapter")
        assert all(word in refused.json()["error"]["message"] for word in words), refused.text
        assert (await client.get("/v1/adapters/mine")).status_code == 404
    assert staging(world) == []
