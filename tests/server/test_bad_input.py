"""Bad input through the front door: each is refused with a message that names the field, the value and the limit."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from peftserve_client import Client
from tests.server.process import ServerProcess

pytestmark = pytest.mark.usefixtures("uploaded")

Arrays = dict[str, Any]


def post(server: ServerProcess, path: str = "/v1/generate", **body: object) -> httpx.Response:
    return httpx.post(f"{server.http}{path}", json=body, timeout=60)


def upload(server: ServerProcess, config: bytes, weights: bytes) -> httpx.Response:
    files = {"config": ("adapter_config.json", config), "weights": ("adapter_model.safetensors", weights)}
    return httpx.put(f"{server.http}/v1/adapters/broken", files=files, timeout=60)


def check(answer: httpx.Response, status: int, *words: str) -> None:
    """The status, and every word somewhere in the error."""
    error = answer.json()["error"]
    print(f"{answer.status_code} {json.dumps(error)}")  # noqa: T201
    assert answer.status_code == status
    assert {"message", "type", "code", "request_id"} <= error.keys()
    for word in words:
        assert word in json.dumps(error), word


def test_requests(server: ServerProcess) -> None:
    prompt = [5, 6, 7]
    check(post(server, token_ids=prompt, adapter_id="lora-r9"), 404, "lora-r9", "lora-r8")
    check(post(server, token_ids=prompt, sampling={"max_tokens": -1}), 400, "sampling.max_tokens", "-1", "1")
    check(post(server, token_ids=prompt, sampling={"temprature": 0.5}), 400, "temprature", "temperature")
    check(post(server, token_ids=prompt, sampling={"top_p": 0, "n": 99999}), 400, "sampling.top_p", "sampling.n")
    check(post(server, token_ids=[5] * 300), 400, "300", "256")
    check(post(server, token_ids=[5] * 100, adapter_id="prefix-100", sampling={"max_tokens": 100}), 400, "100", "256")
    check(post(server, token_ids=[9999]), 400, "9999", "256")
    check(post(server, token_ids=[5] * 40_000), 413, "65536")
    check(
        post(server, "/v1/chat/completions", model="nobody", messages=[{"role": "user", "content": "a"}]), 404, "nobody"
    )
    check(
        post(server, "/v1/completions", model="tiny-llama", prompt=prompt, tools=[{"type": "function"}]), 400, "tools"
    )
    answer = httpx.post(
        f"{server.http}/v1/generate", content=b'{"prompt": ', headers={"content-type": "application/json"}
    )
    check(answer, 400, "JSON")
    check(httpx.get(f"{server.http}/v1/nowhere"), 404, "/v1/nowhere")
    check(httpx.delete(f"{server.http}/v1/generate"), 405, "DELETE")


def mutate_nothing(config: dict[str, Any], arrays: Arrays) -> None:
    """Leave the adapter sound."""


def wrong_shape(config: dict[str, Any], arrays: Arrays) -> None:
    name = next(name for name in arrays if "layers.1.self_attn.q_proj.lora_A" in name)
    arrays[name] = np.ascontiguousarray(arrays[name][:, :-1])


def missing_tensor(config: dict[str, Any], arrays: Arrays) -> None:
    del arrays[next(name for name in arrays if "layers.2.self_attn.v_proj.lora_B" in name)]


def not_a_number(config: dict[str, Any], arrays: Arrays) -> None:
    arrays[next(iter(arrays))].flat[3] = np.nan


def unsupported_field(config: dict[str, Any], arrays: Arrays) -> None:
    config["use_qalora"] = True


def unknown_field(config: dict[str, Any], arrays: Arrays) -> None:
    config["lora_magic"] = 3


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (wrong_shape, ["layers.1.self_attn.q_proj.lora_A", "[4, 63]", "[4, 64]"]),
        (missing_tensor, ["layers.2.self_attn.v_proj.lora_B", "missing"]),
        (not_a_number, ["NaN"]),
        (unsupported_field, ["use_qalora"]),
        (unknown_field, ["lora_magic"]),
    ],
)
def test_adapters(
    server: ServerProcess,
    client: Client,
    adapter_folders: dict[str, Path],
    mutate: Callable[[dict[str, Any], Arrays], None],
    words: list[str],
) -> None:
    config = json.loads((adapter_folders["lora-r4"] / "adapter_config.json").read_text())
    arrays = load_file(adapter_folders["lora-r4"] / "adapter_model.safetensors")
    mutate(config, arrays)
    before = client.adapters.list()
    check(upload(server, json.dumps(config).encode(), save(arrays)), 422, *words)
    assert client.adapters.list() == before


def test_all_faults_come_at_once(server: ServerProcess, adapter_folders: dict[str, Path]) -> None:
    config = json.loads((adapter_folders["lora-r4"] / "adapter_config.json").read_text())
    arrays = load_file(adapter_folders["lora-r4"] / "adapter_model.safetensors")
    for mutate in (wrong_shape, missing_tensor, unsupported_field, unknown_field):
        mutate(config, arrays)
    answer = upload(server, json.dumps(config).encode(), save(arrays))
    check(answer, 422, "lora_A", "lora_B", "use_qalora", "lora_magic")
    assert len(answer.json()["error"]["faults"]) >= 4


def test_files(server: ServerProcess, adapter_folders: dict[str, Path]) -> None:
    config = (adapter_folders["lora-r4"] / "adapter_config.json").read_bytes()
    weights = (adapter_folders["lora-r4"] / "adapter_model.safetensors").read_bytes()
    check(upload(server, config, pickle.dumps({"lora": [1.0]})), 422, "pickle")
    check(upload(server, config, weights[: len(weights) // 2]), 422, "cut off")
    check(upload(server, b'{"peft_type": ', weights), 422, "adapter_config.json")
    check(upload(server, b'{"peft_type": "IA3"}', weights), 422, "IA3")
    check(upload(server, config, b"\0" * (1 << 21)), 413, "the limit is")
    name = httpx.put(f"{server.http}/v1/adapters/Bad%20Name", files={"config": config, "weights": weights})
    check(name, 400, "Bad Name")
    check(
        httpx.post(f"{server.http}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc"}),
        403,
        "adapter_roots",
    )
