"""The engine process: `python -m peftserve.engine.process FD`, started by `engine.client` with a socket as FD."""

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from peftserve import log as logging_setup
from peftserve import memory
from peftserve.config import EngineConfig
from peftserve.engine.channel import EngineChannel
from peftserve.engine.core import EngineCore
from peftserve.engine.messages import EngineInfo, Fatal, Ready, Shutdown, Start
from peftserve.errors import InternalError, PeftserveError, UnavailableError

log = logging_setup.get_logger(__name__)

# While requests wait but none can run, look again this often: ageing is by the clock.
_WAITING_POLL_S = 0.05
# After so long without work, give back what work has left.
_REST_S = 1.0
# So many failed steps in a row are not their requests' fault: the device is lost, say. The next engine may do better.
_MOST_FAILED_STEPS = 8


def main(fd: int) -> int:
    """Serve one front end until it asks to shut down or goes away; returns the exit status."""
    memory.share_one_heap()
    # Ctrl-C, and the SIGTERM of service managers, reach the whole group. The front end decides, and lets requests end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = EngineChannel(socket.socket(fileno=fd))
    try:
        return _serve(channel)
    except (EOFError, ConnectionError):
        return 0  # the front end is gone: nobody to serve, nobody to tell


def _serve(channel: EngineChannel) -> int:
    while not (received := channel.receive(None)):
        pass  # a part of a message
    start, *early = received
    if not isinstance(start, Start):
        raise RuntimeError(f"expected Start, got {type(start).__name__}")
    logging_setup.configure(start.log_level, start.log_format)
    try:
        build_engine = _build_engine()
        core, info = build_engine(EngineConfig.model_validate_json(start.config), Path(start.checkpoint), channel.wake)
    except PeftserveError as error:
        channel.send(Fatal(error=error.to_info()))
        return 1
    except Exception as error:
        log.exception("engine start failed")
        channel.send(Fatal(error=InternalError(f"engine start failed: {type(error).__name__}: {error}").to_info()))
        return 1
    # What is there now stays: no collection needs to go through torch's modules again, which takes 0.1 s.
    gc.collect()
    gc.freeze()
    memory.release_freed()
    memory.drop_library_pages()
    channel.send(Ready(info=info))
    log.info("engine ready", pid=os.getpid(), device=info.device, dtype=info.dtype, kv_pages=info.num_kv_pages)
    for command in early:
        core.handle(command)
    return run(core, channel)


def run(core: EngineCore, channel: EngineChannel) -> int:
    """The loop of the process: commands in, a step, what it produced out."""
    is_rested = True
    while True:
        patience = _patience(core)
        if patience is None and not is_rested:
            patience = _REST_S
        commands = channel.receive(patience)
        if commands is None and patience == _REST_S:
            memory.release_freed()
            memory.drop_library_pages()
            is_rested = True
            continue
        for command in commands or ():
            if isinstance(command, Shutdown):
                core.scheduler.fail_all(UnavailableError("the server is shutting down"))
                channel.send(core.step())
                core.adapters.close()
                return 0
            core.handle(command)
        update = core.step()
        is_rested = is_rested and not update.num_batch_tokens and not update.residency
        # A command is always answered, if only with the state: that is what a `Ping` is for.
        if commands or update.events or update.num_batch_tokens or update.residency or update.gone:
            channel.send(update)
        if core.failed_steps >= _MOST_FAILED_STEPS:
            log.error("every step fails; the engine ends", failed=core.failed_steps)
            return 1


def _build_engine() -> Callable[[EngineConfig, Path, Callable[[], None]], tuple[EngineCore, EngineInfo]]:
    """`build.build_engine`. Its import brings in torch, which the front end must not have.

    What only torch's compiler needs, how a thousand ops compute shapes without data, takes 18 MB and a fifth of that
    import's time. On a GPU it comes later, since nobody knows what asks for it there.
    """
    name = "torch._meta_registrations"
    with memory.spared(name):
        import torch

        from peftserve.engine.build import build_engine

    if torch.cuda.is_available():
        import_module(name)
    return build_engine


def _patience(core: EngineCore) -> float | None:
    if core.is_busy:
        return 0.0
    return _WAITING_POLL_S if len(core.scheduler.waiting) else None


if __name__ == "__main__":
    status = main(int(sys.argv[1]))
    logging.shutdown()
    # Tearing torch down takes seconds and frees only what the operating system takes back anyway.
    os._exit(status)
