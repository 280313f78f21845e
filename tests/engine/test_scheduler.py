"""The scheduler on the simulated device: order, budget, fairness, preemption, prefixes, stops, errors."""

from dataclasses import replace

import pytest

from peftserve.engine.messages import AbortRequest, PrefetchAdapter, UnloadAdapter
from peftserve.engine.plan import StepPlan, StepResult
from peftserve.types import AdapterKind, AdapterRef, FinishReason

from .harness import Harness
from .simulator import SimulatedMemory, adapter, expected_tokens, request

LORA_A, LORA_B = adapter("lora-a", AdapterKind.LORA), adapter("lora-b", AdapterKind.LORA)
BOTTLENECK = adapter("neck", AdapterKind.BOTTLENECK)
PREFIX = adapter("prefix", AdapterKind.PREFIX)


def test_one_batch_mixes_all_kinds_in_segments() -> None:
    h = Harness(memory=SimulatedMemory(virtual_tokens={"prefix": 6}), max_batch_tokens=64)
    for index, ref in enumerate([BOTTLENECK, None, LORA_B, PREFIX, LORA_A, None, LORA_B]):
        h.add(request(f"r{index}", [1, 2, 3, index], ref=ref))
    h.run()
    for request_id, spec in h.runner.specs.items():
        assert h.tokens(request_id) == expected_tokens(spec, 4)
        assert h.events[request_id][-1].finish_reason is FinishReason.LENGTH
    full = [plan for plan in h.runner.plans if len(plan.rows) == 7]
    assert full, "all seven never ran in one step"
    assert [row.kind for row in full[0].rows] == sorted((row.kind for row in full[0].rows), key=list(AdapterKind).index)
    assert len(full[0].lora.slot) == 2
    assert len(full[0].bottleneck.slot) == 1
    h.check_idle()


def test_prompts_are_prefilled_in_chunks_within_the_budget_and_decode_goes_first() -> None:
    h = Harness(max_batch_tokens=8)
    h.add(request("short", [1], max_tokens=12))
    h.step()
    h.add(request("long", list(range(30)), max_tokens=2))
    h.run()
    assert all(plan.num_tokens <= 8 for plan in h.runner.plans)
    chunks = [row.num_tokens for plan in h.runner.plans for row in plan.rows if row.request_id == "long"]
    assert chunks[:5] == [7, 7, 7, 7, 2]
    steps = [any(row.request_id == "short" for row in plan.rows) for plan in h.runner.plans]
    assert all(steps[:12]), "a decode was held up by a prefill"


@pytest.mark.parametrize("virtual_tokens", [1, 4, 6, 8])
def test_prefix_pages_are_shared_and_the_partly_filled_one_is_copied(virtual_tokens: int) -> None:
    h = Harness(memory=SimulatedMemory(virtual_tokens={"prefix": virtual_tokens}))
    for index in range(3):
        h.add(request(f"r{index}", [7, 8, 9, index, 5], ref=PREFIX, max_tokens=5))
    h.run()
    for request_id, spec in h.runner.specs.items():
        assert h.tokens(request_id) == expected_tokens(spec, 5)
    shared = virtual_tokens // 4
    tables = {tuple(row.block_table[:shared]) for plan in h.runner.plans for row in plan.rows}
    assert len(tables) == 1
    h.check_idle()


def test_equal_prompts_are_answered_from_the_prefix_cache_within_tenant_and_adapter_only() -> None:
    h = Harness()
    prompt = list(range(13))
    h.add(request("cold", prompt))
    h.run()
    for request_id, ref, tenant in [
        ("warm", None, "default"),
        ("other-tenant", None, "rival"),
        ("other-adapter", LORA_A, "default"),
    ]:
        h.add(request(request_id, prompt, ref=ref, tenant=tenant))
    h.run()
    cached = {request_id: events[0].num_cached_tokens for request_id, events in h.events.items()}
    assert cached == {"cold": 0, "warm": 12, "other-tenant": 0, "other-adapter": 0}
    assert h.tokens("warm") == h.tokens("cold")


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    h = Harness()
    for request_id in ("cold", "warm"):
        h.add(request(request_id, list(range(8))))
        h.run()
    assert h.events["warm"][0].num_cached_tokens == 4
    assert h.tokens("warm") == h.tokens("cold")


