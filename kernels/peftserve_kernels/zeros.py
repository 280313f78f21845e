"""Zeroed tensors that take memory only as they are written."""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros`; on the CPU the system gives a page of it when something is first written there.

    torch's own writes every byte. numpy's does not, but asks for huge pages, and of a table with many rows, each used
    from its beginning on, those are soon all there.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not nbytes:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(tuple(shape))
