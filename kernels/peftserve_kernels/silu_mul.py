"""silu_mul: the gated activation of a Llama FFN."""

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor
from torch.nn import functional

from peftserve_kernels.cpu import elementwise as cpu
from peftserve_kernels.cpu.extension import native
from peftserve_kernels.dispatch import Backend, select, triton_op


def silu_mul(gate_up: Tensor) -> Tensor:
    """y = silu(gate) * up with silu(g) = g / (1 + e^-g) (SwiGLU, Shazeer 2020, arXiv:2002.05202).

    gate_up: [M, 2 I], gate in the first I columns, up in the others; float32, bfloat16 or float16. Returns [M, I] in
    the same dtype, computed in float32 and rounded once. Not in place. Raises ValueError when the width is odd.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: must be [M, 2 I], got {list(gate_up.shape)}")
    return select(_IMPLEMENTATIONS, gate_up.device)(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Both halves upcast to float32."""
    gate, up = gate_up.chunk(2, dim=1)
    return (functional.silu(gate.float()) * up).to(gate_up.dtype)


_IMPLEMENTATIONS: Final[Mapping[Backend, Callable[[Tensor], Tensor]]] = {
    Backend.REFERENCE: silu_mul_reference,
    **native(cpu.silu_mul),
    **triton_op("elementwise", "silu_mul"),
}
