"""NF4 nibbles to bf16 or fp16 in registers: the look-up by byte permutes, and the same in plain Triton.

A 4-byte word of `Nf4Layout.BLOCKS` holds the 8 weights that one thread multiplies in four 16x16x16 products. `prmt`
picks four bytes at a time out of eight: half of one byte plane of the sixteen levels. So `BLOCKED_CODES` pairs the
levels (nibbles i and i + 8) such that the other half is one more `prmt` and a sum: the smaller byte of the pair by the
nibble's lower three bits, plus the difference, which `prmt` replaces by its sign, 0, where the fourth bit is set. That
needs differences below 128, hence the two of a pair share their sign and the top bit of the lower byte. 8 weights take
12 `prmt` and 7 cheap operations, of which the four sums run on the multipliers (bf16; fp16 has exclusive ors instead).

The levels are scaled by a constant before they are rounded, and sums are divided by it: unscaled, no such pairs exist
for fp16. Of the scales that allow them, these have small rounding errors: 3/4 (bf16) and 2/3 (fp16) of the unscaled
levels' (root mean square).
"""

from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl

from peftserve_kernels.capture import unguarded
from peftserve_kernels.nf4 import BLOCKED_CODES, NF4_CODE

LEVEL_SCALE: Final = {torch.bfloat16: 1.749755859375, torch.float16: 1.2685546875, torch.float32: 1.0}
"""What the levels of each dtype are multiplied by."""


@cache
def levels(dtype: torch.dtype) -> tuple[float, ...]:
    """The scaled and rounded level of each nibble."""
    with unguarded():  # constants of the program, also when a capture is the first to ask
        code = torch.tensor(NF4_CODE, device="cpu")[list(BLOCKED_CODES)]
        return tuple((code * LEVEL_SCALE[dtype]).to(dtype).tolist())


@cache
def portable_table(dtype: torch.dtype) -> tuple[float, ...] | tuple[int, ...]:
    """What `decode_words_portably` looks levels up in: 16 numbers, or four as the 16-bit parts of each int64."""
    if dtype == torch.float32:
        return levels(dtype)
    with unguarded():
        return tuple(torch.tensor(levels(dtype), dtype=dtype).view(torch.int64).tolist())


def _level_words(dtype: torch.dtype) -> list[int]:
    """The level's 16 bits. Zero's sign is its partner's."""
    values = torch.tensor(levels(dtype), dtype=dtype)
    words = [word & 0xFFFF for word in values.view(torch.int16).tolist()]
    return [0x8000 if word == 0 else word for word in words]


