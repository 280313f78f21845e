import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save
from sqlalchemy import event

from peftserve.adapters import blobs, manifest
from peftserve.adapters.manifest import AdapterRecord
from peftserve.adapters.store import AdapterStore
from peftserve.config import LimitsConfig
from peftserve.errors import (
    AdapterNotFoundError,
    ConfigurationError,
    ConflictError,
    InvalidAdapterError,
    InvalidRequestError,
    PayloadTooLargeError,
    UnavailableError,
)
from peftserve.types import AdapterKind, AdapterRef
from tests.adapters.files import SPEC, bottleneck, check, lora, prefix, push


def open_store(root: Path, **options: object) -> AdapterStore:
    return AdapterStore(root, SPEC, max_rank=16, **options)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = open_store(tmp_path / "adapters", reserved_names={"base-model"})
    yield opened
    opened.close()


def staged(store: AdapterStore) -> list[str]:
    return os.listdir(store.root / "staging")


def digests(records: list[AdapterRecord]) -> list[str]:
    return [record.digest for record in records]


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"data_dir: cannot write to .*file/adapters: Not a directory"):
        AdapterStore(tmp_path / "file" / "adapters", SPEC)
    (tmp_path / "index.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigurationError, match="cannot open the adapter index: file is not a database"):
        AdapterStore(tmp_path, SPEC)


def test_a_full_disk_is_no_bug(tmp_path: Path) -> None:
    """The index on a disk without room: SQLite's own limit stands in for it."""

    def no_room(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA max_page_count=1")

    store = AdapterStore(tmp_path, SPEC)
    event.listen(store._index._engine, "connect", no_room)
    store._index._engine.dispose()

    def fill() -> None:
        for seed in range(100):
            push(store, "t", f"a{seed}", lora(seed=seed))

    with pytest.raises(UnavailableError, match="adapter storage is full") as caught:
        fill()
    assert caught.value.retry_after_s
    store.close()


def test_publish_and_read_back(store: AdapterStore) -> None:
    before = time.time()
    files = lora(base_model_name_or_path="org/base")
    record = push(store, "t", "my-lora", files)
    assert before <= record.created_at <= time.time()
    assert (record.kind, record.pinned, record.base_model_name) == (AdapterKind.LORA, False, "org/base")
    assert record.details["target_modules"] == ["q_proj", "v_proj"]
    assert record.ref == AdapterRef(digest=record.digest, kind=AdapterKind.LORA, name="my-lora", tenant="t")
    assert store.get("t", "my-lora") == record
    assert store.list("t") == [record]
    assert staged(store) == []

    config, tensors = blobs.read_adapter(store.root, record.digest)
    assert config == files[0]
    assert tensors.keys() == files[1].keys()
    canonical, weights = manifest.canonical_config(files[0]), save(files[1])
    assert record.size_bytes == len(canonical) + len(weights)
    assert record.digest == manifest.digest_of(
        hashlib.sha256(canonical).hexdigest(), hashlib.sha256(weights).hexdigest()
    )


def test_every_kind(store: AdapterStore) -> None:
    for name, files in {"l": lora(), "p": prefix(), "b": bottleneck()}.items():
        push(store, "t", name, files)
    assert [(record.name, record.kind) for record in store.list("t")] == [
        ("b", AdapterKind.BOTTLENECK),
        ("l", AdapterKind.LORA),
        ("p", AdapterKind.PREFIX),
    ]


def test_uploads_come_in_any_order_and_any_chunks(store: AdapterStore) -> None:
    config, arrays = lora()
    text, weights = json.dumps(config, indent=3).encode(), save(arrays)
    whole = push(store, "t", "whole", (config, arrays))
    with store.new_upload("t", "chunks") as upload:
        for begin in range(0, len(weights), 1000):
            upload.write_weights(weights[begin : begin + 1000])
        for begin in range(0, len(text), 7):
            upload.write_config(text[begin : begin + 7])
        assert upload.received_bytes == len(text) + len(weights)
        assert upload.commit().digest == whole.digest


def test_the_same_again_changes_nothing(store: AdapterStore) -> None:
    first = push(store, "t", "a", lora())
    assert push(store, "t", "a", lora()) == first
    assert store.history("t", "a") == [first]


def test_tenants_do_not_see_each_other(store: AdapterStore) -> None:
    one = push(store, "t1", "a", lora())
    two = push(store, "t2", "a", lora())
    assert one.digest == two.digest
    with pytest.raises(AdapterNotFoundError):
        store.get("t3", "a")
    store.delete("t1", "a")
    assert store.collect_garbage() == []
    assert store.get("t2", "a") == two
    assert store.list("t1") == []


def test_versions(store: AdapterStore) -> None:
    records = [push(store, "t", "a", lora(seed=seed)) for seed in range(5)]
    assert store.get("t", "a") == records[4]
    assert store.history("t", "a") == records[:1:-1]
    assert store.resolve("t", "a") == records[4]
    assert store.resolve("t", f"a@sha256:{records[2].digest}") == records[2]
    with pytest.raises(AdapterNotFoundError) as caught:
        store.resolve("t", f"a@sha256:{records[1].digest}")
    assert caught.value.message.startswith(f"adapter 'a' has no version sha256:{records[1].digest}; kept are sha256:")
    assert sorted(store.collect_garbage()) == sorted(digests(records[:2]))
    assert store.collect_garbage() == []


def test_going_back_to_an_old_version(store: AdapterStore) -> None:
    old = push(store, "t", "a", lora(seed=1))
    new = push(store, "t", "a", lora(seed=2))
    assert push(store, "t", "a", lora(seed=1)).digest == old.digest
    assert digests(store.history("t", "a")) == [old.digest, new.digest, old.digest]
    assert store.resolve("t", f"a@sha256:{new.digest}").digest == new.digest


def test_pins(store: AdapterStore) -> None:
    push(store, "t1", "a", lora(seed=1))
    push(store, "t2", "b", lora(seed=2))
    push(store, "t2", "c", lora(seed=3))
    assert store.pinned() == []
    assert store.set_pinned("t2", "b", True).pinned
    store.set_pinned("t1", "a", True)
    assert [(record.tenant, record.name) for record in store.pinned()] == [("t1", "a"), ("t2", "b")]
    replaced = push(store, "t2", "b", lora(seed=4))
    assert replaced.pinned
    assert store.pinned()[1] == replaced
    with pytest.raises(ConflictError, match="adapter 'b' is pinned; unpin it before deleting it"):
        store.delete("t2", "b")
    store.set_pinned("t2", "b", False)
    assert store.delete("t2", "b").digest == replaced.digest
    with pytest.raises(AdapterNotFoundError):
        store.set_pinned("t2", "b", True)


def test_unknown_names(store: AdapterStore) -> None:
    push(store, "t", "sentiment", lora())
    for call in (store.get, store.resolve, store.delete, store.history):
        with pytest.raises(AdapterNotFoundError) as caught:
            call("t", "sentimant")
        assert caught.value.message == "no adapter is called 'sentimant'; similar names: sentiment"


def test_names_are_checked_before_anything_is_stored(store: AdapterStore) -> None:
    for name in ("../x", "Upper", "base-model"):
        with pytest.raises(InvalidRequestError):
            store.new_upload("t", name)
    assert staged(store) == []


def test_quota(tmp_path: Path) -> None:
    store = open_store(tmp_path, limits=LimitsConfig(max_adapters=2))
    push(store, "t", "a", lora())
    push(store, "t", "b", lora())
    with pytest.raises(ConflictError) as caught:
        store.new_upload("t", "c")
    assert caught.value.message == "tenant 't' has 2 adapters, the limit is 2 (max_adapters); delete one first"
    push(store, "t", "a", lora(seed=1))
    push(store, "other", "c", lora())
    store.delete("t", "b")
    push(store, "t", "c", lora())
    store.close()


def test_quota_holds_for_uploads_at_once(tmp_path: Path) -> None:
    store = open_store(tmp_path, limits=LimitsConfig(max_adapters=3))
    config, weights = json.dumps(lora()[0]).encode(), save(lora()[1])
    uploads = [store.new_upload("t", f"a{i}") for i in range(8)]
    for upload in uploads:
        upload.write_config(config)
        upload.write_weights(weights)

    def committed(index: int) -> bool:
        try:
            uploads[index].commit()
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(committed, range(8))) == 3
    assert len(store.list("t")) == 3
    assert staged(store) == []
    store.close()


def test_caps(tmp_path: Path) -> None:
    store = open_store(tmp_path, limits=LimitsConfig(max_adapter_bytes=5000))
    with store.new_upload("t", "a") as upload:
        upload.write_config(b"{" * 1000)
        upload.write_weights(b"x" * 4000)
        with pytest.raises(PayloadTooLargeError) as caught:
            upload.write_weights(b"x")
        assert caught.value.message == "the adapter is larger than the limit of 5000 bytes (max_adapter_bytes)"
        assert (store.root / "staging" / staged(store)[0] / blobs.WEIGHTS_FILE).stat().st_size <= 4000
    assert staged(store) == []
    store.close()


def test_cap_on_the_config(store: AdapterStore) -> None:
    with store.new_upload("t", "a") as upload:
        upload.write_config(b" " * manifest.MAX_CONFIG_BYTES)
        with pytest.raises(PayloadTooLargeError, match="config is larger than the limit of 1048576 bytes"):
            upload.write_config(b" ")


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (b"", b"x", "the config (adapter_config.json) is missing"),
        (b"{}", b"", "the weights file is empty"),
        (b"[", b"x", "the weights are not safetensors: 1 bytes"),
        (b"{}", b"\x80\x04\x95" + b"x" * 100, "the weights are a pickle, not safetensors"),
    ],
)
def test_bad_uploads_leave_nothing(store: AdapterStore, config: bytes, weights: bytes, message: str) -> None:
    if message.startswith("the weights are not"):
        config = json.dumps(lora()[0]).encode()
    with store.new_upload("t", "a") as upload:
        upload.write_config(config)
        upload.write_weights(weights)
        with pytest.raises(InvalidAdapterError) as caught:
            upload.commit()
    assert caught.value.faults[0].startswith(message)
    assert staged(store) == []
    assert list((store.root / "blobs").iterdir()) == []
    assert store.list("t") == []


