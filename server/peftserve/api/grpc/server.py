"""The gRPC listener: both services, health and reflection on one asyncio server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha._async import ReflectionServicer
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server
from typing_extensions import override

from peftserve.api.grpc.adapters import AdaptersServicer
from peftserve.api.grpc.calls import Calls
from peftserve.api.grpc.inference import InferenceServicer
from peftserve.api.services import Services
from peftserve.errors import ConfigurationError
from peftserve_proto.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name

# An upload's chunk may be this large even where `max_body_bytes` is lower.
_MIN_MESSAGE_BYTES = 4 * 2**20
_HEALTH_PERIOD_S = 0.2


class GrpcServer:
    """The listener and its health. `port` is the one bound, also when 0 was asked for."""

    def __init__(
        self,
        server: grpc.aio.Server,
        health_servicer: HealthServicer,
        port: int,
        is_ready: Callable[[], bool],
    ) -> None:
        self._server = server
        self._health = health_servicer
        self._is_ready = is_ready
        self._watcher: asyncio.Task[None] | None = None
        self.port = port

    async def start(self) -> None:
        """Begin to serve. From here on, health of both services follows `GenerationService.ready`."""
        await self._publish(self._is_ready())
        await self._server.start()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self, grace_s: float) -> None:
        """Accept no new calls; those that run after `grace_s` seconds are cancelled. Returns when all have ended."""
        if self._watcher is not None:
            self._watcher.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _watch(self) -> None:
        known = self._is_ready()
        while True:
            await asyncio.sleep(_HEALTH_PERIOD_S)
            if (ready := self._is_ready()) != known:
                known = ready
                await self._publish(ready)

    async def _publish(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in (INFERENCE, ADAPTERS):
            await self._health.set(service, status)


def build_server(services: Services) -> GrpcServer:
    """A server bound to `grpc_port` (0: any free one), to be started in the running loop.

    Health: "" is the process, SERVING until it stops; the two services are SERVING while requests are accepted.
    Raises `ConfigurationError` when the address cannot be bound.
    """
    config = services.config
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max(config.limits.max_body_bytes, _MIN_MESSAGE_BYTES)),
            ("grpc.max_send_message_length", -1),
            # Linux would let two servers share the port and split the calls between them.
            ("grpc.so_reuseport", 0),
            # A client that vanished without closing is noticed, and its requests are freed.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]
    )
    calls = Calls(services.auth, services.metrics)
    inference = InferenceServicer(
        services.generation,
        calls,
        metrics=services.metrics,
        stall_timeout_s=config.limits.stream_stall_timeout_s,
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    adapters_pb2_grpc.add_AdaptersServicer_to_server(AdaptersServicer(services.adapters, calls), server)
    health_servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (INFERENCE, ADAPTERS, health.SERVICE_NAME, reflection.SERVICE_NAME)
    add_ServerReflectionServicer_to_server(_AuthenticatedReflection(names, calls), server)
    host, port = config.server.host, config.server.grpc_port
    try:
        bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        raise ConfigurationError(
            f"grpc_port: cannot listen on {host}:{port}; is it in use?", field="grpc_port"
        ) from None
    return GrpcServer(server, health_servicer, bound, lambda: services.generation.ready)


class _AuthenticatedReflection(ReflectionServicer):  # type: ignore[misc]  # the base has no type hints
    """Reflection behind the same API keys as everything but health."""

    def __init__(self, names: tuple[str, ...], calls: Calls) -> None:
        super().__init__(names)
        self._calls = calls

    @override
    async def ServerReflectionInfo(
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        async with self._calls.begin(context, "Reflection/ServerReflectionInfo"):
            async for response in super().ServerReflectionInfo(request_iterator, context):
                yield response