@cache
def decode_asm(dtype: torch.dtype) -> str:
    """PTX for one word, $4, to four registers of two values each: nibbles 0 and 1, 2 and 3, 4 and 5, 6 and 7."""
    words = _level_words(dtype)
    partners = list(zip(words[:8], words[8:], strict=True))
    pairs = [((low & 0xFF, high & 0xFF), (low >> 8, high >> 8)) for low, high in partners]
    planes = [[pair[plane] for pair in pairs] for plane in (0, 1)]
    if any((low ^ high) > 127 for plane in planes for low, high in plane):
        raise AssertionError(f"{dtype}: the levels of a pair differ in the top bit of a byte")
    # A sum may run on the multipliers, an exclusive or may not, but only a sum of bytes that never carries is one.
    adds = all(low >= high for plane in planes for low, high in plane)
    merge = "add.u32" if adds else "xor.b32"
    tables: list[int] = []
    for plane in planes:
        tables += _table([high for _, high in plane])
        tables += _table([low - high if adds else low ^ high for low, high in plane])
    # `prmt` takes only one constant, and ptxas would move the other into a register again and again. Registers that
    # it cannot see to be constant (i * i + i is even) are computed once, before the loop.
    lines = [
        ".reg .b32 zero, low, upper, upper_low, a, b, c, d, t<4>;",
        "mov.u32 zero, %laneid;",
        "mad.lo.u32 zero, zero, zero, zero;",
        "and.b32 zero, zero, 1;",
    ]
    firsts = []
    for i, table in enumerate(tables[::2]):
        firsts.append(f"t{i}" if table else "0x00000000")
        if table:
            lines.append(f"xor.b32 t{i}, zero, 0x{table:08x};")
    lines += ["and.b32 low, $4, 0x77777777;", "shr.b32 upper, $4, 16;", "shr.b32 upper_low, low, 16;"]
    for outputs, nibbles, lower_bits in ((("$0", "$1"), "$4", "low"), (("$2", "$3"), "upper", "upper_low")):
        selectors = (lower_bits, nibbles, lower_bits, nibbles)
        for out, first, second, selector in zip("abcd", firsts, tables[1::2], selectors, strict=True):
            lines.append(f"prmt.b32 {out}, {first}, 0x{second:08x}, {selector};")
        lines += [f"{merge} a, a, b;", f"{merge} c, c, d;"]
        lines += [f"prmt.b32 {outputs[0]}, a, c, 0x5140;", f"prmt.b32 {outputs[1]}, a, c, 0x7362;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _table(entries: list[int]) -> list[int]:
    """Eight bytes as the two words that `prmt` picks from."""
    return [int.from_bytes(bytes(entries[start : start + 4]), "little") for start in (0, 4)]


_BF16_ASM = tl.constexpr(decode_asm(torch.bfloat16))
_FP16_ASM = tl.constexpr(decode_asm(torch.float16))
_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r")
_BF16 = tl.constexpr((tl.bfloat16,) * 4)
_FP16 = tl.constexpr((tl.float16,) * 4)


@triton.jit
def decode_words(words, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int16 [N, 16], blocks of 64 weights, to their scaled levels [N, 64] in DTYPE, bf16 or fp16."""
    if DTYPE.is_bf16():
        a, b, c, d = tl.inline_asm_elementwise(_BF16_ASM, _CONSTRAINTS, [words], _BF16, is_pure=True, pack=2)
    else:
        a, b, c, d = tl.inline_asm_elementwise(_FP16_ASM, _CONSTRAINTS, [words], _FP16, is_pure=True, pack=2)
    return _beside(_beside(a, b), _beside(c, d))


@triton.jit
def _beside(a, b):  # type: ignore[no-untyped-def]
    """[N, C] and [N, C] as [N, 2 C]; the compiler renames registers, nothing moves."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def decode_words_portably(words, DTYPE: tl.constexpr, TABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [N, 8] to [N, 64] in DTYPE, as `decode_words`, or float32; TABLE is `portable_table` of that dtype."""
    nibbles = (words[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
    nibbles = tl.permute(tl.reshape(nibbles, (words.shape[0], 8, 4, 2)), (0, 2, 1, 3))
    nibbles = tl.reshape(nibbles, (words.shape[0], 64))
    upper = nibbles & 8 != 0
    # Not an early return: the compiler goes on behind one.
    if DTYPE.is_fp32():
        found = tl.where(upper, _one_of_eight(nibbles, TABLE[8:16]), _one_of_eight(nibbles, TABLE[0:8]))
    else:
        odd = nibbles & 4 != 0
        # Two conditions a weight: with the four of a tree of choices an AMD wave runs out of scalar registers.
        four = tl.where(upper, tl.where(odd, TABLE[3], TABLE[2]), tl.where(odd, TABLE[1], TABLE[0]))
        found = (four >> ((nibbles & 3) * 16).to(tl.int64)).to(tl.int16).to(DTYPE, bitcast=True)
    return found


@triton.jit
def _one_of_eight(index, VALUES: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 VALUES[index & 7]."""
    odd = index & 1 != 0
    a = tl.where(odd, VALUES[1], VALUES[0])
    b = tl.where(odd, VALUES[3], VALUES[2])
    c = tl.where(odd, VALUES[5], VALUES[4])
    d = tl.where(odd, VALUES[7], VALUES[6])
    second = index & 2 != 0
    return tl.where(index & 4 != 0, tl.where(second, d, c), tl.where(second, b, a))
