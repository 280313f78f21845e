"""What the tests of the native CPU kernels share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from peftserve_kernels.cpu import threads as native_threads
from peftserve_kernels.cpu.extension import supported_isas, use_isa

ISAS = supported_isas() or (pytest.param("none", marks=pytest.mark.skip("the extension is not built")),)
"""To parametrise with: every instruction set that this machine can run."""

THREADS = (1, 2, 3)


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Native ops on `name`, then on the best one again."""
    use_isa(name)
    try:
        yield
    finally:
        use_isa(supported_isas()[0])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = native_threads.threads()
    native_threads.set_threads(count)
    try:
        yield
    finally:
        native_threads.set_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits: NaN equals itself, and 0 differs from -0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def check_rows_alone(whole: Tensor, rows: Callable[[int, int], Tensor], cuts: list[tuple[int, int]]) -> None:
    """`rows(start, end)` computes a part of the batch: the same bits as in the whole, at any number of threads."""
    for start, end in cuts:
        for count in THREADS:
            with threads(count):
                assert same_bits(rows(start, end), whole[start:end]), f"rows {start}..{end}, {count} threads"
