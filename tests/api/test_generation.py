"""The generation service: checks before, deltas during, and every sequence ended or aborted after."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from peftserve.api.http.merge import collect
from peftserve.api.http.openai_schemas import ChatCompletionBody, CompletionBody
from peftserve.api.request import ChatPrompt, Delta, GenerateRequest, Prompt, TextPrompt, TokenPrompt
from peftserve.api.schemas import ChatMessage, GenerateBody, Sampling
from peftserve.engine.client import EngineState
from peftserve.engine.messages import EngineStats
from peftserve.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    PeftserveError,
    PromptTooLongError,
    UnavailableError,
)
from peftserve.text.tokenizer import Tokenizer
from peftserve.types import AdapterKind, AdapterRef, EngineRequest, FinishReason, TokenEvent
from tests.adapters import files
from tests.api.conftest import MakeWorld
from tests.api.harness import CONTEXT, MODEL, World, add_adapter, dies, endless, eventually, resident, says, silent


def request(prompt: str = "Hi", *, adapter_id: str | None = None, **sampling: Any) -> GenerateRequest:
    body = GenerateBody(prompt=prompt, adapter_id=adapter_id, sampling=Sampling(**sampling))
    return GenerateRequest.from_body(body, request_id="r", tenant="default")


async def run(world: World, asked: GenerateRequest) -> list[Delta]:
    async with aclosing(world.services.generation.generate(asked)) as deltas:
        return [delta async for delta in deltas]


async def failure(world: World, asked: GenerateRequest) -> PeftserveError:
    with pytest.raises(PeftserveError) as caught:
        await run(world, asked)
    return caught.value


async def test_deltas_and_summary(world: World, tokenizer: Tokenizer) -> None:
    deltas = await run(world, request("Hi there"))
    assert "".join(delta.text for delta in deltas) == "hello world"
    assert [delta.summary is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    last = deltas[-1]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, None)
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(tokenizer.encode("Hi there"))
    assert last.usage.completion_tokens == len(tokenizer.encode("hello world"))
    assert last.usage.cached_tokens == 3
    assert last.summary is not None
    assert (last.summary.timings.queued_s, last.summary.timings.adapter_wait_s) == (0.25, 0.5)
    assert 0 < last.summary.timings.first_token_s <= last.summary.timings.total_s
    assert world.engine.aborted == []


async def test_choices_have_ids_seeds_and_indices_of_their_own(world: World) -> None:
    asked = GenerateRequest(
        id="r", tenant="default", prompts=(TextPrompt("a"), TokenPrompt((70, 71))), sampling=Sampling(n=2, seed=5)
    )
    deltas = await run(world, asked)
    texts = {i: "".join(delta.text for delta in deltas if delta.index == i) for i in range(4)}
    assert texts == dict.fromkeys(range(4), "hello world")
    started = world.engine.requests
    assert len({started_request.id for started_request in started}) == 4
    assert [started_request.sampling.seed for started_request in started] == [5, 6, 5, 6]
    assert started[2].prompt_token_ids == [70, 71]
    usage = deltas[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.cached_tokens) == (1 + 2, 3 + 3)


async def test_a_chat_prompt_goes_through_the_template(world: World, tokenizer: Tokenizer) -> None:
    messages = [ChatMessage(role="user", content="Hi")]
    await run(world, GenerateRequest.from_body(GenerateBody(messages=messages), request_id="r", tenant="default"))
    prompt = world.engine.requests[0].prompt_token_ids
    assert prompt == tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("per_event", [1, 100])
async def test_a_stop_string_ends_and_aborts(make: MakeWorld, tokenizer: Tokenizer, per_event: int) -> None:
    """Also when the engine sends several tokens at once: those past the stop are neither shown nor counted."""
    world = make(says(tokenizer, "one, two, three", per_event=per_event))
    choices, summary = await collect(world.services.generation.generate(request(stop=[", t"])))
    assert choices[0].text == "one"
    assert (choices[0].finish_reason, choices[0].stop_reason) == (FinishReason.STOP, ", t")
    assert tokenizer.decode(choices[0].token_ids).startswith("one, t")
    assert summary.usage.completion_tokens == len(choices[0].token_ids) < len(tokenizer.encode("one, two, three"))
    assert len(world.engine.aborted) == 1
    assert world.services.generation.num_sequences == 0


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
async def test_a_slow_reader_loses_nothing_and_holds_little(
    make: MakeWorld, tokenizer: Tokenizer, pause_s: float
) -> None:
    """What came while it was away is one delta a sequence; the engine is done with the request long before."""
    text = "the quick brown fox " * 8
    world = make(says(tokenizer, text))
    assert world.engine.info is not None
    world.engine.info = msgspec.structs.replace(world.engine.info, max_model_len=1 << 10)
    token_ids = tokenizer.encode(text)
    asked = request(n=2, logprobs=1, max_tokens=len(token_ids))
    deltas: list[Delta] = []
    async with aclosing(world.services.generation.generate(asked)) as stream:
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) == 1:
                await asyncio.sleep(pause_s)
                if pause_s:
                    assert world.services.generation.num_sequences == 0
    for index in range(2):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == text
        assert [token for delta in own for token in delta.token_ids] == token_ids
        assert [entry.chosen.token_id for delta in own for entry in delta.logprobs] == token_ids
        assert [delta.finish_reason for delta in own][-1] is FinishReason.STOP
        assert [delta.finish_reason for delta in own][:-1] == [None] * (len(own) - 1)
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == 2 * len(token_ids)
    if pause_s:
        assert len(deltas) <= 2 + 2
    assert world.engine.aborted == []


async def test_a_deadline_frees_the_engine_though_nobody_reads(make: MakeWorld) -> None:
    world = make(endless, request_timeout_s=0.05)
    stream = world.services.generation.generate(request(n=2))
    await anext(stream)
    await eventually(lambda: len(world.engine.aborted) == 2)
    with pytest.raises(DeadlineExceededError):
        async for _ in stream:
            pass


async def test_logprobs_have_text_and_bytes(world: World) -> None:
    choices, _ = await collect(world.services.generation.generate(request(logprobs=2)))
    entries = choices[0].logprobs
    assert "".join(entry.chosen.text for entry in entries) == "hello world"
    assert [len(entry.top) for entry in entries] == [2] * len(entries)
    assert entries[0].chosen.bytes.decode() == entries[0].chosen.text


async def test_stop_token_ids_are_the_stop_reason(make: MakeWorld, tokenizer: Tokenizer) -> None:
    world = make(says(tokenizer, "x"))
    assert (await run(world, request(stop_token_ids=[2])))[-1].stop_reason == 2
    assert (await run(world, request()))[-1].stop_reason is None


async def test_an_adapter_is_resolved_to_its_version(world: World) -> None:
    digest = add_adapter(world, "mine")
    deltas = await run(world, request(adapter_id="mine"))
    assert deltas[-1].summary is not None
    assert deltas[-1].summary.adapter is not None
    assert deltas[-1].summary.adapter.digest == digest
    add_adapter(world, "mine", files.lora(seed=1))
    await run(world, request(adapter_id=f"mine@sha256:{digest}"))
    assert [r.adapter and r.adapter.digest for r in world.engine.requests] == [digest, digest]


async def test_an_unknown_adapter_never_becomes_the_base(world: World) -> None:
    add_adapter(world, "french-poet")
    error = await failure(world, request(adapter_id="french-poets"))
    assert isinstance(error, AdapterNotFoundError)
    assert "french-poet" in error.message
    assert "tiny-base" in error.message
    assert error.field == "adapter_id"
    assert world.engine.requests == []


async def test_tenants_do_not_see_each_others_adapters(world: World) -> None:
    add_adapter(world, "mine", tenant="other")
    error = await failure(world, request(adapter_id="mine"))
    assert isinstance(error, AdapterNotFoundError)
    assert "similar" not in error.message


async def test_default_max_tokens(world: World) -> None:
    for prompt, default in ((2, 256), (2, 8), (2, None)):
        asked = GenerateRequest(
            id="r",
            tenant="default",
            prompts=(TokenPrompt((70,) * prompt),),
            sampling=Sampling(),
            default_max_tokens=default,
        )
        await run(world, asked)
    assert [r.sampling.max_tokens for r in world.engine.requests] == [CONTEXT - 2, 8, CONTEXT - 2]


async def test_min_tokens_raises_a_default_max_tokens(world: World) -> None:
    asked = GenerateRequest(
        id="r", tenant="default", prompts=(TokenPrompt((70,)),), sampling=Sampling(min_tokens=20), default_max_tokens=8
    )
    await run(world, asked)
    assert world.engine.requests[0].sampling.max_tokens == 20


async def test_too_long_says_all_numbers(world: World) -> None:
    add_adapter(world, "prefixed", files.prefix(10))
    error = await failure(world, request("x" * 50, adapter_id="prefixed", max_tokens=5))
    assert isinstance(error, PromptTooLongError)
    assert "50 prompt tokens + 10 virtual tokens of the adapter + max_tokens 5 = 65" in error.message
    assert f"context of {CONTEXT}" in error.message
    assert await run(world, request("x" * 50, adapter_id="prefixed", max_tokens=4))
    full = await failure(world, request("x" * CONTEXT))
    assert isinstance(full, PromptTooLongError)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"n": 5}, ["sampling.n: 5, and this server's limit is 4"]),
        ({"logprobs": 7}, ["sampling.logprobs: 7, and this server's limit is 6"]),
        ({"stop": ["a", "b", "c"]}, ["sampling.stop: 3 strings, and this server's limit is 2"]),
        (
            {"stop_token_ids": [320], "logit_bias": {319: 1.0, 400: 1.0}},
            [
                "sampling.stop_token_ids: 320 is outside the vocabulary of 320 tokens",
                "sampling.logit_bias: 400 is outside the vocabulary of 320 tokens",
            ],
        ),
    ],
)
async def test_limits_of_this_server(make: MakeWorld, sampling: dict[str, Any], words: list[str]) -> None:
    world = make(max_n=4, max_logprobs=6, max_stop_strings=2)
    error = await failure(world, request(**sampling))
    assert isinstance(error, InvalidRequestError)
    assert error.faults == words


@pytest.mark.parametrize("door", ["native", "completions", "chat", "chat by its newer name"])
async def test_min_tokens_over_max_tokens_is_refused_by_every_route(world: World, door: str) -> None:
    numbers = {"min_tokens": 5, "max_tokens": 4}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    asked: GenerateRequest
    prefix, name = "", "max_tokens"
    if door == "native":
        asked, prefix = request(**numbers), "sampling."
    elif door == "completions":
        body = CompletionBody.model_validate({"model": MODEL, "prompt": "x", **numbers})
        asked = body.to_request(id_="r", tenant="default", base=MODEL)
    else:
        name = "max_tokens" if door == "chat" else "max_completion_tokens"
        chat_body = ChatCompletionBody.model_validate({**chat, "min_tokens": 5, name: 4})
        asked = chat_body.to_request(id_="r", tenant="default", base=MODEL)
    error = await failure(world, asked)
    assert isinstance(error, InvalidRequestError)
    assert error.faults == [f"{prefix}min_tokens: 5 is more than {prefix}{name}, 4"]
    assert error.field == f"{prefix}min_tokens"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (TextPrompt("x" * 5000), "5000 characters are at least"),
        (ChatPrompt((ChatMessage(role="user", content="x" * 5000),)), "characters are at least"),
        (TokenPrompt((70,) * CONTEXT), f"{CONTEXT} token ids are at least {CONTEXT} tokens"),
    ],
)
async def test_what_no_context_could_hold_is_not_encoded(
    world: World, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, prompt: Prompt, words: str
) -> None:
    def encode(*_args: Any, **_options: Any) -> list[int]:
        pytest.fail("was encoded")

    monkeypatch.setattr(tokenizer, "encode", encode)
    error = await failure(
        world, GenerateRequest(id="r", tenant="default", prompts=(prompt,), sampling=Sampling(), prompt_field="here")
    )
    assert isinstance(error, PromptTooLongError)
    assert error.message.startswith("here: ")
    assert words in error.message
    assert f"the context is {CONTEXT} tokens" in error.message


async def test_many_or_long_prompts_are_encoded_off_the_loop(
    make: MakeWorld, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def one_token(request: EngineRequest) -> AsyncIterator[TokenEvent]:
        yield TokenEvent(request_id=request.id, token_ids=[70], finish_reason=FinishReason.LENGTH)

    world = make(one_token)
    assert world.engine.info is not None
    world.engine.info = msgspec.structs.replace(world.engine.info, max_model_len=1 << 20)
    threads: set[threading.Thread] = set()
    encode = tokenizer.encode

    def seen(text: str, *, add_special_tokens: bool = True) -> list[int]:
        threads.add(threading.current_thread())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", seen)
    for prompts in ((TextPrompt("x" * 5000),), (TextPrompt("x" * 500),) * 10, (TextPrompt("x" * 100_000),)):
        asked = GenerateRequest(id="r", tenant="default", prompts=prompts, sampling=Sampling(max_tokens=1))
        await run(world, asked)
        assert threading.current_thread() not in threads
    await run(world, request("x"))
    assert threading.current_thread() in threads


@pytest.mark.parametrize(("token_ids", "word"), [([320], "token 320 at position 0"), ([5, 999], "position 1")])
async def test_tokens_outside_the_vocabulary(world: World, token_ids: list[int], word: str) -> None:
    body = GenerateBody(token_ids=token_ids)
    error = await failure(world, GenerateRequest.from_body(body, request_id="r", tenant="default"))
    assert word in error.message


async def test_an_empty_prompt(world: World) -> None:
    assert "at least one token" in (await failure(world, request(""))).message


async def test_a_full_queue(make: MakeWorld) -> None:
    world = make(silent, max_waiting=3)
    world.engine.stats = EngineStats(num_running=1)
    tasks = [asyncio.create_task(run(world, request(n=2))) for _ in range(2)]
    await eventually(lambda: len(world.engine.requests) == 4)
    error = await failure(world, request())
    assert isinstance(error, OverloadedError)
    assert "3 requests are waiting and the limit is 3" in error.message
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(world.engine.aborted) == 4
    assert world.services.generation.num_sequences == 0


async def test_more_sequences_than_the_queue_holds(make: MakeWorld) -> None:
    error = await failure(make(max_waiting=3), request(n=4))
    assert isinstance(error, InvalidRequestError)


@pytest.mark.parametrize("script", [endless, silent])
async def test_deadline(make: MakeWorld, script: Any) -> None:
    world = make(script, request_timeout_s=0.05)
    error = await failure(world, request(n=2))
    assert isinstance(error, DeadlineExceededError)
    assert "0.05 s" in error.message
    assert len(world.engine.aborted) == 2


async def test_a_clients_own_deadline_is_the_shorter(make: MakeWorld) -> None:
    asked = GenerateRequest.from_body(GenerateBody(prompt="x"), request_id="r", tenant="default", timeout_s=0.05)
    assert isinstance(await failure(make(silent), asked), DeadlineExceededError)


async def test_closing_aborts_all_choices(make: MakeWorld) -> None:
    world = make(endless)
    deltas = world.services.generation.generate(request(n=3))
    await anext(deltas)
    await deltas.aclose()
    assert len(world.engine.aborted) == len(world.engine.requests)
    assert world.services.generation.num_sequences == 0


async def test_an_engine_error_ends_the_request_and_its_other_choices(make: MakeWorld) -> None:
    world = make(dies)
    error = await failure(world, request(n=2))
    assert isinstance(error, EngineDeadError)
    assert error.retry_after_s == 2.0
    assert world.services.generation.num_sequences == 0


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
async def test_not_ready(world: World, state: EngineState) -> None:
    world.engine.state = state
    error = await failure(world, request())
    assert isinstance(error, UnavailableError)
    assert error.retry_after_s is not None
    assert not world.services.generation.ready


async def test_draining_lets_the_running_end(make: MakeWorld, tokenizer: Tokenizer) -> None:
    world = make(says(tokenizer, "hello"))
    deltas = world.services.generation.generate(request())
    first = await anext(deltas)
    drain = asyncio.create_task(world.services.generation.drain(5.0))
    await asyncio.sleep(0)
    assert isinstance(await failure(world, request()), UnavailableError)
    rest = [delta async for delta in deltas]
    assert first.text + "".join(delta.text for delta in rest) == "hello"
    assert await drain


async def test_draining_fails_what_does_not_end(make: MakeWorld) -> None:
    world = make(endless)
    running = asyncio.create_task(failure(world, request()))
    await asyncio.sleep(0.02)
    assert not await world.services.generation.drain(0.02)
    assert isinstance(await running, UnavailableError)
    assert len(world.engine.aborted) == 1


def adapter_labels(world: World) -> set[str]:
    """Every value that the label `adapter` has in `/metrics`."""
    families = text_string_to_metric_families(world.services.metrics.render().decode())
    return {sample.labels["adapter"] for family in families for sample in family.samples if "adapter" in sample.labels}


async def test_ten_thousand_adapters_make_no_series_and_their_requests_few(make: MakeWorld) -> None:
    world = make(max_adapter_labels=5)
    refs = [
        AdapterRef(digest=f"{i:064x}", kind=AdapterKind.LORA, name=f"a{i}", tenant="default") for i in range(10_000)
    ]
    world.engine.residency.update((ref.digest, resident(ref)) for ref in refs)
    assert adapter_labels(world) == set()
    for ref in refs:
        observed = world.services.metrics.request(ref)
        observed.tokens(0.1, count=1, first=True)
        observed.finished(reason="stop", prompt_tokens=1, seconds=0.1)
    assert adapter_labels(world) == {"a0", "a1", "a2", "a3", "a4", "other"}


async def test_a_request_that_outlives_its_adapter_brings_no_series_back(make: MakeWorld) -> None:
    world = make(endless)
    for round_ in range(3):
        add_adapter(world, f"short-lived-{round_}")
        stream = world.services.generation.generate(request(adapter_id=f"short-lived-{round_}"))
        await anext(stream)
        await world.services.adapters.delete("default", f"short-lived-{round_}")
        await anext(stream)
        await stream.aclose()
    assert adapter_labels(world) == {"other"}


async def test_metrics_count_by_kind_and_adapter(make: MakeWorld) -> None:
    world = make(max_adapter_labels=1)
    for name in ("first", "second", "third"):
        add_adapter(world, name, files.prefix(2) if name == "second" else files.lora())
        await run(world, request(adapter_id=name))
    await run(world, request())
    value = world.services.metrics.registry.get_sample_value
    name = "peftserve_requests_finished_total"
    for kind, adapter in (("lora", "first"), ("prefix", "other"), ("lora", "other"), ("base", "")):
        assert value(name, {"kind": kind, "adapter": adapter, "finished_reason": "stop"}) == 1
    assert value("vllm:request_success_total", {"model_name": "tiny-base", "finished_reason": "stop"}) == 4
    assert value("vllm:time_to_first_token_seconds_count", {"model_name": "tiny-base"}) == 4
    assert value("vllm:e2e_request_latency_seconds_count", {"model_name": "tiny-base"}) == 4
    await world.services.adapters.delete("default", "first")
    assert value(name, {"kind": "lora", "adapter": "first", "finished_reason": "stop"}) is None


async def test_prompt_tokens_count_once_the_engine_has_begun_with_them(make: MakeWorld) -> None:
    async def processed(script: Any) -> float:
        world = make(script=script)
        task = asyncio.create_task(run(world, request(max_tokens=2)))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])
        return world.services.metrics.registry.get_sample_value("vllm:prompt_tokens_total", {"model_name": MODEL}) or 0

    assert await processed(silent) == 0
    assert await processed(endless) > 0


@pytest.mark.parametrize(
    ("seed", "seeds"), [(-1, [-1, 0]), (-(2**63), [-(2**63), 1 - 2**63]), (2**63 - 1, [2**63 - 1, -(2**63)])]
)
async def test_seeds_are_any_int64(world: World, seed: int, seeds: list[int]) -> None:
    sampling = Sampling(n=2, seed=seed)
    await run(world, GenerateRequest(id="r", tenant="default", prompts=(TextPrompt("a"),), sampling=sampling))
    assert [request.sampling.seed for request in world.engine.requests] == seeds
