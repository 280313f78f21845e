"""The promise that a request's output never depends on its neighbours, held bit for bit on the native CPU kernels.

The same requests run alone on a roomy engine, then together on engines with random token budgets, arrival orders, page
pressure (so that some are preempted), warm and cold prefix caches and thread counts. Tokens and log-probabilities, as
exact floats, must be equal.
"""

import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftserve.adapters.blobs import adapters_root
from peftserve.adapters.store import AdapterStore
from peftserve.config import EngineConfig
from peftserve.engine.build import build_engine
from peftserve.engine.core import EngineCore
from peftserve.engine.messages import AddRequest
from peftserve.model.config_reader import read_spec
from peftserve.types import AdapterKind, AdapterRef, EngineRequest, SamplingParams, TokenLogprobs
from peftserve_kernels.cpu.extension import HAS_NATIVE
from peftserve_kernels.cpu.threads import set_threads
from peftserve_kernels.nf4_linear import why_no_int8_inputs
from tests.goldens.bottleneck.random_adapter import write_random_adapter
from tests.model import oracle

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the references are exact, but not bit for bit")

Answer = list[TokenLogprobs]
NUM_REQUESTS = 14
MAX_TOKENS = 10


class Fleet:
    """Requests for the base and adapters of every kind, and their answers when each runs alone."""

    def __init__(self, checkpoint: Path, data_dir: Path, *, int8_activations: bool) -> None:
        self.checkpoint = checkpoint
        self.data_dir = data_dir
        self.int8_activations = int8_activations
        refs = [None, *self._publish()]
        rng = random.Random(3)
        shared = [rng.randrange(3, 300) for _ in range(40)]
        self.requests = [
            EngineRequest(
                id=f"r{index}",
                # Some prompts begin alike, so that the prefix cache answers for a part of them.
                prompt_token_ids=shared[: 13 * (index % 4)]
                + [rng.randrange(3, 300) for _ in range(1 + 5 * (index % 5))],
                sampling=SamplingParams(
                    max_tokens=MAX_TOKENS,
                    temperature=0.0 if index % 2 else 0.9,
                    top_p=0.95,
                    seed=index,
                    repetition_penalty=1.1,
                    logprobs=4,
                    ignore_eos=True,
                ),
                adapter=refs[index % len(refs)],
            )
            for index in range(NUM_REQUESTS)
        ]
        self.alone = {}
        core = self.core()
        for request in self.requests:
            self.alone |= self.run(core, [request])
        core.adapters.close()

    def _publish(self) -> list[AdapterRef]:
        """Two LoRAs, a DoRA, two prefixes, a prompt and two bottlenecks in the store."""
        base = oracle.load_base(self.checkpoint)
        folders = [
            oracle.save_lora(base, self.data_dir / "lora-3", rank=3, targets="attention", seed=1),
            oracle.save_lora(base, self.data_dir / "lora-16", rank=16, targets="all", seed=2),
            oracle.save_lora(base, self.data_dir / "dora-9", rank=9, targets="all", seed=3, dora=True),
        ]
        for length in (5, 21):
            base = oracle.load_base(self.checkpoint)
            folders.append(oracle.save_prefix(base, self.data_dir / f"prefix-{length}", num_tokens=length, seed=length))
        base = oracle.load_base(self.checkpoint)
        folders.append(oracle.save_prompt(base, self.data_dir / "prompt", num_tokens=7, seed=5))
        spec = read_spec(self.checkpoint)
        for kind in ("pfeiffer", "houlsby"):
            folder = self.data_dir / kind
            write_random_adapter(
                folder, kind=kind, hidden_size=spec.hidden_size, num_layers=spec.num_layers, seed=4, gain=0.5
            )
            folders.append(folder)
        store = AdapterStore(adapters_root(self.data_dir), spec)
        refs = []
        for folder in folders:
            with store.new_upload("default", folder.name) as upload:
                upload.write_config((folder / "adapter_config.json").read_bytes())
                upload.write_weights(next(folder.glob("adapter*.safetensors")).read_bytes())
                refs.append(upload.commit().ref)
        store.close()
        return refs

    def core(self, **values: object) -> EngineCore:
        """An engine on the checkpoint in bf16."""
        config = EngineConfig.model_validate(
            {
                "data_dir": self.data_dir,
                "page_size": 4,
                "kv_cache_bytes": "4MiB",
                "adapter_device_bytes": "4MiB",
                "int8_activations": self.int8_activations,
            }
            | values
        )
        return build_engine(config, self.checkpoint, lambda: None)[0]

    def run(self, core: EngineCore, requests: list[EngineRequest], late: int = 0) -> dict[str, Answer]:
        """Answers by id. The last `late` requests arrive one a step while the others run."""
        answers: dict[str, Answer] = {request.id: [] for request in requests}
        pending = list(requests)
        for _ in range(len(requests) - late):
            core.handle(AddRequest(request=pending.pop(0)))
        unfinished = set(answers)
        deadline = time.monotonic() + 120
        while unfinished:
            if pending:
                core.handle(AddRequest(request=pending.pop(0)))
            for event in core.step().events:
                answers[event.request_id] += event.logprobs
                if event.finish_reason:
                    assert event.error is None, event.error
                    unfinished.discard(event.request_id)
            assert time.monotonic() < deadline, "the engine made no progress"
        return answers


