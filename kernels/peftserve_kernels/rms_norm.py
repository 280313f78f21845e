"""rms_norm: root-mean-square normalisation of the residual stream."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import elementwise as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    x: [M, D], weight: [D], both float32, bfloat16 or float16. Returns [M, D] in `out_dtype`, computed in float32 and
    rounded once. Not in place. Raises ValueError when the shapes do not fit.
    """
    if x.ndim != 2 or tuple(weight.shape) != (x.shape[1],):
        raise ValueError(f"x [M, D] and weight [D] do not fit: {list(x.shape)} and {list(weight.shape)}")
    return select(_IMPLEMENTATIONS, x.device)(x, weight, eps, out_dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """torch's own, in float32."""
    return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(out_dtype)


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor, Tensor, float, torch.dtype], Tensor]]] = {
    Backend.REFERENCE: rms_norm_reference,
    **native(cpu.rms_norm),
    **triton_op("elementwise", "rms_norm"),
}
