"""What the sync and the async gRPC client have in common."""

from peftserve_client.request import GenerateOptions
from peftserve_client.retry import RetryPolicy

DEFAULT_TARGET = "127.0.0.1:50051"


class GrpcSettings:
    """`target` is `host:port`. `timeout_s` is each call's deadline, which the server is told and keeps."""

    probe_timeout_s = 5.0

    def __init__(
        self, target: str = DEFAULT_TARGET, *, api_key: str | None, timeout_s: float, retry: RetryPolicy | None
    ) -> None:
        self.target = target.removeprefix("grpc://")
        self.timeout_s = timeout_s
        self.retry = retry or RetryPolicy()
        self.metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    def timeout(self, options: GenerateOptions) -> float:
        return options.get("timeout_s") or self.timeout_s
