"""Adapters on the device: what lies where, all or nothing, and every byte given back."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftserve.adapters import blobs
from peftserve.adapters.formats import Activation as FileActivation
from peftserve.adapters.formats import LoraAdapter, PrefixAdapter, parse
from peftserve.adapters.formats.parsed import BottleneckAdapter, BottleneckSite, device_bytes
from peftserve.adapters.store import AdapterStore
from peftserve.engine.adapter_memory import HostAdapter, Placement
from peftserve.errors import AdapterLoadError, InternalError
from peftserve.model.adapter_memory import DeviceAdapterMemory
from peftserve.model.kv import KvCache
from peftserve.model.packing import PackedWeights
from peftserve.model.spec import TARGET_NAMES, targets
from peftserve.types import AdapterKind, AdapterRef
from peftserve_kernels.activation import Activation, activate
from peftserve_kernels.rank_pages import quantize_rows, read_factors, read_rank_rows, read_vector, vector_dtype
from tests import tiny_models
from tests.adapters import files
from tests.adapters.files import SPEC
from tests.goldens.bottleneck.random_adapter import write_random_adapter
from tests.model.driver import Driver, Job

MAX_RANK = 24
NUM_PAGES = 12
PAGE_SIZE = 4


class Device:
    """A memory with a store and a KV cache for `files.SPEC`."""

    def __init__(
        self,
        root: Path,
        *,
        arena_bytes: int = 1 << 20,
        num_slots: int = 4,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self.store = AdapterStore(root, SPEC, max_rank=MAX_RANK)
        self.kv = KvCache(SPEC, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=dtype, device=torch.device("cpu"))
        self.memory = DeviceAdapterMemory(
            SPEC,
            self.kv,
            root=root,
            arena_bytes=arena_bytes,
            num_slots=num_slots,
            max_rank=MAX_RANK,
            dtype=adapter_dtype,
        )

    def load(self, made: tuple[dict[str, Any], files.Arrays], name: str = "demo") -> HostAdapter:
        return self.memory.load(files.push(self.store, "tests", name, made).ref)

    def place(self, host: HostAdapter) -> Placement:
        placement = self.memory.reserve(host)
        assert placement is not None
        self.memory.copy(host, placement)
        return placement

    def parsed(self, host: HostAdapter) -> Any:
        return parse(*blobs.read_adapter(self.store.root, host.ref.digest), SPEC, MAX_RANK)


@pytest.fixture(params=[None, torch.int8], ids=["float32", "int8"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    made = Device(tmp_path, adapter_dtype=request.param)
    yield made
    made.store.close()


def kept(rows: torch.Tensor, arena: torch.Tensor) -> torch.Tensor:
    """Rank rows as they come back from `arena`."""
    if arena.dtype != torch.int8:
        return rows
    values, scales = quantize_rows(rows)
    assert (values * scales[:, None] - rows).abs().max() <= rows.abs().max() / 254 * 1.01
    return values * scales[:, None]


def assert_lora_in_place(device: Device, host: HostAdapter, slot: int) -> None:
    adapter: LoraAdapter = device.parsed(host)
    tables = device.memory.lora
    for layer in range(SPEC.num_layers):
        for target in targets(SPEC):
            at = (slot, layer, target.index)
            module = adapter.modules.get((layer, target.index))
            assert int(tables.rank[at]) == (module.rank if module else 0)
            if module is None:
                continue
            assert float(tables.scale[at]) == pytest.approx(module.scale)
            pages = tables.a_page[at].tolist(), tables.b_page[at].tolist()
            widths = target.in_features, target.out_features
            a, b = read_factors(tables.arena, *pages, module.rank, widths)
            assert torch.equal(a, kept(torch.from_numpy(module.a.float32()), tables.arena))
            assert torch.equal(b, kept(torch.from_numpy(module.b.float32()).T, tables.arena))


def assert_bottleneck_in_place(device: Device, host: HostAdapter, slot: int) -> None:
    adapter: BottleneckAdapter = device.parsed(host)
    tables, size = device.memory.bottleneck, SPEC.hidden_size
    for layer in range(SPEC.num_layers):
        for site in BottleneckSite:
            at = (slot, layer, site)
            module = adapter.sites.get((layer, site))
            assert int(tables.width[at]) == (module.width if module else 0)
            if module is None:
                continue
            assert float(tables.scale[at]) == pytest.approx(module.scale)
            pages = tables.down_page[at].tolist(), tables.up_page[at].tolist()
            down, up = read_factors(tables.arena, *pages, module.width, (size, size))
            assert torch.equal(down, kept(torch.from_numpy(module.down.float32()), tables.arena))
            assert torch.equal(up, kept(torch.from_numpy(module.up.float32()).T, tables.arena))
            for bias, offset in ((module.down_bias, tables.down_bias), (module.up_bias, tables.up_bias)):
                values = torch.from_numpy(bias.float32()).to(vector_dtype(tables.arena.dtype)).float()
                assert torch.equal(read_vector(tables.arena, int(offset[at]), len(values)), values)


def is_scattered(memory: DeviceAdapterMemory, host: HostAdapter, slot: int) -> bool:
    """Whether its blocks moved by different distances on their way to the arena."""
    assert isinstance(host.weights, PackedWeights)
    tables = memory.lora if host.kind is AdapterKind.LORA else memory.bottleneck
    moves = set()
    for name, offsets in host.weights.offsets.items():
        used = offsets >= 0
        moves |= set((getattr(tables, name)[slot][used] - offsets[used]).tolist())
    return len(moves) > 1


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 24])
def test_lora_lies_where_the_tables_say(device: Device, rank: int) -> None:
    host = device.load(files.lora(TARGET_NAMES, rank=rank))
    assert_lora_in_place(device, host, device.place(host).slot)


@pytest.mark.parametrize("width", [1, 8, 16])
def test_bottleneck_lies_where_the_tables_say(device: Device, width: int) -> None:
    host = device.load(files.bottleneck(width=width, scaling=0.5, is_parallel=True, mh_adapter=True))
    slot = device.place(host).slot
    assert_bottleneck_in_place(device, host, slot)
    assert int(device.memory.bottleneck.activation[slot]) == Activation.SILU
    adapter: BottleneckAdapter = device.parsed(host)
    assert (
        device.memory.bottleneck.input_mode[slot]
        == {"hidden": 0, "hidden_plus_residual": 1, "residual": 2}[adapter.input_mode]
    )


def test_every_activation_of_the_format_has_a_kernel() -> None:
    x = torch.linspace(-14, 14, 57)
    results = {name: activate(Activation[name.value.upper()], x) for name in FileActivation}
    assert len({tuple(result.tolist()) for result in results.values()}) == len(FileActivation) == len(Activation)


def test_prefix_fills_the_given_pages_and_no_other(device: Device) -> None:
    host = device.load(files.prefix(6))
    assert (host.num_virtual_tokens, host.kind) == (6, AdapterKind.PREFIX)
    device.kv.k.fill_(7.0)
    device.kv.v.fill_(7.0)
    device.memory.copy(host, Placement(pages=(9, 2)))
    adapter: PrefixAdapter = device.parsed(host)
    for cache, expected in ((device.kv.k, adapter.key), (device.kv.v, adapter.value)):
        for position in range(6):
            stored = cache[:, (9, 2)[position // PAGE_SIZE], :, position % PAGE_SIZE]
            assert torch.equal(stored, torch.from_numpy(expected[:, :, position]))
        others = [page for page in range(NUM_PAGES) if page not in (9, 2)]
        assert bool((cache[:, others] == 7.0).all())


def test_weights_are_rounded_to_the_models_dtype(tmp_path: Path) -> None:
    device = Device(tmp_path, dtype=torch.bfloat16)
    host = device.load(files.lora(rank=4))
    placement = device.place(host)
    module = device.parsed(host).modules[0, 0]
    pages = device.memory.lora.a_page[placement.slot, 0, 0].tolist()
    stored = read_rank_rows(device.memory.lora.arena, pages, 4, SPEC.hidden_size)
    assert torch.equal(stored, torch.from_numpy(module.a.float32()).bfloat16())
    device.store.close()


def test_bytes_follow_the_real_rank(device: Device) -> None:
    sizes = {}
    for rank in (1, 8, 9, 16):
        placement = device.place(device.load(files.lora(("q_proj",), rank=rank)))
        sizes[rank] = placement.device_bytes
        device.memory.release(placement, AdapterKind.LORA)
    is_int8 = device.memory.lora.arena.dtype == torch.int8
    page = 8 * SPEC.hidden_size * (1 if is_int8 else 4)
    both = 2 * page + (64 if is_int8 else 0)  # of a rank page of A and one of B
    assert sizes == {1: 3 * both, 8: 3 * both, 9: 6 * both, 16: 6 * both}


@pytest.mark.parametrize("made", [files.lora(rank=1), files.lora(rank=9), files.bottleneck(width=4)])
def test_what_the_quota_of_pins_counts_is_what_is_placed(device: Device, made: tuple[Any, Any]) -> None:
    host = device.load(made)
    placement = device.place(host)
    dtype = str(device.memory.lora.arena.dtype).removeprefix("torch.")
    counted = device_bytes(device.parsed(host).details(), dtype)
    assert counted is not None
    assert counted <= placement.device_bytes <= 1.5 * counted  # tiny blocks begin at aligned places
    device.memory.release(placement, host.kind)


def test_release_zeroes_the_tables_and_gives_everything_back(device: Device) -> None:
    lora = device.place(device.load(files.lora(TARGET_NAMES, rank=9)))
    bottleneck = device.place(device.load(files.bottleneck()))
    assert device.memory.device_bytes_used == lora.device_bytes + bottleneck.device_bytes
    device.memory.release(lora, AdapterKind.LORA)
    device.memory.release(bottleneck, AdapterKind.BOTTLENECK)
    assert device.memory.device_bytes_used == 0
    device.memory.check()
    for name in ("rank", "scale", "a_page", "b_page"):
        assert not getattr(device.memory.lora, name).any(), name
    for name in ("width", "scale", "down_page", "up_page", "down_bias", "up_bias", "activation", "input_mode"):
        assert not getattr(device.memory.bottleneck, name).any(), name
    with pytest.raises(InternalError, match="not in use"):
        device.memory.release(lora, AdapterKind.LORA)


@pytest.mark.parametrize("made", [files.lora(TARGET_NAMES, rank=9), files.bottleneck(width=8), files.prefix(6)])
def test_lent_weights_come_back_as_they_were(device: Device, made: tuple[Any, Any]) -> None:
    """Also when the blocks were spread over several holes."""
    for seed in range(4):
        hole = device.place(device.load(files.lora(("q_proj",), rank=8, seed=seed), f"other-{seed}"))
        if seed % 2 == 0:
            device.memory.release(hole, AdapterKind.LORA)
    host = device.load(made)
    is_prefix = host.kind is AdapterKind.PREFIX
    placement = Placement(pages=(9, 2)) if is_prefix else device.memory.reserve(host)
    assert placement is not None
    device.memory.copy(host, placement)
    lent = device.memory.lend(host)
    assert lent.lent
    assert lent.host_bytes < host.host_bytes / 2
    with pytest.raises(InternalError, match="lent"):
        device.memory.copy(lent, placement)
    back = device.memory.take_back(lent, placement)
    assert (back.host_bytes, back.num_virtual_tokens, back.lent) == (host.host_bytes, host.num_virtual_tokens, False)
    for name in ("k", "v") if is_prefix else ("data",):
        assert torch.equal(getattr(back.weights, name), getattr(host.weights, name))
    if not is_prefix:
        device.memory.release(placement, host.kind)
        again = device.place(back)
        check = assert_lora_in_place if host.kind is AdapterKind.LORA else assert_bottleneck_in_place
        check(device, back, again.slot)


def test_reserving_is_all_or_nothing(tmp_path: Path) -> None:
    device = Device(tmp_path, arena_bytes=3 * 8 * SPEC.hidden_size * 4 * 2 * 2, num_slots=4)
    hosts = [device.load(files.lora(("q_proj",), rank=8, seed=seed)) for seed in range(3)]
    first, second = device.place(hosts[0]), device.place(hosts[1])
    used = device.memory.device_bytes_used
    assert device.memory.reserve(hosts[2]) is None
    assert device.memory.device_bytes_used == used
    device.memory.release(first, AdapterKind.LORA)
    third = device.place(hosts[2])
    assert third.slot == first.slot
    assert_lora_in_place(device, hosts[1], second.slot)
    assert_lora_in_place(device, hosts[2], third.slot)
    device.store.close()


def test_slots_run_out_kind_by_kind(tmp_path: Path) -> None:
    device = Device(tmp_path, num_slots=1)
    lora, bottleneck = device.load(files.lora()), device.load(files.bottleneck())
    device.place(lora)
    used = device.memory.device_bytes_used
    assert device.memory.reserve(lora) is None
    assert device.memory.device_bytes_used == used
    assert device.memory.reserve(bottleneck) is not None
    device.store.close()


def test_fits_is_about_an_empty_device(tmp_path: Path) -> None:
    device = Device(tmp_path, arena_bytes=16 * 8 * SPEC.hidden_size * 4)
    small, large = device.load(files.lora(("q_proj",))), device.load(files.lora(TARGET_NAMES, rank=24))
    assert device.memory.fits(small)
    assert not device.memory.fits(large)
    device.place(small)
    assert device.memory.fits(small)
    device.store.close()


def test_adapters_survive_fragmentation(tmp_path: Path) -> None:
    """Random adapters come and go in an arena that holds only a few: scattered ones must read back exactly."""
    device = Device(tmp_path, arena_bytes=420_000, num_slots=16)
    rng = random.Random(0)
    made = [files.lora(tuple(rng.sample(TARGET_NAMES, 3)), rank=rng.randint(1, 24), seed=i) for i in range(10)]
    made += [files.bottleneck(width=rng.choice([2, 8, 16]), seed=i) for i in range(4)]
    hosts = [device.load(files_) for files_ in made]
    live: list[tuple[HostAdapter, Placement]] = []
    scattered = 0
    for _ in range(100):
        host = rng.choice(hosts)
        placement = device.memory.reserve(host)
        if placement is None:
            victim, its = live.pop(rng.randrange(len(live)))
            device.memory.release(its, victim.kind)
            continue
        device.memory.copy(host, placement)
        scattered += is_scattered(device.memory, host, placement.slot)
        live.append((host, placement))
        device.memory.check()
        for placed, where in live:
            check = assert_lora_in_place if placed.kind is AdapterKind.LORA else assert_bottleneck_in_place
            check(device, placed, where.slot)
    assert scattered > 5
    for placed, where in live:
        device.memory.release(where, placed.kind)
    assert device.memory.device_bytes_used == 0
    device.store.close()


def test_what_is_wrong_becomes_a_load_error(device: Device, tmp_path: Path) -> None:
    absent = AdapterRef(digest="0" * 64, kind=AdapterKind.LORA, name="ghost", tenant="tests")
    with pytest.raises(AdapterLoadError, match="no adapter with digest"):
        device.memory.load(absent)

    ref = files.push(device.store, "tests", "demo", files.lora()).ref
    with pytest.raises(AdapterLoadError, match="its files hold a lora adapter, not bottleneck"):
        device.memory.load(AdapterRef(digest=ref.digest, kind=AdapterKind.BOTTLENECK, name="demo", tenant="tests"))

    weights = blobs.blob_dir(tmp_path, ref.digest) / blobs.WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterLoadError, match="corrupt on disk"):
        device.memory.load(ref)


def test_an_adapter_beyond_this_engines_rank_is_refused_with_its_faults(device: Device, tmp_path: Path) -> None:
    ref = files.push(device.store, "tests", "demo", files.lora(rank=24)).ref
    memory = DeviceAdapterMemory(SPEC, device.kv, root=tmp_path, arena_bytes=1 << 20, num_slots=1, max_rank=8)
    with pytest.raises(AdapterLoadError) as caught:
        memory.load(ref)
    assert caught.value.faults
    assert "24" in caught.value.message


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    device = Device(tmp_path, dtype=torch.float16)
    config, arrays = files.lora(("q_proj",))
    name = next(iter(arrays))
    arrays[name][0, 0] = 1e5
    with pytest.raises(AdapterLoadError, match=r"exceeds the range of torch\.float16"):
        device.load((config, arrays))
    device.store.close()


def test_only_its_own_adapters_are_placed(device: Device) -> None:
    ref = AdapterRef(digest="0" * 64, kind=AdapterKind.LORA, name="foreign", tenant="tests")
    foreign = HostAdapter(ref=ref, host_bytes=1, num_virtual_tokens=0, weights=object())
    with pytest.raises(InternalError, match="foreign"):
        device.memory.reserve(foreign)
    with pytest.raises(InternalError, match="foreign"):
        device.memory.copy(foreign, Placement())


def test_where_an_adapter_lies_does_not_change_its_answers(tmp_path: Path) -> None:
    """The same adapter in one piece and scattered: bit for bit the same log-probabilities."""
    folder = tiny_models.make_checkpoint("llama", tmp_path / "model")
    shape = {"hidden_size": 64, "num_layers": 4, "gain": 0.3}
    for seed in range(4):
        write_random_adapter(tmp_path / f"a{seed}", kind="houlsby", seed=seed, reduction_factor=4, **shape)
    one_adapter = 4 * 2 * (2 * 16 * 64 + 64 + 64) * 4
    driver = Driver(folder, store=tmp_path / "store", arena_bytes=3 * one_adapter)
    first, second, third = (driver.add(tmp_path / f"a{seed}") for seed in range(3))
    prompt = list(range(3, 20))
    whole = Job(prompt, 4, adapter=second)
    driver.run(whole)
    for placed in (first, second, third):
        driver.remove(placed)
    write_random_adapter(tmp_path / "half", kind="pfeiffer", seed=0, reduction_factor=4, **shape)
    halves = [driver.add(tmp_path / "half") for _ in range(6)]
    for placed in halves[::2]:
        driver.remove(placed)
    pieces = driver.place(second.host)
    assert is_scattered(driver.memory, second.host, pieces.placement.slot)
    scattered = Job(prompt, 4, adapter=pieces)
    driver.run(scattered)
    assert scattered.sampled == whole.sampled
    driver.close()