def test_a_bad_upload_leaves_the_old_version(store: AdapterStore) -> None:
    record = push(store, "t", "a", lora())
    with pytest.raises(InvalidAdapterError, match="QA-LoRA is not supported yet"):
        push(store, "t", "a", lora(use_qalora=True))
    assert store.get("t", "a") == record


def test_an_upload_ends_once(store: AdapterStore) -> None:
    upload = store.new_upload("t", "a")
    upload.discard()
    upload.discard()
    for call in (upload.commit, lambda: upload.write_config(b"x"), lambda: upload.write_weights(b"x")):
        with pytest.raises(ConflictError, match="this upload is over"):
            call()
    assert staged(store) == []


def test_a_full_disk_is_said_so(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with store.new_upload("t", "a") as upload:
        upload.write_config(json.dumps(lora()[0]).encode())
        upload.write_weights(save(lora()[1]))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UnavailableError, match="adapter storage is full"):
            upload.commit()
    assert staged(store) == []


def test_garbage_in_use_stays(store: AdapterStore) -> None:
    record = push(store, "t", "a", lora())
    store.delete("t", "a")
    assert not store.is_live(record.digest)
    assert store.collect_garbage(in_use={record.digest}) == []
    assert blobs.read_adapter(store.root, record.digest)[0] == lora()[0]
    assert push(store, "t", "b", lora()).digest == record.digest
    assert store.is_live(record.digest)
    store.delete("t", "b")
    assert store.collect_garbage() == [record.digest]
    with pytest.raises(AdapterNotFoundError, match=f"no adapter with digest sha256:{record.digest} is stored"):
        blobs.read_adapter(store.root, record.digest)
    assert staged(store) == []