def test_preemption_recomputes_and_changes_no_token() -> None:
    h = Harness(num_pages=8, max_model_len=32, prefix_caching=False)
    for index in range(4):
        h.add(request(f"r{index}", [index] * 6, max_tokens=14))
    h.run()
    assert h.scheduler.preemptions > 0
    for request_id, spec in h.runner.specs.items():
        assert h.tokens(request_id) == expected_tokens(spec, 14)
    h.check_idle()


def test_abort_works_in_every_live_state() -> None:
    h = Harness(max_num_seqs=1)
    h.add(request("running", [1, 2], max_tokens=50))
    h.step()
    h.add(request("waiting", [1, 2], max_tokens=50))
    h.add(request("waiting-adapter", [1, 2], ref=LORA_A))
    for request_id in ("waiting-adapter", "waiting", "running", "unknown"):
        h.core.handle(AbortRequest(request_id=request_id))
    h.step()
    assert [h.events[r][-1].finish_reason for r in ("running", "waiting", "waiting-adapter")] == [
        FinishReason.ABORT
    ] * 3
    h.check_idle()


def test_a_stop_token_ends_the_request_and_is_no_output() -> None:
    spec = request("r", [3, 1], max_tokens=10)
    third = expected_tokens(spec, 3)[2]
    h = Harness(stop_token_ids=frozenset({third}))
    h.add(spec)
    h.add(request("ignoring", [3, 1], max_tokens=10, ignore_eos=True))
    h.add(request("minimum", [3, 1], max_tokens=10, min_tokens=3))
    h.run()
    assert h.tokens("r") == expected_tokens(spec, 3)[: expected_tokens(spec, 3).index(third)]
    assert (h.events["r"][-1].finish_reason, h.events["r"][-1].stop_token_id) == (FinishReason.STOP, third)
    assert len(h.tokens("ignoring")) == 10
    banned = [row.sample.banned_token_ids for p in h.runner.plans for row in p.rows if row.request_id == "minimum"]
    assert [third in ids for ids in banned if ids is not None][:4] == [True, True, True, False][: len(banned)]


def test_a_context_that_is_full_ends_with_length_and_a_prompt_that_fills_it_with_an_error() -> None:
    h = Harness(max_model_len=16, memory=SimulatedMemory(virtual_tokens={"prefix": 6}))
    h.add(request("full", [1] * 12, max_tokens=50))
    h.add(request("too-long", [1] * 10, ref=PREFIX))
    h.run()
    assert len(h.tokens("full")) == 4
    assert h.events["full"][-1].finish_reason is FinishReason.LENGTH
    error = h.events["too-long"][-1].error
    assert error is not None
    assert error.code == "prompt_too_long"
    assert "6 virtual" in error.message
    h.check_idle()


def test_a_failed_load_ends_its_requests_with_the_reason_and_is_tried_again() -> None:
    memory = SimulatedMemory(broken={"lora-a"})
    h = Harness(memory=memory)
    h.add(request("first", [1], ref=LORA_A))
    h.add(request("base", [1]))
    h.run()
    error = h.events["first"][-1].error
    assert error is not None
    assert error.code == "adapter_load_failed"
    assert error.message == "adapter lora-a cannot be loaded: its bytes are broken"
    assert h.events["base"][-1].finish_reason is FinishReason.LENGTH
    memory.broken.clear()
    h.add(request("second", [1], ref=LORA_A))
    h.run()
    assert h.events["second"][-1].finish_reason is FinishReason.LENGTH
    h.check_idle()


def test_more_adapters_than_slots_all_get_their_turn() -> None:
    h = Harness(memory=SimulatedMemory(slots=2), max_batch_tokens=64)
    refs = [adapter(f"lora-{index}", AdapterKind.LORA) for index in range(7)]
    for turn in range(2):
        for ref in refs:
            h.add(request(f"{ref.name}-{turn}", [1, turn], ref=ref))
    h.run()
    for request_id, spec in h.runner.specs.items():
        assert h.tokens(request_id) == expected_tokens(spec, 4)
    assert h.adapters.evictions_device > 0
    h.check_idle()


