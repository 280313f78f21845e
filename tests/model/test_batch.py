"""Plans as tensors: every token's position and KV slot, against the definition."""

import random

import pytest
import torch

from peftserve.engine.plan import Row, SampleSpec, SegmentPlan, StepPlan, segments
from peftserve.model.batch import build_batch
from peftserve.types import AdapterKind, SamplingParams

CPU = torch.device("cpu")
SAMPLE = SampleSpec(SamplingParams(max_tokens=1), 0, 0)


def random_plan(seed: int, page_size: int) -> StepPlan:
    rng = random.Random(seed)
    rows = []
    for index in range(rng.randint(1, 9)):
        tokens = rng.choices(range(100), k=rng.choice([1, 1, 2, 17]))
        computed = rng.randrange(40)
        pages = -(-(computed + len(tokens)) // page_size) + rng.randrange(3)
        rows.append(
            Row(
                request_id=str(index),
                kind=rng.choice(list(AdapterKind)),
                slot=rng.randrange(2),
                token_ids=tokens,
                num_computed=computed,
                block_table=rng.sample(range(200), pages),
                sample=rng.choice([None, SAMPLE]),
            )
        )
    rows.sort(key=lambda row: (list(AdapterKind).index(row.kind), row.slot))
    lora, bottleneck = (segments(rows, kind) for kind in (AdapterKind.LORA, AdapterKind.BOTTLENECK))
    return StepPlan(step=seed, rows=tuple(rows), lora=lora, bottleneck=bottleneck)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seed", range(12))
def test_every_token_is_where_the_plan_says(seed: int, page_size: int) -> None:
    plan = random_plan(seed, page_size)
    batch = build_batch(plan, page_size, CPU)
    token = 0
    last = []
    for index, row in enumerate(plan.rows):
        assert int(batch.attention.query_start[index]) == token
        assert int(batch.attention.context_len[index]) == row.num_computed + row.num_tokens
        assert batch.attention.block_tables[index, : len(row.block_table)].tolist() == list(row.block_table)
        for offset, token_id in enumerate(row.token_ids):
            position = row.num_computed + offset
            assert int(batch.token_ids[token]) == token_id
            assert int(batch.positions[token]) == position
            page = row.block_table[position // page_size]
            assert int(batch.slots[token]) == page * page_size + position % page_size
            token += 1
        if row.sample:
            last.append(token - 1)
    assert int(batch.attention.query_start[-1]) == token == plan.num_tokens
    sampling = list(range(token)) if batch.sample_rows is None else batch.sample_rows.tolist()
    assert sampling == last


def test_segments_are_there_only_when_something_uses_them() -> None:
    row = Row("a", AdapterKind.LORA, 3, [1, 2], 0, [0], None)
    bare = build_batch(StepPlan(1, (row,)), 16, CPU)
    assert bare.lora is None
    assert bare.bottleneck is None
    plan = StepPlan(1, (row,), lora=SegmentPlan((0, 2), (3,)))
    with_lora = build_batch(plan, 16, CPU)
    assert with_lora.lora is not None
    assert with_lora.lora.bounds == ((0, 2, 3),)
    assert with_lora.bottleneck is None