def test_tensors_outlive_their_blob(store: AdapterStore) -> None:
    files = lora()
    record = push(store, "t", "a", files)
    _, tensors = blobs.read_adapter(store.root, record.digest)
    store.delete("t", "a")
    assert store.collect_garbage() == [record.digest]
    name = next(iter(tensors))
    assert tensors[name].float32().tolist() == files[1][name].tolist()


@pytest.mark.parametrize("file", [blobs.CONFIG_FILE, blobs.WEIGHTS_FILE])
def test_corruption_is_found_and_healed_by_the_same_upload(store: AdapterStore, file: str) -> None:
    record = push(store, "t", "a", lora())
    path = blobs.blob_dir(store.root, record.digest) / file
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InvalidAdapterError, match="is corrupt on disk"):
        blobs.read_adapter(store.root, record.digest)
    assert push(store, "t", "a", lora()) == record
    assert blobs.read_adapter(store.root, record.digest)[0] == lora()[0]
    assert staged(store) == []


@pytest.mark.parametrize("digest", ["", "../" * 20, "0" * 63, "G" * 64, "0" * 64 + "\n"])
def test_a_digest_is_never_a_path(store: AdapterStore, digest: str) -> None:
    with pytest.raises(AdapterNotFoundError, match="64 hexadecimal digits"):
        blobs.read_adapter(store.root, digest)