def test_an_adapter_is_in_one_tier_at_a_time_where_its_memory_lends() -> None:
    """Its bytes move to the device and, when it makes room, back: it is read from disk once."""
    h = Harness(memory=SimulatedMemory(slots=1, lends=True))
    for turn, ref in enumerate([LORA_A, LORA_B, LORA_A, LORA_B]):
        h.add(request(f"r{turn}", [1, turn], ref=ref))
        h.run()
        assert h.adapters.device_bytes_used == 100
        assert h.adapters.host_bytes_used == (10 if turn == 0 else 110)
    assert sorted(h.memory.loads) == [LORA_A.name, LORA_B.name]
    assert h.adapters.evictions_device == 3
    assert h.adapters.evictions_host == 0


def test_a_steady_stream_on_resident_adapters_does_not_starve_an_absent_one() -> None:
    h = Harness(memory=SimulatedMemory(slots=1), starvation_s=1.0, max_num_seqs=2)
    h.add(request("stream-0", [1, 2], ref=LORA_A, max_tokens=6))
    h.step()
    h.add(request("absent", [1], ref=LORA_B))
    for index in range(1, 60):
        h.add(request(f"stream-{index}", [1, index], ref=LORA_A, max_tokens=6))
        h.step()
        if h.finished("absent"):
            break
    assert h.finished("absent")
    assert h.now < 6.0


def test_fair_queueing_serves_a_light_tenant_beside_a_heavy_one() -> None:
    h = Harness(max_num_seqs=2)
    for index in range(20):
        h.add(request(f"heavy-{index}", [1, 2, index], tenant="heavy", max_tokens=8))
    for _ in range(3):
        h.step()
    h.add(request("light", [1, 2, 3], tenant="light", max_tokens=8))
    while not h.finished("light"):
        h.step()
    done = sum(h.finished(f"heavy-{index}") for index in range(20))
    assert done <= 4, "the light tenant waited behind the heavy one's queue"


def test_unload_gives_memory_back_when_the_last_request_is_done() -> None:
    h = Harness()
    h.add(request("r", [1, 2], ref=LORA_A, max_tokens=5))
    h.step()
    h.step()
    h.core.handle(UnloadAdapter(digest=LORA_A.digest))
    assert h.adapters.device_bytes_used == 100
    h.run()
    assert h.tokens("r") == expected_tokens(h.runner.specs["r"], 5)
    assert (h.adapters.device_bytes_used, h.adapters.host_bytes_used, h.adapters.residency()) == (0, 0, [])


def test_a_pinned_adapter_is_on_the_device_before_it_is_used_and_is_never_evicted() -> None:
    h = Harness(memory=SimulatedMemory(slots=2))
    h.core.handle(PrefetchAdapter(adapter=LORA_A, pinned=True))
    for _ in range(3):
        h.step()
    assert h.adapters.device_bytes_used == 100
    for index in range(4):
        h.add(request(f"r{index}", [1], ref=adapter(f"other-{index}", AdapterKind.LORA)))
    h.run()
    assert h.memory.loads.count("lora-a") == 1
    assert LORA_A.digest in h.memory.used[AdapterKind.LORA].values()


def test_idle_prefixes_give_their_pages_back_under_pressure_and_pinned_ones_fail_the_request_clearly() -> None:
    h = Harness(memory=SimulatedMemory(virtual_tokens={"prefix": 16}), num_pages=8, max_model_len=32)
    h.add(request("p", [1], ref=PREFIX))
    h.run()
    h.add(request("big", [1] * 28, max_tokens=4))
    h.run()
    assert h.events["big"][-1].finish_reason is FinishReason.LENGTH
    h.core.handle(PrefetchAdapter(adapter=PREFIX, pinned=True))
    for _ in range(3):
        h.step()
    h.add(request("hopeless", [1] * 28, max_tokens=4))
    h.run()
    error = h.events["hopeless"][-1].error
    assert error is not None
    assert error.code == "overloaded"
    assert "pinned" in error.message


