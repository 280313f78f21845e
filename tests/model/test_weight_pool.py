"""Weights side by side in the pool's memory."""

from itertools import pairwise

import pytest
import torch

from peftserve.model import weight_pool
from peftserve.model.weight_pool import WeightPool
from peftserve_kernels.nf4 import Nf4Weight


def test_what_is_kept_is_the_same_and_lies_in_cache_lines_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a block while there is room, then in another; what is larger than a block has one to itself."""
    monkeypatch.setattr(weight_pool, "_BLOCK_BYTES", 1 << 16)
    pool = WeightPool()
    weights = [
        torch.randn(shape).to(dtype)
        for shape in ((3, 5), (), (100, 64), (0, 4), (64, 600), (7,))
        for dtype in (torch.float32, torch.bfloat16, torch.int64)
    ]
    kept = [pool.keep(weight) for weight in weights]
    spans = []
    for weight, copy in zip(weights, kept, strict=True):
        assert (copy.dtype, copy.shape) == (weight.dtype, weight.shape)
        assert torch.equal(copy, weight)
        assert copy.is_contiguous()
        assert not copy.nbytes or (copy.data_ptr() != weight.data_ptr() and copy.data_ptr() % 64 == 0)
        spans.append((copy.data_ptr(), copy.data_ptr() + copy.nbytes))
    spans = sorted(span for span in spans if span[0] != span[1])
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "none overlap"


def test_a_weight_in_columns_is_laid_out_in_rows() -> None:
    weight = torch.randn(8, 3).t()
    kept = WeightPool().keep(weight)
    assert kept.is_contiguous()
    assert torch.equal(kept, weight)


def test_both_parts_of_an_nf4_weight_are_kept() -> None:
    weight = Nf4Weight(torch.randint(0, 255, (5, 64), dtype=torch.uint8), torch.rand(5, 2))
    weight = weight.padded().tiled()
    kept = WeightPool().keep_nf4(weight)
    assert (kept.layout, kept.shape, kept.padding) == (weight.layout, weight.shape, weight.padding)
    assert torch.equal(kept.packed, weight.packed)
    assert torch.equal(kept.absmax, weight.absmax)
    assert kept.packed.data_ptr() != weight.packed.data_ptr()


def test_what_lies_on_another_device_stays_there() -> None:
    weight = torch.empty(4, device="meta")
    assert WeightPool().keep(weight) is weight
