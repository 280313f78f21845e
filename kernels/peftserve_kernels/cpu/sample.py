"""sample in C++: no sort of the vocabulary."""

import torch
from torch import Tensor

from peftserve_kernels.cpu.extension import ops
from peftserve_kernels.cpu.threads import threads


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """See `peftserve_kernels.sample`."""
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    logits = logits.contiguous()
    temperature, top_p, min_p = (x.float().contiguous() for x in (temperature, top_p, min_p))
    top_k, uniform = top_k.int().contiguous(), uniform.double().contiguous()
    ops.sample(
        logits.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        uniform.data_ptr(),
        ids.data_ptr(),
        rows,
        vocab,
        threads(),
    )
    return ids
