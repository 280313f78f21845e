"""`peftserve.v1.Adapters`: the store and the engine's cache, through `AdapterService`."""

import re
from collections.abc import AsyncIterator

import anyio.to_thread
import grpc
from typing_extensions import override

from peftserve.adapters.upload import Upload
from peftserve.api.adapter_service import AdapterService, AdapterView
from peftserve.api.grpc.calls import Calls
from peftserve.api.schemas import ADAPTER_NAME
from peftserve.errors import InvalidRequestError
from peftserve_proto.v1 import adapters_pb2 as pb
from peftserve_proto.v1 import adapters_pb2_grpc

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

# The generated stubs' context and iterators are of both worlds, sync and aio; a server of this one overrides them.
# mypy: disable-error-code="override"


class AdaptersServicer(adapters_pb2_grpc.AdaptersServicer):
    """Every method sees the caller's tenant only."""

    def __init__(self, adapters: AdapterService, calls: Calls) -> None:
        self._adapters = adapters
        self._calls = calls

    @override
    async def Upload(
        self,
        request_iterator: AsyncIterator[pb.UploadAdapterRequest],
        context: grpc.aio.ServicerContext[pb.UploadAdapterRequest, pb.Adapter],
    ) -> pb.Adapter:
        async with self._calls.begin(context, "Adapters/Upload", request_iterator) as call:
            first = await anext(aiter(request_iterator), None)
            if first is None or first.WhichOneof("part") != "metadata":
                raise InvalidRequestError("metadata: must be the first message of an upload", field="metadata")
            name = first.metadata.adapter_id
            async with self._adapters.upload(call.tenant, name) as upload:
                await _receive(request_iterator, upload)
                return to_adapter(await self._adapters.commit(call.tenant, name, upload))

    @override
    async def Get(
        self, request: pb.GetAdapterRequest, context: grpc.aio.ServicerContext[pb.GetAdapterRequest, pb.Adapter]
    ) -> pb.Adapter:
        async with self._calls.begin(context, "Adapters/Get") as call:
            return to_adapter(await self._adapters.get(call.tenant, request.adapter_id))

    @override
    async def List(
        self,
        request: pb.ListAdaptersRequest,
        context: grpc.aio.ServicerContext[pb.ListAdaptersRequest, pb.ListAdaptersResponse],
    ) -> pb.ListAdaptersResponse:
        async with self._calls.begin(context, "Adapters/List") as call:
            size = _page_size(request.page_size)
            after = _page_start(request.page_token)
            views = [view for view in await self._adapters.list(call.tenant) if view.record.name > after]
            page = views[:size]
            more = page[-1].record.name if len(views) > size else ""
            return pb.ListAdaptersResponse(adapters=map(to_adapter, page), next_page_token=more)

    @override
    async def Update(
        self, request: pb.UpdateAdapterRequest, context: grpc.aio.ServicerContext[pb.UpdateAdapterRequest, pb.Adapter]
    ) -> pb.Adapter:
        async with self._calls.begin(context, "Adapters/Update") as call:
            if list(request.update_mask.paths) != ["pinned"]:
                found = ", ".join(request.update_mask.paths) or "nothing"
                raise InvalidRequestError(
                    f"update_mask: must name 'pinned', the only field that can change; found {found}",
                    field="update_mask",
                )
            return to_adapter(await self._adapters.set_pinned(call.tenant, request.adapter_id, request.pinned))

    @override
    async def Delete(
        self,
        request: pb.DeleteAdapterRequest,
        context: grpc.aio.ServicerContext[pb.DeleteAdapterRequest, pb.DeleteAdapterResponse],
    ) -> pb.DeleteAdapterResponse:
        async with self._calls.begin(context, "Adapters/Delete") as call:
            await self._adapters.delete(call.tenant, request.adapter_id)
            return pb.DeleteAdapterResponse()


async def _receive(parts: AsyncIterator[pb.UploadAdapterRequest], upload: Upload) -> None:
    """Write the stream's chunks; the store's caps end it as soon as they are passed."""
    weights_began = False
    async for message in parts:
        match message.WhichOneof("part"):
            case "config" if not weights_began:
                upload.write_config(message.config)
            case "weights":
                weights_began = True
                await anyio.to_thread.run_sync(upload.write_weights, message.weights)
            case part:
                raise InvalidRequestError(
                    f"upload: unexpected {part or 'empty'} message; send metadata, then config, then weights"
                )


def to_adapter(view: AdapterView) -> pb.Adapter:
    """`view` as it goes over the wire."""
    record, place = view.record, view.residency
    adapter = pb.Adapter(
        adapter_id=record.name,
        kind=record.kind,
        digest=record.digest,
        pinned=record.pinned,
        size_bytes=record.size_bytes,
        base_model_name=record.base_model_name or "",
    )
    adapter.created_at.FromMicroseconds(round(record.created_at * 1e6))
    adapter.details.update(record.details)
    if place is not None:
        adapter.residency.CopyFrom(
            pb.Residency(
                state=place.state,
                refs=place.refs,
                host_bytes=place.host_bytes,
                device_bytes=place.device_bytes,
                load_s=place.load_s,
                error=place.error,
            )
        )
    return adapter


def _page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidRequestError(f"page_size: must not be negative (got {asked})", field="page_size")
    return min(asked or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def _page_start(token: str) -> str:
    """Tokens are the last name of the page before: a page stays right when adapters come and go in between."""
    if token and re.fullmatch(ADAPTER_NAME, token) is None:
        raise InvalidRequestError("page_token: is not one that List gave", field="page_token")
    return token
