"""rms_norm, residual_add, silu_mul and embedding in Triton: one launch each, bound by memory."""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels.gpu.device import rounded
from peftserve_kernels.gpu.launch import launch

# The widest row that rms_norm keeps in registers between its sum and its product; wider ones are read twice.
_REGISTER_ROW: Final = 16384


class BlockChoice(NamedTuple):
    """`block` columns a program (or a step of it), a power of two."""

    block: int
    num_warps: int


def row_choice(columns: int) -> BlockChoice:
    """For a program that reduces a row of `columns`: 16 float32 a thread, at most 16 warps."""
    block = min(triton.next_power_of_2(columns), _REGISTER_ROW)
    return BlockChoice(block, min(max(block // 512, 1), 16))


def piece_choice(columns: int) -> BlockChoice:
    """For programs that each map a piece of a row: 8 elements a thread, up to 1024 columns a program."""
    block = min(triton.next_power_of_2(columns), 1024)
    return BlockChoice(block, max(block // 256, 1))


@triton.jit
def rms_norm_kernel(x, weight, out, eps, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * COLUMNS
    column = tl.arange(0, BLOCK)
    if COLUMNS <= BLOCK:
        inside = column < COLUMNS
        value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(value * value) / COLUMNS + eps)
        scaled = value * factor * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row + column, rounded(scaled, out.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, COLUMNS, BLOCK):
            value = tl.load(x + row + first + column, mask=first + column < COLUMNS, other=0.0).to(tl.float32)
            squares += value * value
        factor = tl.rsqrt(tl.sum(squares) / COLUMNS + eps)
        for first in range(0, COLUMNS, BLOCK):
            inside = first + column < COLUMNS
            value = tl.load(x + row + first + column, mask=inside, other=0.0).to(tl.float32)
            scaled = value * factor * tl.load(weight + first + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + row + first + column, rounded(scaled, out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """See `peftserve_kernels.rms_norm`. One program a row."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x, dtype=out_dtype)
    rows, columns = x.shape
    if x.numel():
        choice = row_choice(columns)
        launch(
            rms_norm_kernel,
            (rows,),
            x,
            weight,
            out,
            eps,
            COLUMNS=columns,
            BLOCK=choice.block,
            num_warps=choice.num_warps,
        )
    return out


_ADD_BLOCK: Final = 1024


@triton.jit
def residual_add_kernel(residual, hidden, out, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(residual + at, mask=inside, other=0.0)
    total += tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total, mask=inside)


def residual_add(residual: Tensor, hidden: Tensor, in_place: bool) -> Tensor:
    """See `peftserve_kernels.residual_add`. Raises ValueError when residual is not contiguous."""
    if not residual.is_contiguous():
        raise ValueError(f"residual: must be contiguous, got strides {list(residual.stride())}")
    out = residual if in_place else torch.empty_like(residual)
    elements = residual.numel()
    if elements:
        grid = (triton.cdiv(elements, _ADD_BLOCK),)
        launch(
            residual_add_kernel,
            grid,
            residual,
            hidden.contiguous(),
            out,
            elements,
            BLOCK=_ADD_BLOCK,
            num_warps=4,
        )
    return out


@triton.jit
def silu_mul_kernel(gate_up, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    source = gate_up + row * (2 * COLUMNS) + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + COLUMNS, mask=inside, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * COLUMNS + column, rounded(gated, out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `peftserve_kernels.silu_mul`."""
    gate_up = gate_up.contiguous()
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, columns)
    if out.numel():
        choice = piece_choice(columns)
        grid = (rows, triton.cdiv(columns, choice.block))
        launch(silu_mul_kernel, grid, gate_up, out, COLUMNS=columns, BLOCK=choice.block, num_warps=choice.num_warps)
    return out


@triton.jit
def embedding_kernel(ids, table, out, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    source = tl.load(ids + row).to(tl.int64) * COLUMNS
    value = tl.load(table + source + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * COLUMNS + column, value, mask=inside)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """See `peftserve_kernels.embedding`. Nothing checks that the ids are in the table."""
    ids, table = ids.contiguous(), table.contiguous()
    rows, columns = ids.shape[0], table.shape[1]
    out = torch.empty((rows, columns), dtype=torch.float32, device=table.device)
    if out.numel():
        choice = piece_choice(columns)
        grid = (rows, triton.cdiv(columns, choice.block))
        launch(embedding_kernel, grid, ids, table, out, COLUMNS=columns, BLOCK=choice.block, num_warps=choice.num_warps)
    return out
