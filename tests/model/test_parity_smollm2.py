"""The embedded model, all kinds of adapter in one batch: float32 to the oracle's digits, bfloat16 to its own noise."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from peftserve_kernels.nf4_linear import why_no_int8_inputs
from tests.goldens.bottleneck.random_adapter import write_random_adapter
from tests.model import oracle
from tests.model.driver import Driver, Job
from tests.model.parity import Expected, assert_parity, errors, misses

logger = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    # PEFT 0.21 reads a property that transformers 5 has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

NUM_TOKENS = 8
MARGIN = 0.4
LORAS = ((1, "qv"), (4, "attention"), (8, "qv"), (16, "all"), (64, "all"))
PREFIXES = (1, 20, 100)
BOTTLENECKS = ("pfeiffer", "houlsby", "parallel")
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening before dusk, lit the lamp, and wrote the weather into a "
    "book that nobody but the inspector ever read. When the fog came in he sounded the horn once a minute until day.",
    "Photosynthesis turns light into chemical energy. Plants take carbon dioxide from the air and water from the soil, "
    "and give off oxygen. The sugar that they build feeds almost every other living thing on the planet.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n"
    "print([fibonacci(i) for i in range(10)])\n# [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]\n",
)


@dataclass(frozen=True)
class Adapters:
    """The folders of random adapters: those that PEFT can judge, and bottlenecks."""

    peft: tuple[Path, ...]
    bottleneck: tuple[Path, ...]


@pytest.fixture(scope="module")
def base(smollm2: Path) -> Any:
    return oracle.load_base(smollm2)


@pytest.fixture(scope="module")
def base_bf16(smollm2: Path) -> Any:
    return oracle.load_base(smollm2, torch.bfloat16)


@pytest.fixture(scope="module")
def texts(smollm2: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def adapters(base: Any, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    root = tmp_path_factory.mktemp("adapters")
    peft = [
        oracle.save_lora(base, root / f"lora-{rank}-{targets}", rank=rank, targets=targets, seed=rank, gain=0.05)
        for rank, targets in LORAS
    ]
    peft.append(oracle.save_lora(base, root / "dora", rank=8, targets="all", seed=9, gain=0.05, dora=True))
    context = [token for text in texts for token in text]
    peft += [oracle.save_prefix(base, root / f"prefix-{n}", num_tokens=n, seed=n, like=context) for n in PREFIXES]
    peft.append(oracle.save_prompt(base, root / "prompt", num_tokens=20, seed=1))
    for kind in BOTTLENECKS:
        write_random_adapter(root / kind, kind=kind, hidden_size=576, num_layers=30, seed=1, gain=0.02)
    return Adapters(tuple(peft), tuple(root / kind for kind in BOTTLENECKS))


def open_driver(
    folder: Path,
    dtype: torch.dtype,
    root: Path,
    adapter_dtype: torch.dtype | None = None,
    *,
    int8_activations: bool = False,
) -> Driver:
    return Driver(
        folder,
        dtype=dtype,
        page_size=16,
        store=root / "store",
        max_rank=288,
        arena_bytes=1 << 28,
        adapter_dtype=adapter_dtype,
        int8_activations=int8_activations,
    )


@pytest.fixture
def driver(smollm2: Path, tmp_path: Path) -> Iterator[Driver]:
    driver = open_driver(smollm2, torch.float32, tmp_path)
    yield driver
    driver.close()


def test_float32_all_kinds_in_one_batch(driver: Driver, base: Any, adapters: Adapters, texts: list[list[int]]) -> None:
    folders = [None, *adapters.peft, *adapters.bottleneck]
    placed = [driver.add(folder) if folder else None for folder in folders]
    jobs = [
        Job(texts[i % 3][: 9 + 3 * i], NUM_TOKENS, adapter=adapter, chunks=(4 + i, 1, 7))
        for i, adapter in enumerate(placed)
    ]
    assert len(jobs) == 14
    driver.run(*jobs)
    for folder, job in zip(folders, jobs, strict=True):
        if folder in adapters.bottleneck:
            continue
        with oracle.with_adapter(base, folder) as model:
            assert_parity(job.sampled, oracle.judge(model, job.prompt, job.token_ids))
    # Bottlenecks meet AdapterHub in test_parity_bottleneck; here they only must not change in company.
    for job in jobs[-len(BOTTLENECKS) :]:
        alone = Job(job.prompt, NUM_TOKENS, adapter=job.adapter)
        driver.run(alone)
        assert_parity(job.sampled, _as_expected(alone))


@pytest.mark.parametrize(
    ("adapter_dtype", "int8_activations", "limit", "margin"),
    [
        (torch.bfloat16, False, 1.0, MARGIN),
        (torch.int8, False, 1.0, MARGIN),
        pytest.param(
            *(torch.int8, True, 3.0, 1.0),
            marks=pytest.mark.skipif(
                why_no_int8_inputs(torch.device("cpu"), torch.bfloat16) is not None, reason="no int8 inputs here"
            ),
        ),
    ],
    ids=["bfloat16-adapters", "default", "int8-activations"],
)
def test_bfloat16_is_no_worse_than_transformers(
    adapter_dtype: torch.dtype,
    int8_activations: bool,
    limit: float,
    margin: float,
    smollm2: Path,
    base: Any,
    base_bf16: Any,
    adapters: Adapters,
    texts: list[list[int]],
    tmp_path: Path,
) -> None:
    """Teacher-forced, all in one batch: mean errors over the oracle's top five, ours and transformers' own in bf16.

    With int8 activations ours are three times as large at most.
    """
    folders = [None, *adapters.peft]
    driver = open_driver(smollm2, torch.bfloat16, tmp_path, adapter_dtype, int8_activations=int8_activations)
    jobs = [
        Job(text[:12], len(text) - 12, adapter=adapter, forced=text[12:], chunks=(5,))
        for adapter in [driver.add(folder) if folder else None for folder in folders]
        for text in texts
    ]
    driver.run(*jobs)
    driver.close()
    ours: list[float] = []
    theirs: list[float] = []
    for index, job in enumerate(jobs):
        folder = folders[index // len(texts)]
        with oracle.with_adapter(base, folder) as model:
            expected = oracle.judge(model, job.prompt, job.forced)
        with oracle.with_adapter(base_bf16, folder) as model:
            rival = oracle.continuation_logits(model, job.prompt, job.forced).double().log_softmax(dim=-1)
        ours += errors(job.sampled, expected)
        reported = rival.gather(1, torch.tensor(expected.top_ids))
        theirs += (reported - torch.tensor(expected.top_logprobs)).abs().flatten().tolist()
        assert misses(job.sampled, expected, margin) == []
    for name, found in (("ours", ours), ("transformers", theirs)):
        logger.info("%s: mean %.4f, p99 %.4f, %d values", name, np.mean(found), np.quantile(found, 0.99), len(found))
    assert np.mean(ours) <= limit * np.mean(theirs)


def _as_expected(job: Job) -> Expected:
    tops = [pick.logprobs.top[:5] for pick in job.sampled if pick.logprobs]
    return Expected(job.token_ids, [[t for t, _ in top] for top in tops], [[v for _, v in top] for top in tops])
