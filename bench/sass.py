"""NVIDIA machine code as `cuobjdump -sass` prints it: instructions, classes, widths, and the innermost loops.

Loops are found in the control flow itself, not from addresses: the compiler moves the slow path of a barrier wait to
the end of the function, from where it jumps back, so that an interval between a backward branch and its target may
cover code that is in no loop. Here a loop is a strongly connected component of the graph of instructions; without the
last jump back to its header (where control enters it) it falls apart into the loops nested in it. Loops that do none
of `WORK`, which wait for a barrier, registers or tensor memory, are left out.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# class -> the opcodes it counts, each with or without further parts: "LDG" counts LDG.E.128.
CLASSES = {
    "HGMMA": ("HGMMA",),  # warpgroup matrix product of sm_90
    "HMMA": ("HMMA",),  # warp matrix product of sm_80
    "UTCHMMA": ("UTCHMMA",),  # tensor-memory matrix product of sm_100
    "UTMALDG": ("UTMALDG",),  # TMA load, store, reduction
    "UTMASTG": ("UTMASTG",),
    "UTMAREDG": ("UTMAREDG",),
    "LDG": ("LDG",),
    "STG": ("STG",),
    "LDGSTS": ("LDGSTS",),  # global to shared memory, asynchronous
    "RED": ("RED", "REDG"),
    "ATOMG": ("ATOM", "ATOMG"),
    "LDS": ("LDS", "LDSM"),
    "STS": ("STS", "STSM"),
    "LDTM": ("LDTM",),  # tensor memory
    "STTM": ("STTM",),
    "FFMA": ("FFMA",),
    "MUFU.EX2": ("MUFU.EX2",),
    "USETMAXREG": ("USETMAXREG",),
    "LDL": ("LDL",),  # local memory: a spill
    "STL": ("STL",),
    "BAR": ("BAR",),
    "SYNCS": ("SYNCS",),
}
MATRIX = ("HGMMA", "HMMA", "UTCHMMA")
ACCESSES = ("LDG", "STG", "LDGSTS")  # of global memory, by each thread for itself
WIDE = 16  # bytes that such an access moves at best for a thread; sm_100 has some of 32
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # part of an opcode -> bytes, else 4
WORK = (*MATRIX, "UTMALDG", "UTMASTG", "UTMAREDG", "LDG", "STG", "LDGSTS", "RED", "ATOMG", "FFMA", "MUFU.EX2", "LDTM")

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?([A-Z][\w.]*)[ \t]*([^;\n]*);", re.MULTILINE)
_ENDS = {"EXIT", "RET", "KILL", "BRX", "BRXU", "JMX", "JMXU"}  # indirect targets are not in the text
_JUMPS = {"BRA", "JMP", "CALL"}  # long jumps are written as calls


@dataclass(frozen=True)
class Instruction:
    """One line: its address in bytes, guard ("@!P0" or ""), opcode with its parts, operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    def named(self, name: str) -> bool:
        """Whether the opcode is `name`, or `name` with further parts."""
        return self.opcode == name or self.opcode.startswith(name + ".")


def parse_functions(text: str) -> list[list[Instruction]]:
    """The instructions of each function in a `cuobjdump -sass` listing."""
    starts = [match.end() for match in _FUNCTION.finditer(text)] or [0]
    pieces = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [
        [Instruction(int(address, 16), guard, opcode, operands.strip()) for address, guard, opcode, operands in found]
        for found in map(_INSTRUCTION.findall, pieces)
    ]


def count_named(instructions: Iterable[Instruction], names: Sequence[str]) -> int:
    """How many instructions have one of these opcodes."""
    return sum(any(instruction.named(name) for name in names) for instruction in instructions)


def count_classes(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Instructions per class of `CLASSES`, and `total`."""
    counts = {name: count_named(instructions, opcodes) for name, opcodes in CLASSES.items()}
    return counts | {"total": len(instructions)}


def access_widths(instructions: Iterable[Instruction]) -> dict[str, int]:
    """Bytes that a thread moves, widest first, "16" for LDG.E.128 -> how many of `ACCESSES` move as many."""
    counts: dict[int, int] = {}
    for instruction in instructions:
        name, *parts = instruction.opcode.split(".")
        if name in ACCESSES:
            width = next((WIDTHS[part] for part in parts if part in WIDTHS), 4)
            counts[width] = counts.get(width, 0) + 1
    return {str(width): counts[width] for width in sorted(counts, reverse=True)}


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The working loops of a function that hold no other working loop, by the address of their first instruction."""
    all_edges = _edges(instructions)
    opcodes = [opcode for name in WORK for opcode in CLASSES[name]]
    working = {i for i, instruction in enumerate(instructions) if count_named([instruction], opcodes)}

    def innermost(edges: dict[int, list[int]]) -> list[set[int]]:
        found = []
        for loop in _components(edges):
            if loop & working:
                entered = {after for i in all_edges if i not in loop for after in all_edges[i]} & loop
                header = min(entered or loop)
                last = max(i for i in loop if header in edges[i])
                inside = {i: [after for after in edges[i] if after in loop] for i in loop}
                inside[last].remove(header)
                found += innermost(inside) or [loop]
        return found

    loops = [sorted(loop) for loop in innermost(all_edges)]
    return [[instructions[i] for i in loop] for loop in sorted(loops)]


def register_splits(instructions: Iterable[Instruction]) -> list[int]:
    """Registers per thread that warp groups set for themselves (setmaxnreg), ascending, each once."""
    counts = [int(i.operands.split()[-1], 16) for i in instructions if i.named("USETMAXREG")]
    return sorted(set(counts))


def _edges(instructions: Sequence[Instruction]) -> dict[int, list[int]]:
    """For each instruction those that may follow it."""
    place = {instruction.address: i for i, instruction in enumerate(instructions)}
    edges = {}
    for i, instruction in enumerate(instructions):
        base = instruction.opcode.split(".")[0]
        following = []
        falls_through = base not in _ENDS or bool(instruction.guard)
        if base in _JUMPS:
            target = re.search(r"(0x[0-9a-f]+)$", instruction.operands)
            if target and int(target[1], 16) in place:
                following.append(place[int(target[1], 16)])
                always = instruction.opcode in ("BRA", "BRA.U", "JMP") and target[1] == instruction.operands
                falls_through = not always or bool(instruction.guard)
        if falls_through and i + 1 < len(instructions):
            following.append(i + 1)
        edges[i] = following
    return edges


def _components(edges: dict[int, list[int]]) -> list[set[int]]:
    """Strongly connected components of more than one node, or of one that follows itself (Tarjan, 1972)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    done: set[int] = set()
    found = []
    for root in edges:
        path = [] if root in order else [root]
        while path:
            node = path[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
            new = next((after for after in edges[node] if after not in order), None)
            if new is not None:
                path.append(new)
                continue
            path.pop()
            low[node] = min(low[after] for after in (node, *edges[node]) if after not in done)
            if low[node] == order[node]:
                component = set(stack[stack.index(node) :])
                del stack[-len(component) :]
                done |= component
                if len(component) > 1 or node in edges[node]:
                    found.append(component)
    return found
