"""The wiring's own promises; whole servers are tested elsewhere."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from peftserve import app
from peftserve.config import build
from peftserve.errors import ConfigurationError


def test_the_front_end_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, peftserve.app; print(*({'torch', 'transformers', 'bitsandbytes'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


async def test_a_taken_port_is_told_before_the_model_loads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            await app.serve(build({"data_dir": tmp_path, "port": port, "model": "nowhere"}))
    assert caught.value.field == "port"


async def test_an_unknown_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        await app.serve(build({"data_dir": tmp_path, "port": 0, "grpc_port": 0, "model": "nowhere"}))


def test_logs_as_json() -> None:
    """Ours and the standard library's, one object a line."""
    code = (
        "import logging, structlog, peftserve.log as log; log.configure('info', 'json');"
        "structlog.get_logger('ours').info('hello', request_id='r');"
        "structlog.get_logger('ours').debug('hidden');"
        "logging.getLogger('theirs').warning('careful %s', 1)\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: structlog.get_logger().exception('failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    ours, theirs, failed = map(json.loads, done.stderr.splitlines())
    assert (ours["event"], ours["level"], ours["request_id"]) == ("hello", "info", "r")
    assert (theirs["event"], theirs["level"]) == ("careful 1", "warning")
    assert failed["exception"][0]["exc_type"] == "ZeroDivisionError"


def test_the_child_that_prepares_a_model_ends_with_its_parent() -> None:
    script = (
        "import sys, time, os\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from peftserve.app import _end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=_end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.terminate()
    parent.wait(10)
    parent.stdout.close()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


async def test_a_data_dir_that_is_none_is_a_configuration_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match=r"data_dir: cannot write to .*/file"):
        await app.serve(build({"data_dir": file, "port": 0, "grpc_port": 0}))
