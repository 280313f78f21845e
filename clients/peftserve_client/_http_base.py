"""What the sync and the async HTTP client have in common: settings and requests."""

from collections.abc import Mapping
from typing import Any

import httpx

from peftserve_client.adapter_files import AdapterFiles, ProgressReader
from peftserve_client.http_protocol import Operation, Reply
from peftserve_client.retry import RetryPolicy

DEFAULT_URL = "http://127.0.0.1:8000"


class HttpSettings:
    """`timeout_s` bounds each wait for the server's next bytes; `connect_timeout_s` the connection's set-up."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 5.0,
        retry: RetryPolicy | None = None,
        max_connections: int = 1024,
    ) -> None:
        self.url = url.rstrip("/")
        self.retry = retry or RetryPolicy()
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        headers = {"user-agent": "peftserve-client"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self.transport: dict[str, Any] = {
            "base_url": self.url,
            "headers": headers,
            "limits": httpx.Limits(max_connections=max_connections, max_keepalive_connections=32),
        }

    def request(self, operation: Operation[Any]) -> dict[str, Any]:
        """Keyword arguments for `httpx.Client.build_request`."""
        request: dict[str, Any] = {
            "method": operation.method,
            "url": operation.path,
            "timeout": self._timeout(operation.timeout_s),
        }
        if operation.json is not None:
            request["json"] = operation.json
        return request

    def upload(self, path: str, files: AdapterFiles, weights: ProgressReader) -> dict[str, Any]:
        """The same for a multipart upload; the weights are read while they are sent."""
        parts = {
            "config": ("adapter_config.json", files.config, "application/json"),
            "weights": ("adapter_model.safetensors", weights, "application/octet-stream"),
        }
        return {"method": "PUT", "url": path, "files": parts, "timeout": self._timeout(None)}

    def _timeout(self, timeout_s: float | None) -> httpx.Timeout:
        return httpx.Timeout(timeout_s or self._timeout_s, connect=self._connect_timeout_s)


def reply_of(response: httpx.Response) -> Reply:
    """A whole answer; its body must have been read."""
    headers: Mapping[str, str] = {key.lower(): value for key, value in response.headers.items()}
    return Reply(response.status_code, headers, response.content)
