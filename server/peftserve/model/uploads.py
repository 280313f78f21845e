"""Copies from the host to the device beside the steps that run: through pinned staging memory, on a stream of its own.

Order on a GPU: the copies of an upload wait for all that the computing stream was given before the upload began (it may
still read what they overwrite), and the computing stream waits, on the device, for uploads that are through `upload`
before it goes on (`join`). No thread waits for a step, and a step at most for what the staging buffers hold. On the CPU
the same code copies at once, and there is nothing to wait for.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

import torch

_BUFFER_BYTES: Final = 4 << 20
_BUFFERS: Final = 2
# Pieces start at multiples of this in a buffer: any element's size divides it, and so does a transaction's.
_ALIGNMENT: Final = 256


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait on the host until the stream is there."""


class Streams(Protocol):
    """The streams of a device."""

    def copying(self) -> AbstractContextManager[object]:
        """In the block, the copying stream is current; its work waits for what the computing stream has been given."""

    def record(self) -> Event:
        """The end of the copying stream's work so far."""

    def wait(self, event: Event) -> None:
        """What the current stream, the computing one, is given from now on waits for `event`."""


class CudaStreams:
    """The default stream computes, one of its own copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copying(self) -> AbstractContextManager[object]:
        """See `Streams`."""
        self._copying.wait_stream(torch.cuda.default_stream(self._device))
        return torch.cuda.stream(self._copying)

    def record(self) -> torch.cuda.Event:
        """See `Streams`."""
        event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._copying)
        return event

    def wait(self, event: Event) -> None:
        """See `Streams`."""
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(event)


class _Done:
    def synchronize(self) -> None:
        """Nothing is ever under way."""


class NoStreams:
    """The CPU: a copy is done when it returns."""

    def copying(self) -> AbstractContextManager[object]:
        """See `Streams`."""
        return nullcontext()

    def record(self) -> Event:
        """See `Streams`."""
        return _Done()

    def wait(self, event: Event) -> None:
        """See `Streams`."""


@dataclass(slots=True)
class _Buffer:
    """`memory` [bytes], of which `used` hold pieces whose copies may be under way; `copied`: the last one of them."""

    memory: torch.Tensor
    used: int = 0
    copied: Event | None = None


Put = Callable[[torch.Tensor, torch.Tensor], None]
"""put(to, source): copy `source`, on the host, to `to`, on the device: contiguous, of as many elements, dtypes may
differ."""


class Uploads:
    """Uploads from any thread, one after the other. `streams` is the device's way to order them."""

    def __init__(
        self, device: torch.device, *, buffer_bytes: int = _BUFFER_BYTES, streams: Streams | None = None
    ) -> None:
        is_cuda = device.type == "cuda"
        self._streams = streams or (CudaStreams(device) if is_cuda else NoStreams())
        self._buffers = [
            _Buffer(torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_cuda)) for _ in range(_BUFFERS)
        ]
        self._lock = threading.Lock()
        self._through: deque[Event] = deque()

    @contextmanager
    def upload(self) -> Iterator[Put]:
        """Copies that belong together. After the block, `join` brings them before whatever is computed next.

        Also when the block raises: copies may be under way then.
        """
        with self._lock, self._streams.copying():
            try:
                yield self._put
            finally:
                self._through.append(self._streams.record())

    def join(self) -> None:
        """The current stream waits for all uploads whose block has been left. Waits for no lock and no copy itself."""
        while self._through:
            self._streams.wait(self._through.popleft())

    def _put(self, to: torch.Tensor, source: torch.Tensor) -> None:
        if to.numel() != source.numel() or not to.is_contiguous():
            raise ValueError(
                f"to: must be contiguous with {source.numel()} elements, is {list(to.shape)} {to.stride()}"
            )
        target = to.view(-1).view(torch.uint8)
        pieces = source.to(to.dtype).contiguous().view(-1).view(torch.uint8)
        start = 0
        while start < len(pieces):
            room = self._room(len(pieces) - start)
            room.copy_(pieces[start : start + len(room)])
            target[start : start + len(room)].copy_(room, non_blocking=True)
            start += len(room)

    def _room(self, wanted: int) -> torch.Tensor:
        """Up to `wanted` bytes of staging memory that no copy reads any more."""
        buffer = self._buffers[0]
        if buffer.used >= len(buffer.memory):
            buffer.copied = self._streams.record()
            self._buffers.append(self._buffers.pop(0))
            buffer = self._buffers[0]
            if buffer.copied is not None:
                buffer.copied.synchronize()
            buffer.used, buffer.copied = 0, None
        start = buffer.used
        end = min(start + wanted, len(buffer.memory))
        buffer.used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return buffer.memory[start:end]
