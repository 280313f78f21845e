"""Server-sent events from bytes: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream."""

from collections.abc import Iterator
from dataclasses import dataclass

from peftserve_client.errors import ProtocolError

MAX_EVENT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its type ("message" unless the server says otherwise) and its data lines joined by newlines."""

    type: str
    data: bytes


class Decoder:
    """Bytes in, events out; keeps what is incomplete between two calls.

    Lines are split at byte level: a text-level `splitlines` also breaks at U+2028 and U+0085, which are legal inside
    the JSON of an event.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._type = "message"
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes. Raises `ProtocolError` for an event beyond `MAX_EVENT_BYTES`."""
        self._buffer += chunk
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = bytearray(rest)
        for line in lines:
            if event := self._line(bytes(line.removesuffix(b"\r"))):
                yield event
        if self._size + len(self._buffer) > MAX_EVENT_BYTES:
            raise ProtocolError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")

    def _line(self, line: bytes) -> Event | None:
        if not line:
            event = Event(self._type, b"\n".join(self._data)) if self._data else None
            self._type, self._data, self._size = "message", [], 0
            return event
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._size += len(value)
        elif name == b"event":
            self._type = value.decode("utf-8", "replace")
        return None
