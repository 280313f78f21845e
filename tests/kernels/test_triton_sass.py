import pytest

from peftserve_kernels.gpu.sass import Instruction, count, load_bytes, loop_with, main_loop, parse

# A main loop with a wait inside it whose retry is out of line, behind the exit, as compilers place it; then a copy
# loop. The last jump is the endless one that pads every function.
LISTING = """
\t\tFunction : pipelined
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                /* 0x00000a00ff017b82 */
                                                                                         /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0xb0 ;                                            /* 0x0 */
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;        /* 0x0 */
        /*0030*/              @!P1 BRA 0xf0 ;                                            /* 0x0 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR8][R4.64], P2 ;      /* 0x0 */
        /*0050*/                   LDSM.16.M88.4 R8, [R10] ;                             /* 0x0 */
        /*0060*/                   HMMA.16816.F32.BF16 R12, R8, R20, R12 ;               /* 0x0 */
        /*0070*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24 ;        /* 0x0 */
        /*0080*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;                     /* 0x0 */
        /*0090*/                   ISETP.GE.AND P3, PT, R0, UR5, PT ;                    /* 0x0 */
        /*00a0*/               @P3 BRA 0x20 ;                                            /* 0x0 */
        /*00b0*/                   LDG.E.U8.CONSTANT R2, desc[UR8][R4.64] ;              /* 0x0 */
        /*00c0*/                   STG.E.64 desc[UR8][R6.64], R2 ;                       /* 0x0 */
        /*00d0*/                   BRA.U UP0, 0xb0 ;                                     /* 0x0 */
        /*00e0*/                   EXIT ;                                                /* 0x0 */
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;        /* 0x0 */
        /*0100*/              @!P1 BRA 0xf0 ;                                            /* 0x0 */
        /*0110*/                   BRA 0x40 ;                                            /* 0x0 */
        /*0120*/                   BRA 0x120;                                            /* 0x0 */
\t\t..........

\t\tFunction : straight
        /*0000*/                   LDL R1, [R2] ;                                        /* 0x0 */
        /*0010*/                   STL.64 [R2], R4 ;                                     /* 0x0 */
        /*0020*/                   EXIT ;                                                /* 0x0 */
        /*0030*/                   BRA 0x30;                                             /* 0x0 */
"""


def test_parse() -> None:
    functions = parse(LISTING)
    assert {name: len(instructions) for name, instructions in functions.items()} == {"pipelined": 19, "straight": 4}
    assert functions["pipelined"][1] == Instruction(0x10, "BRA", "0xb0", True)
    assert functions["pipelined"][13] == Instruction(0xD0, "BRA.U", "UP0, 0xb0", True)
    assert functions["pipelined"][4].base == "LDGSTS"
    assert functions["straight"][3] == Instruction(0x30, "BRA", "0x30", False)


def test_the_main_loop_has_its_waits_and_nothing_else() -> None:
    loop = main_loop(parse(LISTING)["pipelined"])
    assert [instruction.address for instruction in loop] == [*range(0x20, 0xB0, 0x10), 0xF0, 0x100, 0x110]


def test_counts() -> None:
    counts = count(main_loop(parse(LISTING)["pipelined"]))
    assert counts.total == 12
    assert counts.tensor == 2
    # an HGMMA is the work of four warps
    assert counts.tensor_macs == 16 * 8 * 16 + 64 * 32 * 16 // 4
    assert (counts.global_loads, counts.global_load_bytes, counts.shared_loads, counts.shuffles) == (1, 16, 1, 1)
    assert counts.local == 0
    assert count(parse(LISTING)["straight"]).local == 2


def test_loop_with_an_opcode() -> None:
    instructions = parse(LISTING)["pipelined"]
    assert [i.address for i in loop_with(instructions, "LDG.E.U8")] == [0xB0, 0xC0, 0xD0]
    assert loop_with(instructions, "LDG.E.128") == ()


def test_a_function_without_loops() -> None:
    assert main_loop(parse(LISTING)["straight"]) == ()


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.EF.128", 16), ("LDG.E.64.CONSTANT", 8), ("LDG.E", 4), ("LDG.E.U16.CONSTANT", 2), ("LDG.E.U8", 1)],
)
def test_load_bytes(opcode: str, size: int) -> None:
    assert load_bytes(Instruction(0, opcode, "", False)) == size
