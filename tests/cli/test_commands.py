"""The command line as people and scripts use it, against a real server over a scripted engine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from peftserve import cli, settings
from tests.adapters.files import lora
from tests.scripted_server import ScriptedServer
from tests.scripted_thread import serve_in_thread


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with serve_in_thread(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def server(shared_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> ScriptedServer:
    shared_server.reset()
    monkeypatch.setenv("PEFTSERVE_URL", shared_server.url)
    return shared_server


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["peftserve", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config, arrays = lora()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(save(arrays))
    return tmp_path


def test_generate(run: Run, server: ScriptedServer) -> None:
    assert run("generate", "hi", "--max-tokens", "9").out == "user:hi; \n"
    assert run("generate", "hi", "--raw", "--stream", "--max-tokens", "2").out == "hi\n"
    answer = run("generate", "hi", "--raw", "--max-tokens", "2", "--json").json
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("hi", 2)
    chunks = run("generate", "hi", "--raw", "--max-tokens", "2", "--json", "--stream").out.splitlines()
    assert [json.loads(chunk)["text"] for chunk in chunks] == ["h", "i"]
    over_grpc = run("generate", "hi", "--raw", "--max-tokens", "2", "--grpc", server.target)
    assert over_grpc.out == "hi\n"


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_adapters(run: Run, server: ScriptedServer, adapter: Path, door: str) -> None:
    where = ("--grpc", server.target) if door == "grpc" else ()
    pushed = run("adapters", "push", "law", str(adapter), "--pin", "--json", *where).json
    assert (pushed["adapter_id"], pushed["pinned"]) == ("law", True)
    assert "law: lora, " in run("adapters", "push", "law", str(adapter), *where).out
    assert [item["adapter_id"] for item in run("adapters", "list", "--json", *where).json] == ["law"]
    assert "law" in run("adapters", "list", *where).out
    shown = run("adapters", "show", "law", *where).out
    assert pushed["digest"] in shown
    assert "rank" in shown
    assert run("adapters", "unpin", "law", "--json", *where).json["pinned"] is False
    assert run("adapters", "pin", "law", "--json", *where).json["pinned"] is True
    run("adapters", "unpin", "law", *where)
    assert run("adapters", "rm", "law", *where).out == "law: removed\n"
    assert run("adapters", "list", *where).out == "no adapters\n"


def test_loadtest(run: Run, server: ScriptedServer) -> None:
    flags = ("loadtest", "-n", "6", "-c", "2", "--max-tokens", "3", "--prompt-words", "2")
    report = run(*flags, "--json").json
    assert report["output_tokens"] == 18
    assert set(report["overall"]["ttft_ms"]) == {"p50", "p90", "p99", "mean"}
    table = run(*flags, "--adapters", "base,nope=2", "--grpc", server.target)
    assert table.status == 0
    assert "output tokens/s" in table.out
    assert "4 x adapter_not_found" in table.out
    assert run(*flags, "--adapters", "nope").status == 1
    assert run(*flags, "--adapters", "a=b").status == 2


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("generate", "x", "--adapter", "nope"), 1, "no adapter is called 'nope'"),
        (("generate", "x", "--top-p", "7"), 1, "sampling.top_p: "),
        (("generate", "x", "--raw", "--system", "y"), 2, "--system needs the chat template"),
        (("generate",), 2, "Missing argument"),
        (("generate", "x", "--nope"), 2, "No such option"),
        (("adapters", "push", "law", "/nowhere"), 1, "/nowhere: no such folder"),
        (("adapters", "show", "nope"), 1, "'nope'"),
        (("serve", "--port", "x"), 2, "port: "),
        (("serve", "--host", "0.0.0.0"), 2, "refusing to listen on 0.0.0.0 without API keys"),
        (("serve", "--dtype", "int3", "--page-size", "0"), 2, "page_size: "),
        (("serve", "--config", "/nowhere.yaml"), 2, "/nowhere.yaml: No such file"),
    ],
)
def test_errors_are_one_clear_line(
    run: Run, server: ScriptedServer, arguments: tuple[str, ...], status: int, message: str
) -> None:
    outcome = run(*arguments)
    assert outcome.status == status
    assert message in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_nobody_there(run: Run) -> None:
    outcome = run("adapters", "show", "x", "--url", "http://127.0.0.1:9")
    assert outcome.status == 1
    assert outcome.err.startswith("error: http://127.0.0.1:9: ")


def test_serve_has_a_flag_for_every_setting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = run("serve", "--help").out
    for name in settings.fields():
        assert f"--{name.replace('_', '-')} " in text, name
    assert "--config " in text
    assert "(default: 256MiB)" in text


def test_flags_reach_the_server(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("peftserve.app.run", seen.append)
    monkeypatch.setenv("PEFTSERVE_THREADS", "3")
    file = tmp_path / "config.yaml"
    file.write_text("threads: 5\nport: 1234\n")
    flags = ("--kv-cache-bytes", "1GiB", "--no-prefix-caching", "--insecure", "--host", "0.0.0.0")
    assert run("serve", "--config", str(file), *flags).status == 0
    [built] = seen
    assert (built.engine.threads, built.server.port, built.engine.kv_cache_bytes) == (3, 1234, 2**30)
    assert (built.engine.prefix_caching, built.server.insecure) == (False, True)


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['peftserve', '--help']\n"
        "from peftserve.cli import main\n"
        "try: main()\n"
        "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    environ = {**os.environ, "PEFTSERVE_URL": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)
    loaded = set(done.stderr.split())
    assert "peftserve_client" in loaded
    assert not loaded & {"torch", "transformers", "grpc", "httpx", "numpy", "uvicorn", "starlette", "sqlalchemy"}
