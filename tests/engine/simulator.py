"""A device made of Python dicts that checks what the scheduler does to it.

`SimulatedRunner` keeps, for every KV position, which history was stored there, and fails when a plan would make
attention read anything but the request's own history. Its "model" picks the next token as a hash of adapter and
history, so outputs depend on exactly what a real model's would depend on.
"""

import hashlib
from dataclasses import dataclass, field, replace

from peftserve.engine.adapter_memory import HostAdapter, Placement
from peftserve.engine.plan import Sampled, StepPlan, StepResult
from peftserve.errors import AdapterLoadError
from peftserve.types import AdapterKind, AdapterRef, EngineRequest, SamplingParams

VOCAB = 50


def adapter(name: str, kind: AdapterKind, *, tenant: str = "default") -> AdapterRef:
    digest = hashlib.sha256(f"{tenant}/{name}".encode()).hexdigest()
    return AdapterRef(digest=digest, kind=kind, name=name, tenant=tenant)


def request(
    request_id: str,
    prompt: list[int],
    *,
    max_tokens: int = 4,
    ref: AdapterRef | None = None,
    tenant: str = "default",
    **sampling: object,
) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return EngineRequest(id=request_id, prompt_token_ids=prompt, sampling=params, adapter=ref, tenant=tenant)


def expected_tokens(spec: EngineRequest, count: int) -> list[int]:
    """What the simulated model generates for a request that runs alone."""
    history = list(spec.prompt_token_ids)
    for _ in range(count):
        history.append(_next_token(spec.adapter.digest if spec.adapter else "", history))
    return history[len(spec.prompt_token_ids) :]


def _next_token(digest: str, history: list[int]) -> int:
    seed = hashlib.sha256(f"{digest}:{history}".encode()).digest()
    return int.from_bytes(seed[:4], "little") % VOCAB


