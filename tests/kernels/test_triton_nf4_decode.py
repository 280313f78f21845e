"""The blocked layout of NF4, and its decoding: the PTX by an emulator of its instructions, for every bit pattern."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from peftserve_kernels import NF4_CODE, Nf4Layout, Nf4Weight, dequantize_nf4
from peftserve_kernels.gpu.nf4_decode import LEVEL_SCALE, decode_asm, decode_words_portably, levels, portable_table
from peftserve_kernels.nf4 import BLOCKED_CODES
from tests.kernels.nf4_oracle import quantize

DTYPES = [torch.bfloat16, torch.float16]
_WORD = 0xFFFFFFFF


def _prmt(first: Tensor, second: Tensor, selector: Tensor) -> Tensor:
    """The default mode: nibble i of the selector names byte i of the result, its fourth bit asks for the sign alone."""
    source = [(word >> (8 * i)) & 0xFF for word in (first, second) for i in range(4)]
    choices = torch.stack([byte.expand_as(selector) for byte in source])
    result = torch.zeros_like(selector)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = choices.gather(0, (nibble & 7).unsqueeze(0)).squeeze(0)
        result |= torch.where(nibble & 8 != 0, (byte >> 7) * 0xFF, byte) << (8 * i)
    return result


_INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "add.u32": lambda a, b: (a + b) & _WORD,
    "shr.b32": lambda a, b: a >> b,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & _WORD,
    "prmt.b32": _prmt,
}


def emulate(asm: str, words: Tensor, lane: Tensor) -> list[Tensor]:
    """Run straight-line PTX on int64 words in $4; returns $0 to $3. Whatever it does not know is an error."""
    registers = {"$4": words, "%laneid": lane}

    def operand(text: str) -> Tensor:
        if re.fullmatch(r"0x[0-9a-f]{8}|\d+|0x[0-9a-f]{4}", text):
            return torch.tensor(int(text, 0)).expand_as(words)
        return registers[text]

    for line in asm.strip("{}\n").splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        if name == ".reg":
            continue
        target, *operands = rest.split(", ")
        registers[target] = _INSTRUCTIONS[name](*map(operand, operands))
    return [registers[f"${i}"] for i in range(4)]


def wanted(dtype: torch.dtype) -> Tensor:
    """Scaled level of each nibble, from bitsandbytes' table."""
    table = (torch.tensor(NF4_CODE) * LEVEL_SCALE[dtype]).to(dtype)
    return table[list(BLOCKED_CODES)]


def every_half() -> Tensor:
    """Words with every 16-bit pattern in the lower half and, in another order, in the upper one."""
    half = torch.arange(1 << 16)
    return half | half.flip(0) << 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ptx_decodes_every_pattern(dtype: torch.dtype) -> None:
    words = every_half()
    outputs = emulate(decode_asm(dtype), words, torch.arange(1 << 16) % 32)
    table = wanted(dtype)
    for i, output in enumerate(outputs):
        for half in (0, 1):
            bits = ((output >> (16 * half)) & 0xFFFF).to(torch.uint16).view(dtype)
            assert torch.equal(bits, table[(words >> (8 * i + 4 * half)) & 15])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ptx_reads_nothing_but_its_word(dtype: torch.dtype) -> None:
    """The registers that look variable are constants: the same results in every lane."""
    words = torch.randint(0, 1 << 32, (32,))
    first, *_ = [emulate(decode_asm(dtype), words, torch.full((32,), lane)) for lane in (0, 1, 2, 31)]
    for lane in range(32):
        outputs = emulate(decode_asm(dtype), words, torch.full((32,), lane))
        assert all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True))


def test_the_cost_of_a_word() -> None:
    """8 weights: 12 permutes and 7 others, four of which are sums in bf16. What defines `t...` is computed once."""
    for dtype, merge in ((torch.bfloat16, "add.u32"), (torch.float16, "xor.b32")):
        lines = decode_asm(dtype).strip("{}\n").splitlines()
        body = lines[next(i for i, line in enumerate(lines) if "$4" in line) :]
        names = [line.split()[0] for line in body]
        assert len(names) == 19
        assert (names.count("prmt.b32"), names.count(merge)) == (12, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_levels_are_nearer_than_unscaled_ones(dtype: torch.dtype) -> None:
    code = torch.tensor(NF4_CODE, dtype=torch.float64)

    def error(scale: float) -> float:
        return float(((code * scale).float().to(dtype).double() / scale - code).square().mean().sqrt())

    assert error(LEVEL_SCALE[dtype]) < 0.76 * error(1.0)


def test_float32_levels_are_exact() -> None:
    assert torch.equal(torch.tensor(levels(torch.float32)), torch.tensor(NF4_CODE)[list(BLOCKED_CODES)])


@triton.jit
def _decode(words, out, TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, 64)[:, None]
    block = tl.load(words + rows * 8 + tl.arange(0, 8)[None, :])
    values = decode_words_portably(block, out.dtype.element_ty, TABLE)
    tl.store(out + rows * 64 + tl.arange(0, 64)[None, :], values)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_the_portable_way_gives_the_same(dtype: torch.dtype) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (64, 8), dtype=torch.int32)
    out = torch.empty(64, 64, dtype=dtype)
    kernel: Any = _decode
    kernel[(1,)](words, out, TABLE=portable_table(dtype))
    codes = torch.stack([(words.long() >> (4 * p)) & 15 for p in range(8)], dim=2).view(64, 8, 4, 2)
    assert torch.equal(out, wanted(dtype)[codes.permute(0, 2, 1, 3).reshape(64, 64)])


@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (80, 576)])
def test_blocks_hold_the_same_weight(shape: tuple[int, int]) -> None:
    weight, oracle = quantize(torch.randn(shape))
    blocked = weight.blocked()
    assert blocked.layout is Nf4Layout.BLOCKS
    assert (blocked.shape, blocked.nbytes) == (weight.shape, weight.nbytes)
    assert blocked.blocked() is blocked
    back = blocked.row_major()
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.absmax, weight.absmax)
    assert torch.equal(dequantize_nf4(blocked), oracle)
    assert torch.equal(dequantize_nf4(Nf4Weight.cat([blocked, blocked])), torch.cat([oracle, oracle]))
    assert torch.equal(dequantize_nf4(blocked.rows(0, 16)), oracle[:16])
    assert torch.equal(weight.tiled().blocked().packed, blocked.packed)
    assert torch.equal(blocked.tiled().packed, weight.tiled().packed)


def test_the_order_in_a_block() -> None:
    weight, oracle = quantize(torch.randn(32, 128))
    blocked = weight.blocked()
    packed = blocked.packed.view(2, 2, 16, 8, 4)
    code = torch.tensor(NF4_CODE)[list(BLOCKED_CODES)]
    n, block, word, byte = 21, 1, 5, 2
    value = int(packed[n // 16, block, n % 16, word, byte])
    scale = blocked.absmax.view(2, 2, 16)[n // 16, block, n % 16]
    assert scale == weight.absmax[n, block]
    column = 64 * block + 16 * byte + 2 * word
    assert code[value & 15] * scale == oracle[n, column]
    assert code[value >> 4] * scale == oracle[n, column + 1]


def test_faults_of_blocks() -> None:
    weight, whole = quantize(torch.randn(24, 64))[0], quantize(torch.randn(32, 64))[0]
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        weight.blocked()
    with pytest.raises(ValueError, match="starts at a multiple of 16, got 8"):
        whole.blocked().rows(8, 24)
    with pytest.raises(ValueError, match="same K and layout"):
        Nf4Weight.cat([whole.blocked(), whole.tiled()])
