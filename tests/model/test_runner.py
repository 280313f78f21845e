"""The runner as the engine sees it: a plan in, a result out."""

from pathlib import Path

import pytest
import torch

from peftserve.engine.plan import PageCopy, Row, SampleSpec, StepPlan
from peftserve.errors import InternalError
from peftserve.types import AdapterKind, SamplingParams
from tests import tiny_models
from tests.model.driver import GREEDY, Driver, Job

PROMPT = [5, 9, 300, 17, 42, 8, 8, 100, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def driver(folder: Path) -> Driver:
    return Driver(folder, page_size=4)


def row(name: str, token_ids: list[int], computed: int, table: list[int], *, sample: bool = True) -> Row:
    spec = SampleSpec(GREEDY, 0, 0) if sample else None
    return Row(name, AdapterKind.BASE, 0, token_ids, computed, table, spec)


def test_an_empty_plan_is_a_bug_of_the_caller(driver: Driver) -> None:
    with pytest.raises(InternalError, match="step 7 has no rows"):
        driver.runner.execute(StepPlan(7, ()))


def test_only_rows_with_a_sample_are_in_the_result(driver: Driver) -> None:
    rows = (row("a", PROMPT, 0, [0, 1, 2]), row("b", PROMPT[:4], 0, [3, 4, 5], sample=False))
    result = driver.runner.execute(StepPlan(1, rows))
    assert (result.step, result.sampled.keys()) == (1, {"a"})
    assert driver.runner.execute(StepPlan(2, (row("b", PROMPT[4:8], 4, [3, 4, 5], sample=False),))).sampled == {}
    finished = driver.runner.execute(StepPlan(3, (row("b", PROMPT[8:], 8, [3, 4, 5]),)))
    assert finished.sampled["b"].token_id == result.sampled["a"].token_id


def test_pages_are_copied_before_the_step_computes(driver: Driver) -> None:
    """A second request takes over six positions of the first: one whole page shared, half a page copied."""
    first = driver.runner.execute(StepPlan(1, (row("a", PROMPT, 0, [0, 1, 2]),)))
    second = driver.runner.execute(
        StepPlan(2, (row("b", PROMPT[6:], 6, [0, 7, 8]),), page_copies=(PageCopy(src=1, dst=7, num_tokens=2),))
    )
    assert second.sampled["b"].token_id == first.sampled["a"].token_id
    assert torch.equal(driver.kv.k[:, 7, :, :2], driver.kv.k[:, 1, :, :2])


def test_stale_kv_pages_have_no_influence(folder: Path) -> None:
    clean, dirty = Driver(folder, page_size=4), Driver(folder, page_size=4)
    dirty.kv.k.fill_(float("nan"))
    dirty.kv.v.fill_(float("nan"))
    jobs = [Job(PROMPT, 4, chunks=(2, 3)) for _ in range(2)]
    clean.run(jobs[0])
    dirty.run(jobs[1])
    assert jobs[0].sampled == jobs[1].sampled


def test_a_seed_gives_the_same_tokens_alone_and_in_company(driver: Driver) -> None:
    params = SamplingParams(max_tokens=99, temperature=1.2, top_p=0.95)

    def job() -> Job:
        return Job(PROMPT, 20, params=params, seed=1234)

    alone, together = job(), job()
    driver.run(alone)
    driver.run(*(Job(PROMPT[i:], 20, params=params, seed=i, chunks=(1, i)) for i in range(1, 8)), together)
    assert together.token_ids == alone.token_ids
    other = Job(PROMPT, 20, params=params, seed=1235)
    driver.run(other)
    assert other.token_ids != alone.token_ids


def test_the_last_position_of_the_context_is_usable(folder: Path) -> None:
    driver = Driver(folder, page_size=4, max_context=len(PROMPT) + 3)
    job = Job(PROMPT, 4)
    driver.run(job)
    assert len(job.token_ids) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_near_float32(folder: Path, dtype: torch.dtype) -> None:
    exact, narrow = Job(PROMPT, 1), Job(PROMPT, 1)
    Driver(folder).run(exact)
    Driver(folder, dtype=dtype).run(narrow)
    assert exact.sampled[0].logprobs is not None
    assert narrow.sampled[0].logprobs is not None
    reported = dict(narrow.sampled[0].logprobs.top)
    for token, value in exact.sampled[0].logprobs.top[:5]:
        assert reported[token] == pytest.approx(value, abs=0.2)