@dataclass
class SimulatedMemory:
    """Adapter memory with `slots` slots per kind, `device_bytes` in all, and adapters of a given size.

    `virtual_tokens` gives prefix lengths by name; names in `broken` fail to load. With `lends`, a placed adapter's host
    copy takes a tenth.
    """

    slots: int = 4
    device_bytes: int = 1000
    adapter_bytes: int = 100
    sizes: dict[str, int] = field(default_factory=dict)  # by name, where it is another one
    virtual_tokens: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    lends: bool = False
    used: dict[AdapterKind, dict[int, str]] = field(default_factory=dict)
    used_bytes: int = 0
    prefix_pages: dict[int, tuple[str, int]] = field(default_factory=dict)  # page -> (digest, index)
    loads: list[str] = field(default_factory=list)

    def load(self, ref: AdapterRef) -> HostAdapter:
        self.loads.append(ref.name)
        if ref.name in self.broken:
            raise AdapterLoadError("its bytes are broken")
        return HostAdapter(ref, self._size(ref), self.virtual_tokens.get(ref.name, 0), None)

    def _size(self, ref: AdapterRef) -> int:
        return self.sizes.get(ref.name, self.adapter_bytes)

    def fits(self, host: HostAdapter, *, taken_bytes: int = 0, taken_slots: int = 0) -> bool:
        return host.host_bytes + taken_bytes <= self.device_bytes and taken_slots < self.slots

    def reserve(self, host: HostAdapter) -> Placement | None:
        taken = self.used.setdefault(host.kind, {})
        free = [slot for slot in range(self.slots) if slot not in taken]
        if not free or self.used_bytes + host.host_bytes > self.device_bytes:
            return None
        self.used_bytes += host.host_bytes
        taken[free[0]] = host.ref.digest
        return Placement(slot=free[0], device_bytes=host.host_bytes)

    def lend(self, host: HostAdapter) -> HostAdapter:
        return replace(host, host_bytes=self._size(host.ref) // 10, lent=True) if self.lends else host

    def take_back(self, host: HostAdapter, placement: Placement) -> HostAdapter:
        if not host.lent:
            raise AssertionError(f"{host.ref.name} was not lent")
        if host.kind is AdapterKind.PREFIX:
            held = [self.prefix_pages[page] for page in placement.pages]
            if held != [(host.ref.digest, index) for index in range(len(held))]:
                raise AssertionError(f"{host.ref.name}: its pages hold {held}")
        elif self.used[host.kind].get(placement.slot) != host.ref.digest:
            raise AssertionError(f"{host.ref.name}: slot {placement.slot} is not its own")
        return replace(host, host_bytes=self._size(host.ref), lent=False)

    def copy(self, host: HostAdapter, placement: Placement) -> None:
        if host.lent:
            raise AssertionError(f"{host.ref.name} has no weights to copy")
        for index, page in enumerate(placement.pages):
            self.prefix_pages[page] = (host.ref.digest, index)

    def release(self, placement: Placement, kind: AdapterKind) -> None:
        del self.used[kind][placement.slot]
        self.used_bytes -= placement.device_bytes


class SimulatedRunner:
    """Executes plans against a KV cache of (history) cells and verifies every position that attention would read."""

    def __init__(self, memory: SimulatedMemory, page_size: int) -> None:
        self.memory = memory
        self.page_size = page_size
        self.kv: dict[tuple[int, int], object] = {}  # (page, offset) -> what is stored there
        self.specs: dict[str, EngineRequest] = {}
        self.outputs: dict[str, list[int]] = {}
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self._check_segments(plan)
        for copy in plan.page_copies:
            for offset in range(copy.num_tokens):
                self.kv[copy.dst, offset] = self._prefix_cell(copy.src, offset)
        sampled = {}
        for row in plan.rows:
            spec = self.specs[row.request_id]
            digest = spec.adapter.digest if spec.adapter else ""
            virtual = self.memory.virtual_tokens.get(spec.adapter.name, 0) if spec.adapter else 0
            history = list(spec.prompt_token_ids) + self.outputs.setdefault(row.request_id, [])
            first = row.num_computed - virtual
            if first < 0 or not row.token_ids or list(row.token_ids) != history[first : first + row.num_tokens]:
                raise AssertionError(f"{row.request_id}: wrong tokens in its row")
            if spec.adapter and row.kind in (AdapterKind.LORA, AdapterKind.BOTTLENECK):
                held = self.memory.used[row.kind].get(row.slot)
                if held != digest:
                    raise AssertionError(f"{row.request_id}: slot {row.slot} holds {held}, not its adapter")
            for index in range(row.num_tokens):
                position = row.num_computed + index
                self.kv[self._cell(row.block_table, position)] = (digest, tuple(history[: position - virtual + 1]))
            for position in range(row.num_computed + row.num_tokens):
                self._check_cell(row.block_table, position, virtual, digest, history, row.request_id)
            if row.sample is not None:
                if first + row.num_tokens != len(history):
                    raise AssertionError(f"{row.request_id}: samples before its prompt is done")
                token = _next_token(digest, history)
                sampled[row.request_id] = Sampled(token)
                self.outputs[row.request_id].append(token)
        return StepResult(plan.step, sampled)

    def _cell(self, block_table: "list[int] | tuple[int, ...] | object", position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.page_size)
        return block_table[page], offset  # type: ignore[index]

    def _prefix_cell(self, page: int, offset: int) -> object:
        digest, index = self.memory.prefix_pages[page]
        return ("prefix", digest, index * self.page_size + offset)

    def _check_cell(
        self, block_table: object, position: int, virtual: int, digest: str, history: list[int], who: str
    ) -> None:
        page, offset = self._cell(block_table, position)
        if position < virtual:
            stored = self.kv.get((page, offset))
            if position // self.page_size < virtual // self.page_size:
                stored = self._prefix_cell(page, offset)
            wanted: object = ("prefix", digest, position)
        else:
            stored = self.kv.get((page, offset))
            wanted = (digest, tuple(history[: position - virtual + 1]))
        if stored != wanted:
            raise AssertionError(f"{who}: position {position} reads {stored}, not {wanted}")

    def _check_segments(self, plan: StepPlan) -> None:
        for kind, segments in ((AdapterKind.LORA, plan.lora), (AdapterKind.BOTTLENECK, plan.bottleneck)):
            owner = [row.slot if row.kind is kind else None for row in plan.rows for _ in range(row.num_tokens)]
            seen: list[int | None] = [None] * len(owner)
            for start, end, slot in zip(segments.start[:-1], segments.start[1:], segments.slot, strict=True):
                seen[start:end] = [slot] * (end - start)
            if seen != owner or len(set(segments.slot)) != len(segments.slot):
                raise AssertionError(f"{kind} segments {segments} do not match rows {plan.rows}")
