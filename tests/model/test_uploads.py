"""Uploads through staging memory: every byte arrives, and nothing is overwritten or read before its time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from peftserve.model.uploads import Uploads

CPU = torch.device("cpu")


class LoggedEvent:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self._log = log

    def synchronize(self) -> None:
        self._log.append(f"host waits for {self.name}")


class LoggedStreams:
    """Streams that do nothing but say in which order they were asked."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._events = 0

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.log.append("begin")
        yield
        self.log.append("end")

    def record(self) -> LoggedEvent:
        self._events += 1
        self.log.append(f"record {self._events}")
        return LoggedEvent(str(self._events), self.log)

    def wait(self, event: object) -> None:
        assert isinstance(event, LoggedEvent)
        self.log.append(f"steps wait for {event.name}")


@pytest.mark.parametrize("buffer_bytes", [256, 1000, 1 << 16])
def test_everything_arrives(buffer_bytes: int) -> None:
    uploads = Uploads(CPU, buffer_bytes=buffer_bytes)
    sources = [
        torch.randn(3, 700),
        torch.randn(1500).bfloat16(),
        torch.tensor(7, dtype=torch.int32),
        torch.empty(0),
        torch.arange(999),
        torch.randn(40, 30).t(),
    ]
    targets = [torch.zeros(source.shape, dtype=source.dtype) for source in sources]
    with uploads.upload() as put:
        for target, source in zip(targets, sources, strict=True):
            put(target, source)
    uploads.join()
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)


def test_a_part_of_a_larger_tensor_in_another_dtype() -> None:
    table = torch.full((3, 4, 5), -1, dtype=torch.int32)
    with Uploads(CPU).upload() as put:
        put(table[1], torch.arange(20).view(4, 5))
    assert torch.equal(table[1], torch.arange(20).view(4, 5).int())
    assert (table[[0, 2]] == -1).all()


def test_staging_memory_is_used_again_only_after_its_copies() -> None:
    streams = LoggedStreams()
    uploads = Uploads(CPU, buffer_bytes=256, streams=streams)
    with uploads.upload() as put:
        put(torch.zeros(4 * 256, dtype=torch.uint8), torch.ones(4 * 256, dtype=torch.uint8))
    # the first two buffers are fresh; the third piece goes where the first one was, and so on
    assert streams.log == [
        "begin", "record 1", "record 2", "host waits for 1", "record 3", "host waits for 2", "record 4", "end",
    ]  # fmt: skip


def test_small_pieces_share_a_buffer() -> None:
    streams = LoggedStreams()
    with Uploads(CPU, buffer_bytes=1024, streams=streams).upload() as put:
        for _ in range(8):
            put(torch.zeros(10), torch.ones(10))
    assert streams.log == ["begin", "record 1", "record 2", "end"]


def test_steps_wait_for_uploads_that_are_through_and_only_once() -> None:
    streams = LoggedStreams()
    uploads = Uploads(CPU, streams=streams)
    uploads.join()
    assert streams.log == []
    for _ in range(2):
        with uploads.upload() as put:
            put(torch.zeros(1), torch.ones(1))
            uploads.join()  # a step that runs meanwhile is not held up by this one
    streams.log.clear()
    uploads.join()
    uploads.join()
    assert streams.log == ["steps wait for 2"]


def test_an_upload_that_fails_is_waited_for_too() -> None:
    streams = LoggedStreams()
    uploads = Uploads(CPU, streams=streams)
    with pytest.raises(ValueError, match=r"^to: must be contiguous with 3 elements, is \[2\]"), uploads.upload() as put:
        put(torch.zeros(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"^to: must be contiguous"), uploads.upload() as put:
        put(torch.zeros(4)[::2], torch.ones(2))
    uploads.join()
    assert streams.log[-2:] == ["steps wait for 1", "steps wait for 2"]


def test_threads_take_turns() -> None:
    uploads = Uploads(CPU, buffer_bytes=512)
    targets = [torch.zeros(5000) for _ in range(8)]

    def run(index: int) -> None:
        for _ in range(20):
            with uploads.upload() as put:
                put(targets[index], torch.full((5000,), float(index)))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(targets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, target in enumerate(targets):
        assert (target == index).all()
