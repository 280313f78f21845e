"""The loop of the engine process over a real channel, with the simulated device."""

import socket
import threading
import time

import pytest

from peftserve.engine import channel as channels
from peftserve.engine import process
from peftserve.engine.adapter_memory import HostAdapter
from peftserve.engine.messages import AddRequest, Shutdown, StepUpdate
from peftserve.types import AdapterKind, AdapterRef, FinishReason, TokenEvent

from .harness import Harness
from .simulator import SimulatedMemory, adapter, request


class _SlowMemory(SimulatedMemory):
    def load(self, ref: AdapterRef) -> HostAdapter:
        time.sleep(0.1)
        return super().load(ref)


@pytest.mark.parametrize("rest_s", [0.05, 5.0], ids=["rests before the load is done", "is about to rest"])
def test_a_load_that_is_done_wakes_an_idle_engine(monkeypatch: pytest.MonkeyPatch, rest_s: float) -> None:
    monkeypatch.setattr(process, "_REST_S", rest_s)
    h = Harness(memory=_SlowMemory())
    ours, theirs = socket.socketpair()
    channel = channels.EngineChannel(theirs)
    h.adapters._pool._on_done = channel.wake
    loop = threading.Thread(target=process.run, args=(h.core, channel))
    loop.start()
    try:
        ours.settimeout(20.0)  # nothing else would wake it: no ping, no other command
        spec = request("r", [1, 2, 3], ref=adapter("cold", AdapterKind.LORA))
        h.runner.specs["r"] = spec
        ours.sendall(channels.encode(AddRequest(request=spec)))
        decoder = channels.update_decoder()
        reasons: list[FinishReason | None] = []
        while not any(reasons):
            for update in decoder.feed(ours.recv(1 << 16)):
                assert isinstance(update, StepUpdate)
                reasons += [event.finish_reason for event in update.events]
        assert reasons[-1] is FinishReason.LENGTH
    finally:
        ours.sendall(channels.encode(Shutdown()))
        loop.join()
        for end in (ours, theirs, channel._wake_in, channel._wake_out, channel._selector):
            end.close()


def test_an_engine_whose_every_step_fails_ends() -> None:
    h = Harness()
    h.runner.execute = lambda plan: 1 // 0  # type: ignore[method-assign,assignment,return-value]
    ours, theirs = socket.socketpair()
    channel = channels.EngineChannel(theirs)
    statuses: list[int] = []
    loop = threading.Thread(target=lambda: statuses.append(process.run(h.core, channel)))
    loop.start()
    try:
        ours.settimeout(20.0)
        decoder = channels.update_decoder()
        for index in range(process._MOST_FAILED_STEPS):
            assert not statuses
            spec = request(f"r{index}", [1, 2, 3])
            ours.sendall(channels.encode(AddRequest(request=spec)))
            events: list[TokenEvent] = []
            while not events:
                for update in decoder.feed(ours.recv(1 << 16)):
                    assert isinstance(update, StepUpdate)
                    events += update.events
            assert events[-1].finish_reason is FinishReason.ERROR
        loop.join(20)
        assert statuses == [1]
    finally:
        for end in (ours, theirs, channel._wake_in, channel._wake_out, channel._selector):
            end.close()
        h.adapters.close()
