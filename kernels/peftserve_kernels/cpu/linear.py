"""linear_logits in C++."""

import torch
from torch import Tensor

from peftserve_kernels.cpu.extension import DTYPES, ops
from peftserve_kernels.cpu.tape import empty
from peftserve_kernels.cpu.threads import threads


def linear_logits(x: Tensor, weight: Tensor) -> Tensor:
    """See `peftserve_kernels.linear_logits`. The bits of a row of logits depend on that row of x alone."""
    (rows, columns), outputs = x.shape, weight.shape[0]
    if x.dtype != weight.dtype:
        x = x.float()
    x, weight = x.contiguous(), weight.contiguous()
    logits = empty((rows, outputs), torch.float32)
    ops.linear_logits(
        x.data_ptr(),
        weight.data_ptr(),
        logits.data_ptr(),
        DTYPES[x.dtype],
        DTYPES[weight.dtype],
        rows,
        columns,
        outputs,
        threads(),
    )
    return logits