@pytest.fixture(scope="module", params=[False, True], ids=["default", "int8"])
def fleet(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    if request.param and (reason := why_no_int8_inputs(torch.device("cpu"), torch.bfloat16)):
        pytest.skip(f"int8 activations: {reason}")
    return Fleet(tiny_checkpoint, tmp_path_factory.mktemp("fleet"), int8_activations=request.param)


def test_the_fleet_covers_every_kind_and_generates(fleet: Fleet) -> None:
    kinds = {request.adapter.kind if request.adapter else AdapterKind.BASE for request in fleet.requests}
    assert kinds == set(AdapterKind)
    assert all(len(answer) == MAX_TOKENS for answer in fleet.alone.values())
    greedy = {tuple(t.token_id for t in fleet.alone[f"r{index}"]) for index in range(1, NUM_REQUESTS, 2)}
    assert len(greedy) > 4, "the requests are too much alike to prove anything"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(NUM_REQUESTS)),
    max_batch_tokens=st.sampled_from([3, 7, 16, 64, 512]),
    max_num_seqs=st.sampled_from([2, 5, 14]),
    num_pages=st.sampled_from([48, 80, 400]),
    late=st.integers(0, NUM_REQUESTS - 1),
    threads=st.sampled_from([1, 2, 3]),
    prefix_caching=st.booleans(),
    eager=st.booleans(),
)
def test_output_bits_do_not_depend_on_company(
    fleet: Fleet,
    order: list[int],
    max_batch_tokens: int,
    max_num_seqs: int,
    num_pages: int,
    late: int,
    threads: int,
    prefix_caching: bool,
    eager: bool,
) -> None:
    page_bytes = read_spec(fleet.checkpoint).kv_page_bytes(4, 2)
    core = fleet.core(
        max_batch_tokens=max_batch_tokens,
        max_num_seqs=max_num_seqs,
        kv_cache_bytes=num_pages * page_bytes,
        prefix_caching=prefix_caching,
        threads=threads,
        eager=eager,
    )
    try:
        for _ in range(2):  # the second time with a warm cache
            answers = fleet.run(core, [fleet.requests[index] for index in order], late)
            for request_id, answer in answers.items():
                assert answer == fleet.alone[request_id], request_id
    finally:
        core.adapters.close()
        set_threads(1)


def test_preemption_changes_no_bit(fleet: Fleet) -> None:
    page_bytes = read_spec(fleet.checkpoint).kv_page_bytes(4, 2)
    core = fleet.core(kv_cache_bytes=44 * page_bytes, prefix_caching=False)
    requests = [request for request in fleet.requests if request.adapter is None or request.adapter.kind != "prefix"]
    for _ in range(2):
        before = core.scheduler.preemptions
        answers = fleet.run(core, requests)
        assert answers == {request.id: fleet.alone[request.id] for request in requests}
    # The first time requests may trickle in as their adapters are loaded; the second time all compete for pages.
    assert core.scheduler.preemptions > before
    core.adapters.close()
