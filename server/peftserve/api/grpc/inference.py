"""`peftserve.v1.Inference`: proto -> native body -> `GenerationService` -> proto."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import Message
from pydantic import ValidationError
from typing_extensions import override

from peftserve.api import stall
from peftserve.api.generation import GenerationService
from peftserve.api.grpc.calls import Call, Calls
from peftserve.api.parse import invalid
from peftserve.api.request import Delta, GenerateRequest, Summary, TokenText
from peftserve.api.schemas import GenerateBody
from peftserve.api.stall import StallWatch
from peftserve.errors import RequestAbortedError
from peftserve.metrics import Metrics
from peftserve.types import FinishReason
from peftserve_proto.v1 import inference_pb2 as pb
from peftserve_proto.v1 import inference_pb2_grpc

_FINISH_REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Writes to the call itself instead of being a generator: then a cancelled call raises right here, and `aclosing`
    frees the request's pages at once, not when a generator happens to be collected."""

    def __init__(
        self, generation: GenerationService, calls: Calls, *, metrics: Metrics, stall_timeout_s: float
    ) -> None:
        self._generation = generation
        self._calls = calls
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s

    @override
    async def Generate(  # type: ignore[override]  # the stub's context is of both worlds, sync and aio
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> None:
        async with self._calls.begin(context, "Inference/Generate") as call:
            accepted = GenerateRequest.from_body(
                to_body(request), request_id=call.id, tenant=call.tenant, timeout_s=call.timeout_s
            )
            async with aclosing(self._generation.generate(accepted)) as deltas:
                writer = _Writer(context, self._stall_timeout_s)
                watcher = asyncio.create_task(self._abort_if_stalled(writer, deltas, call))
                try:
                    async for delta in deltas:
                        await writer.write(to_response(delta))
                finally:
                    watcher.cancel()

    async def _abort_if_stalled(self, writer: "_Writer", deltas: AsyncGenerator[Delta, None], call: Call) -> None:
        await writer.stalled()
        stall.tell(self._metrics, "grpc", call.id, self._stall_timeout_s)
        await deltas.aclose()


class _Writer:
    """Writes to one call, and knows when its client has read nothing for `timeout_s`.

    A write that waits for the client's window can be neither taken back nor overtaken by a status: a client that reads
    on gets what was written, and then the error.
    """

    def __init__(
        self, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse], timeout_s: float
    ) -> None:
        self._context = context
        self._writes = StallWatch(timeout_s)
        self._stalled = False

    async def write(self, response: pb.GenerateResponse) -> None:
        """Raises `RequestAbortedError` if this took so long that the request was given up."""
        self._writes.begin()
        await self._context.write(response)
        self._writes.end()
        if self._stalled:
            raise RequestAbortedError(f"the client read nothing of its stream for {self._writes.timeout_s:g} s")

    async def stalled(self) -> None:
        """Returns when a write has waited for `timeout_s`."""
        while not self._stalled:
            await asyncio.sleep(self._writes.look_s)
            self._stalled = self._writes.is_stalled


def to_body(request: pb.GenerateRequest) -> GenerateBody:
    """The native body that `request` stands for; raises `InvalidRequestError` that lists every fault.

    The names of fields, and so the messages, are those of the native HTTP body.
    """
    values: dict[str, Any] = {}
    match request.WhichOneof("input"):
        case "prompt":
            values["prompt"] = request.prompt
        case "messages":
            values["messages"] = [_fields(message) for message in request.messages.items]
        case "token_ids":
            values["token_ids"] = list(request.token_ids.ids)
    if request.HasField("adapter_id"):
        values["adapter_id"] = request.adapter_id
    if request.HasField("sampling"):
        values["sampling"] = _fields(request.sampling)
    try:
        return GenerateBody.model_validate(values)
    except ValidationError as error:
        raise invalid(error, GenerateBody) from None


def to_response(delta: Delta) -> pb.GenerateResponse:
    """`delta` as it goes over the wire."""
    response = pb.GenerateResponse(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=(
            pb.TokenLogprob(chosen=_token(position.chosen), top=map(_token, position.top))
            for position in delta.logprobs
        ),
        summary=None if delta.summary is None else _summary(delta.summary),
    )
    if delta.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[delta.finish_reason]
    if isinstance(delta.stop_reason, str):
        response.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        response.stop_token_id = delta.stop_reason
    return response


def _fields(message: Message) -> dict[str, Any]:
    """Fields that were sent, by name. In `message`, plain scalars are required ones and count as sent."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values[field.name] = dict(value)
        elif field.is_repeated:
            values[field.name] = list(value)
        elif not field.has_presence or message.HasField(field.name):
            values[field.name] = value
    return values


def _token(token: TokenText) -> pb.TokenText:
    return pb.TokenText(token_id=token.token_id, logprob=token.logprob, text=token.text, bytes=token.bytes)


def _summary(summary: Summary) -> pb.Summary:
    usage, timings, adapter = summary.usage, summary.timings, summary.adapter
    return pb.Summary(
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        ),
        timings=pb.Timings(
            queued_s=timings.queued_s,
            adapter_wait_s=timings.adapter_wait_s,
            first_token_s=timings.first_token_s,
            total_s=timings.total_s,
        ),
        adapter=None
        if adapter is None
        else pb.AdapterVersion(name=adapter.name, kind=adapter.kind, digest=adapter.digest),
    )
