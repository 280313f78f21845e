"""linear_logits in Triton: float32 logits from bf16, fp16 or float32 operands.

The head reads N rows of the vocabulary for few tokens, so memory decides: W is the left operand of a product that is
padded to 8 tokens, and goes through a deep pipeline. Sums run over K in one chain, in the same steps for any M.
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.gpu.device import dot
from peftserve_kernels.gpu.launch import current_target, launch


class Config(NamedTuple):
    """The launch for up to `most_tokens`: BLOCK_M tokens by BLOCK_N rows of W by BLOCK_K."""

    most_tokens: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


_UNLIMITED: Final = 1 << 62

_TENSOR_CORES: Final = (
    Config(8, 8, 64, 128, 4, 4),
    Config(16, 16, 64, 128, 4, 4),
    Config(32, 32, 64, 128, 4, 3),
    Config(64, 64, 128, 64, 4, 3),
    Config(_UNLIMITED, 128, 128, 64, 8, 3),
)
# 64 KiB of shared memory, and no copies that bypass registers.
_CDNA: Final = (
    Config(16, 16, 64, 128, 4, 2),
    Config(64, 64, 64, 64, 4, 2),
    Config(_UNLIMITED, 128, 128, 32, 8, 2),
)
# No tensor cores, operands in registers: correct, not fast.
_FLOAT32: Final = (
    Config(16, 16, 64, 32, 4, 2),
    Config(_UNLIMITED, 32, 64, 32, 4, 2),
)


def launch_config(backend: str, dtype: torch.dtype, tokens: int) -> Config:
    """The launch on "cuda" or "hip" for so many tokens, at least 1, where operands are multiplied in `dtype`."""
    narrow = _CDNA if backend == "hip" else _TENSOR_CORES
    table = _FLOAT32 if dtype == torch.float32 else narrow
    return next(config for config in table if tokens <= config.most_tokens)


def linear_logits(x: Tensor, weight: Tensor) -> Tensor:
    """See `peftserve_kernels.linear_logits`. Operands of different dtypes are multiplied in float32."""
    tokens, columns = x.shape
    rows = weight.shape[0]
    logits = x.new_empty(tokens, rows, dtype=torch.float32)
    if not tokens or not rows:
        return logits
    if x.stride(1) != 1:
        x = x.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    dtype = x.dtype if x.dtype == weight.dtype else torch.float32
    config = launch_config(current_target(x.device).backend, dtype, tokens)
    launch(
        _logits,
        (-(-tokens // config.block_m), -(-rows // config.block_n)),
        x,
        weight,
        logits,
        tokens,
        rows,
        columns,
        x.stride(0),
        weight.stride(0),
        IN_FLOAT32=dtype == torch.float32,
        HAS_REST=columns % config.block_k != 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return logits


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    x,
    weight,
    logits,
    tokens,
    rows,
    columns,
    x_stride,
    weight_stride,
    IN_FLOAT32: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits = x W^T. HAS_REST: BLOCK_K does not divide K."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Past the end the last row is read again, so that loads need no mask; it is not stored.
    x_block = x + (tl.minimum(m, tokens - 1) * x_stride)[:, None] + k[None, :]
    weight_block = weight + (tl.minimum(n, rows - 1) * weight_stride)[:, None] + k[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, columns, BLOCK_K):
        if HAS_REST:
            is_inside = (k < columns - start)[None, :]
            weights = tl.load(weight_block, mask=is_inside, other=0.0)
            inputs = tl.load(x_block, mask=is_inside, other=0.0)
        else:
            weights = tl.load(weight_block)
            inputs = tl.load(x_block)
        if IN_FLOAT32:
            weights = weights.to(tl.float32)
            inputs = inputs.to(tl.float32)
        sums = dot(weights, tl.trans(inputs), sums)
        weight_block += BLOCK_K
        x_block += BLOCK_K
    is_inside = (m < tokens)[:, None] & (n < rows)[None, :]
    tl.store(logits + m[:, None] * rows + n[None, :], tl.trans(sums), mask=is_inside)
