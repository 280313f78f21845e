"""Weights side by side in one memory."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from peftserve.model.weight_memory import WeightMemory
from peftserve_kernels.nf4 import Nf4Weight

WEIGHTS = [
    torch.randn(shape).to(dtype)
    for shape in ((3, 5), (100, 64), (0, 4), (64, 600), (7,))
    for dtype in (torch.float32, torch.bfloat16, torch.uint8)
]


def _spans(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.nbytes)


@pytest.mark.parametrize("nbytes", [1 << 20, 1000, 0], ids=["as planned", "more than planned", "none planned"])
def test_what_is_kept_is_the_same_and_lies_in_cache_lines_of_its_own(nbytes: int) -> None:
    memory = WeightMemory(nbytes)
    kept = [memory.keep(weight) for weight in WEIGHTS]
    for weight, copy in zip(WEIGHTS, kept, strict=True):
        assert (copy.dtype, copy.shape) == (weight.dtype, weight.shape)
        assert torch.equal(copy, weight)
        assert not copy.nbytes or copy.data_ptr() % 64 == 0
    spans = _spans([*WEIGHTS, *kept])
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "none overlap, nor with what they came from"


def test_what_is_planned_is_one_piece() -> None:
    sizes = [-(-weight.nbytes // 64) * 64 for weight in WEIGHTS]
    memory = WeightMemory(sum(sizes))
    spans = _spans([memory.keep(weight) for weight in WEIGHTS])
    assert spans[-1][1] - spans[0][0] <= sum(sizes)


def test_parts_are_stacked_and_columns_laid_out_in_rows() -> None:
    weight = torch.randn(8, 3)
    assert torch.equal(WeightMemory(1000).keep(weight, weight[:2], weight[4:]), weight[[*range(8), 0, 1, 4, 5, 6, 7]])
    kept = WeightMemory(1000).keep(weight.t())
    assert kept.is_contiguous()
    assert torch.equal(kept, weight.t())


@pytest.mark.parametrize("rows", [(5,), (16, 32, 48)])
def test_nf4_weights_are_kept_as_one(rows: tuple[int, ...]) -> None:
    rowwise = [Nf4Weight(torch.randint(0, 255, (n, 64), dtype=torch.uint8), torch.rand(n, 2)) for n in rows]
    kept = WeightMemory(1 << 16).keep_nf4([weight.padded().tiled() for weight in rowwise])
    wanted = Nf4Weight.cat(rowwise)
    assert kept.shape == wanted.shape
    assert kept.packed.data_ptr() % 64 == 0
    whole = kept.row_major()
    assert torch.equal(whole.packed, wanted.packed)
    assert torch.equal(whole.absmax, wanted.absmax)


def test_what_lies_on_another_device_stays_there() -> None:
    weight = torch.empty(4, 2, device="meta")
    assert WeightMemory(0).keep(weight) is weight
    assert WeightMemory(0).keep(weight, weight).device.type == "meta"
