"""Frames on the socket between front end and engine: a 4-byte little-endian length, then one msgpack message."""

import contextlib
import selectors
import socket
import struct
from typing import Generic, TypeVar

import msgspec

from peftserve.engine.messages import Command, Update

_HEADER = struct.Struct("<I")
_READ_SIZE = 1 << 16
M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


def encode(message: Command | Update) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


class FrameDecoder(Generic[M]):
    """Cuts a byte stream into messages of one type."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[M]") -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """The messages that `data` completes."""
        self._buffer += data
        messages = []
        offset = 0
        while len(self._buffer) - offset >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._buffer, offset)
            end = offset + _HEADER.size + size
            if end > len(self._buffer):
                break
            messages.append(self._decoder.decode(memoryview(self._buffer)[offset + _HEADER.size : end]))
            offset = end
        del self._buffer[:offset]
        return messages


def command_decoder() -> FrameDecoder[Command]:
    """For the engine's end."""
    return FrameDecoder(msgspec.msgpack.Decoder(Command))


def update_decoder() -> FrameDecoder[Update]:
    """For the front end's end."""
    return FrameDecoder(msgspec.msgpack.Decoder(Update))


class EngineChannel:
    """The engine's end: blocking sends, receives with a timeout that any thread may cut short with `wake`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = command_decoder()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._selector.register(self._wake_out, selectors.EVENT_READ)

    def wake(self) -> None:
        """End a `receive` that waits. From any thread."""
        with contextlib.suppress(BlockingIOError):  # full: a wake-up is pending already
            self._wake_in.send(b"\0")

    def receive(self, timeout: float | None) -> list[Command] | None:
        """The commands that have come, waiting up to `timeout` seconds (None: until there is something). None is for
        nothing at all; when it was woken, there may be no command either.

        EOFError when the front end is gone.
        """
        commands: list[Command] = []
        ready = self._selector.select(timeout)
        if not ready:
            return None
        for key, _ in ready:
            if key.fileobj is self._wake_out:
                self._wake_out.recv(_READ_SIZE)
                continue
            data = self._sock.recv(_READ_SIZE)
            if not data:
                raise EOFError("the front end closed the channel")
            commands += self._decoder.feed(data)
        return commands

    def send(self, update: Update) -> None:
        """Write one message; blocks while the front end is behind. BrokenPipeError when it is gone."""
        self._sock.sendall(encode(update))
