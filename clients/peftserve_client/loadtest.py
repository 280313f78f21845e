"""A closed-loop load test: a fixed number of streams, each asking again as soon as it has its answer.

Measured at the client: TTFT (first token), ITL (between tokens of one answer) and E2E (whole answer). Prompts are
random, so that no prefix cache can answer; end-of-sequence is ignored, so that every answer has its full length.
"""

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
from typing_extensions import Unpack

from peftserve_client.errors import ApiError, ClientError
from peftserve_client.request import GenerateOptions, Prompt
from peftserve_client.types import Chunk

BASE = "base"

_TEXT = (
    "the of and to in is was for on are as with they be at one have this from by hot word but what some it you or had "
    "out time could give each name men other about many then them write would like so these her long make thing see "
    "him two has look more day go come did number sound no most people my over know water than call first who may down "
    "side been now find any new work part take get place made live where after back little only round man year came "
    "show every good me our under very through just form sentence great think say help low line differ turn cause much "
    "mean before move right boy old too same tell does set three want air well also play small end put home read hand"
)
_WORDS = _TEXT.split()


class Share(msgspec.Struct, frozen=True):
    """One part of the mix; `adapter_id` None is the bare base model."""

    adapter_id: str | None
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.adapter_id or BASE


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`requests` in all, `concurrency` at a time, spread over `mix` by weight; lengths in words and tokens."""

    requests: int
    concurrency: int
    mix: tuple[Share, ...] = (Share(None),)
    prompt_words: int = 60
    max_tokens: int = 64
    seed: int = 0


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    p90: float
    p99: float
    mean: float


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one adapter, or of all; percentiles are None where no request succeeded."""

    name: str
    requests: int
    errors: int
    output_tokens: int
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result. `errors` counts by the server's code, or by the client's class where no server answered."""

    plan: Plan
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    errors: dict[str, int]
    overall: Group
    by_adapter: list[Group]


class Streaming(Protocol):
    """What the test needs of `AsyncClient` and `AsyncGrpcClient`; make them without retries, or errors do not show."""

    def stream(self, prompt: Prompt, /, **options: Unpack[GenerateOptions]) -> AsyncGenerator[Chunk, None]: ...


class Sample(msgspec.Struct):
    """One request as the client saw it, in seconds."""

    share: Share
    ttft_s: float | None = None
    e2e_s: float | None = None
    gaps_s: list[float] = []
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def parse_mix(text: str) -> tuple[Share, ...]:
    """`a,b=2,base` -> shares of weight 1, 2 and 1; `base` is the bare model. Raises `ValueError`."""
    shares = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition("=")
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            raise ValueError(f"{part!r}: the weight must be a number") from None
        if not 0 < value < float("inf"):
            raise ValueError(f"{part!r}: the weight must be above 0")
        shares.append(Share(None if name == BASE else name, value))
    if not shares:
        raise ValueError("the mix names no adapter; write base for the bare model")
    return tuple(shares)


async def run(client: Streaming, plan: Plan, progress: Callable[[int], None] | None = None) -> Report:
    """Run `plan`; `progress` is told how many requests have ended. Errors of requests are counted, not raised."""
    rng = random.Random(plan.seed)
    todo = iter([(_prompt(rng, plan.prompt_words), share) for share in _shares(plan, rng)])
    samples: list[Sample] = []

    async def worker() -> None:
        for prompt, share in todo:
            samples.append(await _one(client, prompt, share, plan.max_tokens))
            if progress is not None:
                progress(len(samples))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(plan.concurrency, plan.requests)):
            group.create_task(worker())
    return _report(plan, samples, time.perf_counter() - began)


async def _one(client: Streaming, prompt: str, share: Share, max_tokens: int) -> Sample:
    sample = Sample(share)
    began = last = time.perf_counter()
    try:
        stream = client.stream(prompt, adapter_id=share.adapter_id, max_tokens=max_tokens, ignore_eos=True)
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                now = time.perf_counter()
                count = len(chunk.token_ids)
                if count and sample.ttft_s is None:
                    sample.ttft_s = now - began
                elif count:
                    sample.gaps_s += [(now - last) / count] * count
                if count:
                    last = now
                sample.output_tokens += count
                if chunk.usage is not None:
                    sample.prompt_tokens = chunk.usage.prompt_tokens
        sample.e2e_s = time.perf_counter() - began
    except ApiError as error:
        sample.error = error.code or type(error).__name__
    except ClientError as error:
        sample.error = type(error).__name__
    return sample


def _shares(plan: Plan, rng: random.Random) -> list[Share]:
    """Each share as often as its weight says, whatever the number of requests, in random order."""
    total = sum(share.weight for share in plan.mix)
    exact = [share.weight / total * plan.requests for share in plan.mix]
    counts = [math.floor(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: plan.requests - sum(counts)]:
        counts[i] += 1
    order = [share for share, count in zip(plan.mix, counts, strict=True) for _ in range(count)]
    rng.shuffle(order)
    return order


def _prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=words))


def _report(plan: Plan, samples: Sequence[Sample], duration_s: float) -> Report:
    names = dict.fromkeys(share.name for share in plan.mix)
    groups = [_group(name, [sample for sample in samples if sample.share.name == name]) for name in names]
    overall = _group("all", samples)
    return Report(
        plan=plan,
        duration_s=duration_s,
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        output_tokens=overall.output_tokens,
        output_tokens_per_s=overall.output_tokens / duration_s,
        requests_per_s=(overall.requests - overall.errors) / duration_s,
        errors=dict(Counter(sample.error for sample in samples if sample.error)),
        overall=overall,
        by_adapter=groups,
    )


def _group(name: str, samples: Sequence[Sample]) -> Group:
    return Group(
        name=name,
        requests=len(samples),
        errors=sum(sample.error is not None for sample in samples),
        output_tokens=sum(sample.output_tokens for sample in samples),
        ttft_ms=_percentiles(sample.ttft_s for sample in samples if sample.ttft_s is not None),
        itl_ms=_percentiles(gap for sample in samples for gap in sample.gaps_s),
        e2e_ms=_percentiles(sample.e2e_s for sample in samples if sample.e2e_s is not None),
    )


def _percentiles(seconds: Iterable[float]) -> Percentiles | None:
    values = [value * 1000 for value in seconds]
    if not values:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return Percentiles(p50=cuts[49], p90=cuts[89], p99=cuts[98], mean=statistics.fmean(values))