def test_a_step_that_fails_ends_only_its_own_requests() -> None:
    h = Harness(max_num_seqs=1)
    h.add(request("victim", [1, 2]))
    h.add(request("next", [3, 4]))
    execute = h.runner.execute
    h.runner.execute = lambda plan: 1 // 0  # type: ignore[method-assign,assignment,return-value]
    h.step()
    h.runner.execute = execute  # type: ignore[method-assign]
    h.run()
    error = h.events["victim"][-1].error
    assert error is not None
    assert error.code == "internal"
    assert h.tokens("next") == expected_tokens(h.runner.specs["next"], 4)
    h.check_idle()


def test_logits_that_are_no_numbers_end_their_own_request_with_an_error() -> None:
    h = Harness()
    h.add(request("nan", [1, 2], ref=LORA_A))
    h.add(request("sound", [1, 2]))
    execute = h.runner.execute

    def overflow(plan: StepPlan) -> StepResult:
        result = execute(plan)
        sampled = {key: replace(value, is_finite=key != "nan") for key, value in result.sampled.items()}
        return StepResult(result.step, sampled)

    h.runner.execute = overflow  # type: ignore[method-assign]
    h.run()
    error = h.events["nan"][-1].error
    assert error is not None
    assert "lora-a is not a number" in error.message
    assert h.tokens("nan") == []
    assert h.tokens("sound") == expected_tokens(h.runner.specs["sound"], 4)
    h.check_idle()


def _pin(h: Harness, ref: AdapterRef) -> None:
    h.core.handle(PrefetchAdapter(adapter=ref, pinned=True))
    h.step()
    h.step()


@pytest.mark.parametrize("kind", [AdapterKind.LORA, AdapterKind.BOTTLENECK, AdapterKind.PREFIX])
def test_what_pinned_adapters_leave_no_room_for_fails_at_once_and_holds_nobody_back(kind: AdapterKind) -> None:
    is_prefix = kind is AdapterKind.PREFIX
    pinned, large = adapter("pinned", kind if is_prefix else AdapterKind.LORA), adapter("big", kind)
    lengths = {"pinned": 64, "big": 64} if is_prefix else {}
    memory = SimulatedMemory(sizes={"pinned": 500, "big": 600}, virtual_tokens=lengths)
    h = Harness(memory=memory, host_bytes=5000, starvation_s=0.5, max_num_seqs=2, max_model_len=100)
    _pin(h, pinned)
    h.add(request("stream", [1, 2], max_tokens=50))
    h.step()
    h.add(request("big", [3], ref=large))
    for index in range(5):
        h.add(request(f"short{index}", [4, index], max_tokens=2))
    h.run()
    error = h.events["big"][-1].error
    assert error is not None
    assert (error.code, "adapter big does not fit beside the pinned" in error.message) == ("overloaded", True)
    ran = {row.request_id: step for step, plan in enumerate(h.runner.plans) for row in plan.rows}
    assert ran["short4"] < ran["stream"], "those behind it were held back"
    h.core.handle(PrefetchAdapter(adapter=pinned, pinned=False))
    h.add(request("again", [3], ref=large))
    h.run()
    assert h.events["again"][-1].finish_reason is FinishReason.LENGTH
    h.check_idle()


def test_a_slot_that_only_pins_hold_fails_the_request() -> None:
    h = Harness(memory=SimulatedMemory(slots=1))
    _pin(h, LORA_A)
    h.add(request("r", [1], ref=LORA_B))
    h.add(request("other kind", [1], ref=BOTTLENECK))
    h.run()
    error = h.events["r"][-1].error
    assert error is not None
    assert error.code == "overloaded"
    assert h.events["other kind"][-1].finish_reason is FinishReason.LENGTH


def test_a_pin_takes_its_place_when_the_device_has_room_again() -> None:
    h = Harness(memory=SimulatedMemory(slots=1))
    h.add(request("r", [1], ref=LORA_A, max_tokens=10))
    h.step()
    h.step()
    _pin(h, LORA_B)
    states = {entry.name: entry.state for entry in h.adapters.residency()}
    assert states == {"lora-a": "device", "lora-b": "host"}
    h.run()
    h.step()
    h.step()
    states = {entry.name: entry.state for entry in h.adapters.residency()}
    assert states == {"lora-a": "host", "lora-b": "device"}


