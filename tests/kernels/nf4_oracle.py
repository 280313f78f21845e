"""NF4 by bitsandbytes: the oracle for the format."""

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from torch import Tensor

from peftserve_kernels import Nf4Weight


def quantize(dense: Tensor) -> tuple[Nf4Weight, Tensor]:
    """A float32 [N, K] matrix through bitsandbytes' NF4 with nested absmax: our weight, and its dequantised float32."""
    packed, state = quantize_4bit(dense, blocksize=64, compress_statistics=True, quant_type="nf4")
    return _flatten(packed, state, dense.shape), dequantize_4bit(packed, state)


def _flatten(packed: Tensor, state: QuantState, shape: torch.Size) -> Nf4Weight:
    rows, columns = shape
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return Nf4Weight(packed.view(rows, columns // 2), absmax.float().view(rows, columns // 64))
