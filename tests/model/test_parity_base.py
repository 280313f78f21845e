"""The bare base against transformers, each family: generated and teacher-forced, alone and together, in odd chunks."""

import random
from pathlib import Path

import pytest

from tests import tiny_models
from tests.model import oracle
from tests.model.driver import Driver, Job
from tests.model.parity import assert_parity, errors

LENGTHS = (1, 2, 7, 33, 61)
CHUNKS = ((), (1,), (3, 1), (5, 7, 2), (16, 9, 1, 30))
NUM_TOKENS = 12


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(3, tiny_models.VOCAB_SIZE), k=length) for length in LENGTHS]


@pytest.mark.parametrize("variant", tiny_models.CONFIGS)
def test_family(variant: str, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint(variant, tmp_path, seed=1)
    base = oracle.load_base(folder)
    driver = Driver(folder, page_size=4)
    together = [Job(p, NUM_TOKENS, chunks=c) for p, c in zip(prompts(seed=2), CHUNKS, strict=True)]
    driver.run(*together)
    for job in together:
        alone = Job(job.prompt, NUM_TOKENS)
        driver.run(alone)
        answer = oracle.judge(base, job.prompt, alone.token_ids)
        assert_parity(alone.sampled, answer)
        assert_parity(job.sampled, answer)

    text = random.Random(3).choices(range(3, tiny_models.VOCAB_SIZE), k=40)
    forced = Job(text[:9], len(text) - 9, forced=text[9:], chunks=(4,))
    driver.run(forced)
    assert max(errors(forced.sampled, oracle.judge(base, text[:9], text[9:]))) < 1e-3


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(page_size: int, tmp_path: Path) -> None:
    folder = tiny_models.make_checkpoint("mistral", tmp_path, seed=1)
    base = oracle.load_base(folder)
    driver = Driver(folder, page_size=page_size)
    jobs = [Job(p, NUM_TOKENS, chunks=c) for p, c in zip(prompts(seed=4), CHUNKS, strict=True)]
    driver.run(*jobs)
    for job in jobs:
        assert_parity(job.sampled, oracle.judge(base, job.prompt, job.token_ids))