def test_nothing_is_evicted_for_what_would_still_not_fit() -> None:
    h = Harness(memory=SimulatedMemory(slots=2))
    for name in ("one", "two"):
        h.add(request(name, [1], ref=adapter(name, AdapterKind.BOTTLENECK), max_tokens=1))
    h.run()
    for name in ("a", "b", "c"):
        h.add(request(name, [1], ref=adapter(name, AdapterKind.LORA), max_tokens=40))
    for _ in range(8):
        h.step()
    assert h.adapters.evictions_device == 0
    h.run()
    assert h.adapters.evictions_device == 1, "a LoRA's slot, and no bottleneck's"


@pytest.mark.parametrize("lends", [False, True])
def test_adapters_that_are_not_read_yet_do_not_starve_behind_those_that_are(lends: bool) -> None:
    h = Harness(memory=SimulatedMemory(lends=lends), host_bytes=300, starvation_s=1.0, max_num_seqs=4)
    h.adapters._starvation_s = 0.0  # the cache goes by the real clock
    hot = [adapter(f"hot{index}", AdapterKind.LORA) for index in range(6)]
    for index in range(12):
        h.add(request(f"hot{index}", [1], ref=hot[index % 6], max_tokens=3))
    h.step()
    h.step()
    h.add(request("cold", [1], ref=adapter("cold", AdapterKind.LORA)))
    for index in range(12, 400):
        h.add(request(f"hot{index}", [1], ref=hot[index % 6], max_tokens=3))
        h.step()
        if h.finished("cold"):
            break
    assert h.finished("cold")
    h.run(2000)
    h.check_idle()


def test_what_comes_back_from_the_device_counts_for_the_hosts_budget() -> None:
    names = [f"p{index}" for index in range(6)]
    memory = SimulatedMemory(lends=True, virtual_tokens=dict.fromkeys(names, 8))
    h = Harness(memory=memory, host_bytes=200, num_pages=16)
    for name in names:
        h.add(request(name, [1], ref=adapter(name, AdapterKind.PREFIX)))
        h.run()
    h.add(request("base", list(range(50)), max_tokens=8))
    h.run()
    assert h.adapters.host_bytes_used <= 200


def test_under_pressure_each_copy_of_an_adapter_is_used() -> None:
    """Ageing must not make requests evict one another's adapters before anybody has run with them."""
    h = Harness(memory=SimulatedMemory(slots=4), host_bytes=5000, num_pages=200, starvation_s=1.0)
    refs = [adapter(f"a{index}", AdapterKind.LORA) for index in range(16)]
    for index in range(200):
        h.add(request(f"r{index}", [index % 40], ref=refs[index % 16]))
    h.run(3000)
    assert h.adapters.evictions_device < 200, "more copies than requests"
    h.check_idle()


def test_an_error_names_the_adapter_as_the_request_does() -> None:
    """Equal bytes are one entry of the cache, whoever calls them what."""
    h = Harness(memory=SimulatedMemory(broken={"acme-secret"}))
    secret = adapter("acme-secret", AdapterKind.LORA)
    h.add(request("first", [1], ref=secret))
    h.add(request("second", [1], ref=AdapterRef(digest=secret.digest, kind=secret.kind, name="mine", tenant="rival")))
    h.run()
    for name, request_id in (("acme-secret", "first"), ("mine", "second")):
        error = h.events[request_id][-1].error
        assert error is not None
        assert error.message == f"adapter {name} cannot be loaded: its bytes are broken"
    assert [entry.error for entry in h.adapters.residency()] == ["its bytes are broken"]


def test_the_prefix_cache_counts_prompt_tokens_of_what_has_started() -> None:
    h = Harness(num_pages=16, max_model_len=64)
    h.add(request("first", list(range(20)), max_tokens=2))
    h.run()
    assert (h.kv.queries, h.kv.hits) == (20, 0)
    h.add(request("fills the cache", [99] * 24, max_tokens=30))
    h.step()
    h.add(request("waits", list(range(20)), max_tokens=20))
    h.run()
    assert h.kv.queries == 20 + 24 + 20, "however often it was tried"
    h.add(request("again", list(range(20)), max_tokens=1))
    before = h.kv.hits
    h.run()
    assert h.kv.hits - before == 16
