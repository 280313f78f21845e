"""Read a kernel's machine code (`cuobjdump -sass`): its loops, and what one turn of the main loop costs.

Loops are natural loops of the control-flow graph (Aho et al., Compilers, 9.6.6): an edge back to a block that dominates
its origin. Compilers move rare paths out of line, so that a jump to a lower address alone says nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

_FUNCTION: Final = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION: Final = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;")
_PREDICATE: Final = re.compile(r"^@(!?)(U?P(?:\d+|T))\s+")
_TARGET: Final = re.compile(r"0x([0-9a-f]+)\s*$")


class Instruction(NamedTuple):
    """One instruction: its address, its opcode with all suffixes, and its operands as they are printed."""

    address: int
    opcode: str
    operands: str
    is_conditional: bool

    @property
    def base(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions by kind. tensor: matrix products (HMMA, HGMMA, UTCHMMA, ...). tensor_macs: the multiply-adds that
    those of a printed shape do, a warp's share."""

    total: int = 0
    tensor: int = 0
    tensor_macs: int = 0
    global_loads: int = 0
    global_load_bytes: int = 0
    shared_loads: int = 0
    shared_stores: int = 0
    shuffles: int = 0
    local: int = 0


_TENSOR: Final = frozenset(
    ("HMMA", "IMMA", "DMMA", "BMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
)
_GLOBAL_LOADS: Final = frozenset(("LDG", "LDGSTS", "UTMALDG", "UBLKCP"))
_SHARED_LOADS: Final = frozenset(("LDS", "LDSM"))
_SHARED_STORES: Final = frozenset(("STS", "STSM"))
_LOCAL: Final = frozenset(("LDL", "STL"))
_ENDS: Final = frozenset(("EXIT", "RET", "KILL", "BPT"))
_JUMPS: Final = frozenset(("BRA", "JMP"))


def parse(listing: str) -> dict[str, tuple[Instruction, ...]]:
    """The functions of a `cuobjdump -sass` listing, by name as printed."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        if function := _FUNCTION.match(line):
            current = functions.setdefault(function[1], [])
        elif instruction := _INSTRUCTION.match(line):
            text = instruction[2]
            predicate = _PREDICATE.match(text)
            opcode, _, operands = text[predicate.end() if predicate else 0 :].partition(" ")
            # BRA also takes its condition as an operand: `BRA P0, 0x340`, `BRA.U !UP0, 0x340`, `BRA.DIV ~URZ, 0x9c0`
            is_conditional = predicate is not None or (opcode.partition(".")[0] in _JUMPS and "," in operands)
            current.append(Instruction(int(instruction[1], 16), opcode, operands.strip(), is_conditional))
    return {name: tuple(instructions) for name, instructions in functions.items()}


def count(instructions: Iterable[Instruction]) -> Counts:
    """What kinds of instructions there are."""
    bases: dict[str, int] = {}
    macs = loaded = total = 0
    for instruction in instructions:
        total += 1
        base = instruction.base
        bases[base] = bases.get(base, 0) + 1
        if base in _TENSOR:
            macs += _macs(instruction.opcode) // (4 if base.endswith("GMMA") else 1)
        elif base in ("LDG", "LDGSTS"):
            loaded += load_bytes(instruction)

    def number(kinds: frozenset[str]) -> int:
        return sum(amount for base, amount in bases.items() if base in kinds)

    return Counts(
        total=total,
        tensor=number(_TENSOR),
        tensor_macs=macs,
        global_loads=number(_GLOBAL_LOADS),
        global_load_bytes=loaded,
        shared_loads=number(_SHARED_LOADS),
        shared_stores=number(_SHARED_STORES),
        shuffles=bases.get("SHFL", 0),
        local=number(_LOCAL),
    )


def load_bytes(instruction: Instruction) -> int:
    """What a load brings a thread."""
    for suffix, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if suffix in instruction.opcode.split("."):
            return size
    return 4


def _macs(opcode: str) -> int:
    """Of `HMMA.16816...` by a warp and of `HGMMA.64x128x16...` by four; 0 where the shape is not printed."""
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
        return int(shape[1]) * int(shape[2]) * int(shape[3])
    if shape := re.search(r"\.(16|8)(8)(4|8|16|32|64)(?:\.|$)", opcode):
        return int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0


def main_loop(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """The loop that does most of the work: matrix products, then loads, that are in no loop inside it.

    Its instructions, those of loops inside it (waits for a barrier) included; empty for a kernel without loops.
    """
    loops = _loops(instructions)

    def own_work(loop: frozenset[int]) -> tuple[int, int, int]:
        own = count(instructions[i] for i in loop.difference(*(other for other in loops if other < loop)))
        return own.tensor, own.global_loads + own.shared_loads, -len(loop)

    if not loops:
        return ()
    best = max(loops, key=own_work)
    return tuple(instructions[i] for i in sorted(best))


def loop_with(instructions: Sequence[Instruction], opcode: str) -> tuple[Instruction, ...]:
    """The smallest loop that has an instruction whose opcode begins so, or nothing."""
    has_it = {i for i, instruction in enumerate(instructions) if instruction.opcode.startswith(opcode)}
    loops = [loop for loop in _loops(instructions) if loop & has_it]
    if not loops:
        return ()
    smallest = min(loops, key=len)
    return tuple(instructions[i] for i in sorted(smallest))


def _loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """Natural loops, as indices of instructions; loops with one header are one."""
    successors = _successors(instructions)
    dominators = _dominators(successors)
    predecessors: dict[int, list[int]] = {}
    for origin, targets in successors.items():
        for target in targets:
            predecessors.setdefault(target, []).append(origin)
    blocks = sorted(successors)
    ends = dict(zip(blocks, [*blocks[1:], len(instructions)], strict=True))
    members: dict[int, set[int]] = {}
    for origin, targets in successors.items():
        for header in targets:
            if origin not in dominators or header not in dominators[origin]:
                continue
            body = members.setdefault(header, {header})
            waiting = [origin]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting.extend(p for p in predecessors.get(block, ()) if p in dominators)
    # the endless jump to itself behind a function's end is reached by nothing, so it is none of them
    return [frozenset(i for block in body for i in range(block, ends[block])) for body in members.values()]


def _successors(instructions: Sequence[Instruction]) -> dict[int, tuple[int, ...]]:
    """Basic blocks, by the index of their first instruction, and where each may go."""
    at = {instruction.address: index for index, instruction in enumerate(instructions)}
    leaders = {0}
    for index, instruction in enumerate(instructions):
        target = _jump_target(instruction, at)
        if target is not None:
            leaders.add(target)
        if target is not None or instruction.base in _ENDS:
            leaders.add(index + 1)
    starts = sorted(leader for leader in leaders if leader < len(instructions))
    result: dict[int, tuple[int, ...]] = {}
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        last = instructions[end - 1]
        target = _jump_target(last, at)
        falls_through = last.is_conditional or (target is None and last.base not in _ENDS)
        following = (end,) if falls_through and end < len(instructions) else ()
        result[start] = following if target is None else (*following, target)
    return result


def _jump_target(instruction: Instruction, at: Mapping[int, int]) -> int | None:
    if instruction.base not in _JUMPS:
        return None
    target = _TARGET.search(instruction.operands)
    return at.get(int(target[1], 16)) if target else None


def _dominators(successors: Mapping[int, Sequence[int]]) -> dict[int, frozenset[int]]:
    """Of every block that can be reached from the first, the blocks on all ways to it, itself included."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, targets = stack[-1]
        following = next((target for target in targets if target not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    order.reverse()
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for target in successors[block]:
            predecessors[target].append(block)
    everything = frozenset(order)
    result = dict.fromkeys(order, everything)
    result[0] = frozenset((0,))
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = frozenset.intersection(*(result[p] for p in predecessors[block])) | {block}
            if common != result[block]:
                result[block] = common
                changed = True
    return result