def test_reopening_finds_everything(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record = push(store, "t", "a", lora())
    store.set_pinned("t", "a", True)
    store.close()
    store = open_store(tmp_path)
    assert store.get("t", "a").digest == record.digest
    assert digests(store.pinned()) == [record.digest]
    store.close()


def test_two_processes_worth_of_stores_share_a_root(tmp_path: Path) -> None:
    """What one publishes the other sees; opening one more does not sweep an upload under way."""
    one, two = open_store(tmp_path), open_store(tmp_path)
    with one.new_upload("t", "a") as upload:
        upload.write_config(json.dumps(lora()[0]).encode())
        upload.write_weights(save(lora()[1]))
        three = open_store(tmp_path)
        record = upload.commit()
    assert two.get("t", "a") == three.get("t", "a") == record
    for store in (one, two, three):
        store.close()


def test_a_newer_servers_index_is_refused(tmp_path: Path) -> None:
    import sqlalchemy as sa

    from peftserve.errors import ConfigurationError

    open_store(tmp_path).close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'index.sqlite3'}")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE schema_version SET version = 99"))
    engine.dispose()
    with pytest.raises(ConfigurationError, match="schema version 99, this server knows 1"):
        open_store(tmp_path)


def test_many_threads(store: AdapterStore) -> None:
    """Uploads, reads, deletes and collections at once: every read finds a whole adapter or none."""
    stop = threading.Event()
    contents = {push(store, "seed", f"s{seed}", lora(seed=seed)).digest: seed for seed in range(4)}

    def write(worker: int) -> None:
        for round_ in range(6):
            push(store, "t", f"a{worker % 2}", lora(seed=(worker + round_) % 4))
            if round_ % 3 == 2:
                try:
                    store.delete("t", f"a{worker % 2}")
                except AdapterNotFoundError:
                    continue

    def read() -> int:
        count = 0
        while not stop.is_set():
            for record in store.list("t"):
                config, tensors = blobs.read_adapter(store.root, record.digest)
                assert record.digest in contents
                assert check((config, {name: tensor.float32() for name, tensor in tensors.items()}))
                count += 1
            # All of these bytes are also the seed tenant's, so nothing may go.
            assert store.collect_garbage() == []
        return count

    with ThreadPoolExecutor(6) as pool:
        reader = pool.submit(read)
        try:
            for done in [pool.submit(write, worker) for worker in range(4)]:
                done.result()
        finally:
            stop.set()
        assert reader.result() > 0
    assert staged(store) == []
    assert {path.name for path in (store.root / "blobs").glob("??/*")} == contents.keys()


def test_garbage_is_never_collected_from_under_a_publication(store: AdapterStore) -> None:
    """A digest that comes and goes, while the collector runs all the time: a published version always has its bytes."""
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            store.collect_garbage()

    with ThreadPoolExecutor(2) as pool:
        collectors = [pool.submit(collect) for _ in range(2)]
        try:
            for _ in range(25):
                record = push(store, "t", "a", lora())
                assert blobs.read_adapter(store.root, record.digest)[0] == lora()[0]
                store.delete("t", "a")
        finally:
            stop.set()
        for collector in collectors:
            collector.result()
