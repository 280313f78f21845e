"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters of any kind from the operator's folders."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from peftserve.adapters.upload import Upload
from peftserve.api.http.body import read_json
from peftserve.api.http.endpoint import Endpoint, services_of, tenant_of
from peftserve.api.schemas import LoadAdapterBody, UnloadAdapterBody
from peftserve.errors import AdapterNotFoundError, ConflictError, InvalidRequestError, PermissionDeniedError

_CONFIG = "adapter_config.json"
# PEFT's name, then AdapterHub's.
_WEIGHTS = ("adapter_model.safetensors", "pytorch_adapter.safetensors", "adapter.safetensors")
_CHUNK = 1 << 20


async def load_lora_adapter(request: Request) -> Response:
    """Store the adapter in a folder of the server, which must lie under one of `adapter_roots`."""
    body = await read_json(request, LoadAdapterBody)
    services, tenant = services_of(request), tenant_of(request)
    roots = services.config.server.adapter_roots
    if not body.load_inplace:
        try:
            await services.adapters.get(tenant, body.lora_name)
        except AdapterNotFoundError:
            pass
        else:
            raise ConflictError(
                f"lora_name: {body.lora_name!r} is loaded already; send load_inplace: true to replace it",
                field="lora_name",
            )
    async with services.adapters.upload(tenant, body.lora_name) as upload:
        await anyio.to_thread.run_sync(copy_adapter, body.lora_path, roots, upload)
        await services.adapters.commit(tenant, body.lora_name, upload)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """Delete the adapter."""
    body = await read_json(request, UnloadAdapterBody)
    await services_of(request).adapters.delete(tenant_of(request), body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def copy_adapter(path: str, roots: Sequence[Path], upload: Upload) -> None:
    """The two files in the folder `path` into `upload`. Blocks.

    Links are followed first and the result is what must lie under a root; the file is then opened without following
    any. Raises `PermissionDeniedError` for everything outside, whether it exists or not, `InvalidRequestError` for a
    folder inside that holds no adapter.
    """
    if not roots:
        raise PermissionDeniedError(
            "lora_path: this server reads no files of its own; upload the adapter with PUT /v1/adapters/{id}, "
            "or have the operator set adapter_roots",
            field="lora_path",
        )
    folder = _inside(Path(path), roots)
    with _open(folder / _CONFIG, roots) as config:
        for chunk in _chunks(config):
            upload.write_config(chunk)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), folder / _WEIGHTS[0])
    with _open(weights, roots) as file:
        for chunk in _chunks(file):
            upload.write_weights(chunk)


def _inside(path: Path, roots: Sequence[Path]) -> Path:
    """`path` without links, if it lies under a root; a relative one is looked for under each root."""
    for root in roots:
        real_root = root.expanduser().resolve()
        try:
            real = (real_root / path).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, a null byte
            continue
        if real.is_relative_to(real_root) and (path.is_absolute() or real.exists()):
            return real
    raise PermissionDeniedError("lora_path: is not in a folder that this server may read from", field="lora_path")


def _open(path: Path, roots: Sequence[Path]) -> BinaryIO:
    real = _inside(path, roots)
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidRequestError(f"lora_path: no readable {path.name} there", field="lora_path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidRequestError(f"lora_path: {path.name} is not a regular file", field="lora_path")
    return os.fdopen(descriptor, "rb")


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/load_lora_adapter",
        load_lora_adapter,
        "Load an adapter from a folder of the server (vLLM's route)",
        "adapters",
        body=LoadAdapterBody,
        answers={200: "text/plain"},
    ),
    Endpoint(
        "POST",
        "/v1/unload_lora_adapter",
        unload_lora_adapter,
        "Delete an adapter (vLLM's route)",
        "adapters",
        body=UnloadAdapterBody,
        answers={200: "text/plain"},
    ),
)
