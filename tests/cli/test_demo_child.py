"""The demo's server: a child process that never outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftserve.demo.child import running_server
from peftserve.demo.observe import read_batch
from peftserve.errors import ConfigurationError
from peftserve_client import Client


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"ended with status 2(.|\n)*error: .*/nowhere"),
        running_server(["--model", "/nowhere", "--data-dir", str(tmp_path), "--port", "0"], tmp_path / "log"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_child_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    from tests.tiny_models import make_checkpoint

    checkpoint = make_checkpoint("llama", tmp_path / "model")
    flags = ["--model", str(checkpoint), "--data-dir", str(tmp_path / "data"), "--port", "0", "--grpc-port", "0"]
    program = (
        "import pathlib, sys, time\n"
        "from peftserve.demo.child import running_server\n"
        f"with running_server({flags!r}, pathlib.Path({str(tmp_path / 'log')!r})) as server:\n"
        "    print(server.pid, server.url, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        with Client(url) as client:
            assert client.ready()
        parent.send_signal(number)
        parent.wait(30)
    deadline = time.monotonic() + 10
    while is_alive(int(pid)):
        assert time.monotonic() < deadline, "the server outlived the demo"
        time.sleep(0.05)


def test_the_batch_is_read_from_the_metrics() -> None:
    text = (
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{model_name="m"} 7.0\n'
        "# TYPE vllm:lora_requests_info gauge\n"
        'vllm:lora_requests_info{max_lora="4",running_lora_adapters="b,a",waiting_lora_adapters="c"} 1.7e9\n'
    )
    assert read_batch(text) == (7, ["a", "b"])
