"""Random arrivals, aborts, adapters and memory sizes: every request ends once, with the tokens it has alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from peftserve.engine.messages import AbortRequest, UnloadAdapter
from peftserve.types import AdapterKind, FinishReason

from .harness import Harness
from .simulator import SimulatedMemory, adapter, expected_tokens, request

REFS = [
    *(adapter(f"lora-{i}", AdapterKind.LORA) for i in range(4)),
    *(adapter(f"neck-{i}", AdapterKind.BOTTLENECK) for i in range(2)),
    *(adapter(f"prefix-{i}", AdapterKind.PREFIX) for i in (1, 3, 4, 9)),
]
# Prompts that share beginnings and whole pages, and often the adapter: something for the prefix cache to confuse.
prompts = st.one_of(
    st.sampled_from([[0] * 4, [0] * 3 + [1], [0] * 8, [0] * 7 + [1], [0] * 3 + [1] * 5]),
    st.builds(lambda n, tail: [0] * n + tail, st.integers(1, 17), st.lists(st.integers(0, 1), max_size=3)),
)
arrivals = st.tuples(
    st.one_of(st.sampled_from([None, REFS[0], REFS[-1]]), st.sampled_from(REFS)),
    prompts,
    st.integers(1, 12),  # max_tokens
    st.sampled_from(["default", "default", "rival"]),
)
actions = st.one_of(
    arrivals.map(lambda value: ("add", value)),
    st.integers(0, 30).map(lambda value: ("abort", value)),
    st.sampled_from(REFS).map(lambda ref: ("unload", ref)),
    st.just(("step", None)),
    st.integers(2, 8).map(lambda count: ("steps", count)),
    st.just(("racing step", None)),  # does not wait for the loader threads
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(actions, min_size=12, max_size=60),
    st.integers(12, 40),
    st.integers(1, 12),
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_every_request_ends_once_with_its_own_tokens(
    script: list[tuple[str, object]],
    num_pages: int,
    max_batch_tokens: int,
    slots: int,
    max_num_seqs: int,
    prefix_caching: bool,
    lends: bool,
) -> None:
    memory = SimulatedMemory(
        slots=slots, device_bytes=400, virtual_tokens={f"prefix-{i}": i for i in (1, 3, 4, 9)}, lends=lends
    )
    h = Harness(
        memory=memory,
        num_pages=num_pages,
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=44,
        host_bytes=350,
        prefix_caching=prefix_caching,
        starvation_s=1.0,
    )
    aborted = set()
    for action, value in script:
        match action:
            case "add":
                ref, prompt, max_tokens, tenant = value  # type: ignore[misc]
                h.add(request(f"r{len(h.events)}", prompt, ref=ref, max_tokens=max_tokens, tenant=tenant))
            case "abort":
                h.core.handle(AbortRequest(request_id=f"r{value}"))
                aborted.add(f"r{value}")
            case "unload":
                h.core.handle(UnloadAdapter(digest=value.digest))  # type: ignore[attr-defined]
            case "steps":
                for _ in range(value):  # type: ignore[call-overload]
                    h.step()
            case _:
                h.step(settle=action == "step")
    h.run(max_steps=3000)
    for request_id, events in h.events.items():
        reason = events[-1].finish_reason
        alone = expected_tokens(h.runner.specs[request_id], h.runner.specs[request_id].sampling.max_tokens)
        assert h.tokens(request_id) == alone[: len(h.tokens(request_id))]
        if reason is FinishReason.LENGTH:
            assert h.tokens(request_id) == alone
        else:
            assert reason is FinishReason.ABORT
            assert request_id in aborted
    h.check_idle()
    h.adapters.close()
