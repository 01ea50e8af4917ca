"""NVIDIA's machine code (SASS) as a control flow graph: the usual path through a kernel, and its loops.

A block is a run of instructions that is entered at its top only. An edge from a block back to one that dominates it
(through which every way from the entry leads) closes a loop, wherever the compiler has placed the blocks.
"""

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

Path = tuple[int, ...]  # the indices of blocks, in the order of their execution


@dataclass
class Block:
    """Instructions that run one after another, and the blocks that may follow."""

    instructions: list[str]
    successors: list[int]


_JUMP = r"\bBRA\b|\bCALL\.REL\.NOINC `\(\.L_x"  # a far jump is a call that stores no address; true calls name functions


def basic_blocks(sass: str) -> list[Block]:
    """Returns the control flow graph of nvdisasm's text. The first block is the entry."""
    code: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            code.append([])
            labels[label[1]] = len(code) - 1
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code[-1].append(instruction[1])
            if re.search(rf"{_JUMP}|\b(EXIT|RET|BRX)\b", instruction[1]):
                code.append([])
    blocks = []
    for i, instructions in enumerate(code):
        last = instructions[-1] if instructions else ""
        target = [labels[name] for name in re.findall(r"\.L_x_\d+", last)] if re.search(_JUMP, last) else []
        leaves = re.search(rf"{_JUMP}|\b(EXIT|RET)\b", last)
        falls_through = i + 1 < len(code) and (_is_conditional(last) or not leaves)
        blocks.append(Block(instructions, target + ([i + 1] if falls_through else [])))
    return blocks


def _is_conditional(branch: str) -> bool:
    """Returns whether a branch may not be taken.

    It depends on the predicate before it, on one among its operands, or, as BRA.DIV, on whether the threads of the warp
    have diverged, which they rarely have.
    """
    return branch.startswith("@") or re.search(r"\bBRA(\.DIV\b|\S*\s+!?U?P\d)", branch) is not None


def usual_path(blocks: Sequence[Block]) -> list[str]:
    """Returns the instructions that a thread executes on a usual tile, the body of each loop once.

    Of the ways through the code that make the most 16-byte accesses, which are those of the fast path, it is the one of
    fewest instructions, since code for exceptions costs more.
    """
    wide = [sum(map(is_wide, block.instructions)) for block in blocks]
    # length, 16-byte accesses, path; the shortest first
    ways: list[tuple[int, int, Path]] = [(len(blocks[0].instructions), wide[0], (0,))]
    reached: set[tuple[int, int]] = set()
    ends: dict[int, Path] = {}
    while ways:
        length, count, path = heapq.heappop(ways)
        i = path[-1]
        if (i, count) in reached:
            continue
        reached.add((i, count))
        if not blocks[i].successors or _exits(blocks[i]):
            ends.setdefault(count, path)
        for j in blocks[i].successors:
            if path.count(j) < (1 if wide[j] else 2):  # a loop's test runs once more than its body
                heapq.heappush(ways, (length + len(blocks[j].instructions), count + wide[j], (*path, j)))
    return instructions_of(blocks, ends[max(ends)])


def loops(blocks: Sequence[Block]) -> list[Path]:
    """Returns the way of fewest instructions around each loop, in the order of the loops' first blocks.

    There is one for each edge that closes a loop, and it passes inner loops by. A branch to itself is no loop.
    """
    closing = _closing_edges(blocks)
    around = [cheapest(blocks, first, last, closing) for last, first in sorted(closing, key=lambda e: (e[1], -e[0]))]
    return [path for path in around if len(instructions_of(blocks, path)) > 1]


def through(blocks: Sequence[Block], loop: Path) -> list[str]:
    """Returns the instructions of the shortest way from the entry to an exit that takes this loop once."""
    closing = _closing_edges(blocks)
    before, after = cheapest(blocks, 0, loop[0], closing), cheapest(blocks, loop[-1], None, closing)
    return instructions_of(blocks, (*before[:-1], *loop, *after[1:]))


def cheapest(blocks: Sequence[Block], first: int, last: int | None, without: set[tuple[int, int]]) -> Path:
    """Returns the way of fewest instructions from one block to another, or to an exit if `last` is None.

    It takes none of the edges `without`, and is empty where there is no way.
    """
    ways: list[tuple[int, Path]] = [(len(blocks[first].instructions), (first,))]
    reached: set[int] = set()
    while ways:
        length, path = heapq.heappop(ways)
        i = path[-1]
        if i == last or (last is None and _exits(blocks[i])):
            return path
        if i not in reached:
            reached.add(i)
            for j in blocks[i].successors:
                if (i, j) not in without:
                    heapq.heappush(ways, (length + len(blocks[j].instructions), (*path, j)))
    return ()


def _closing_edges(blocks: Sequence[Block]) -> set[tuple[int, int]]:
    """Returns the edges to a block that dominates their origin."""
    dominators = _dominators(blocks)
    return {(i, j) for i, above in dominators.items() for j in blocks[i].successors if j in above}


def _dominators(blocks: Sequence[Block]) -> dict[int, set[int]]:
    """Returns, for each block that can be reached, the blocks that every way from the entry passes, itself included."""
    reached, waiting = {0}, [0]
    while waiting:
        new = set(blocks[waiting.pop()].successors) - reached
        reached |= new
        waiting += new
    found = {i: {0} if i == 0 else set(reached) for i in sorted(reached)}
    changed = True
    while changed:
        changed = False
        for j in sorted(reached - {0}):
            before = [found[i] for i in reached if j in blocks[i].successors]
            now = set.intersection(*before) | {j}
            changed |= now != found[j]
            found[j] = now
    return found


def _exits(block: Block) -> bool:
    return any("EXIT" in instruction for instruction in block.instructions[-1:])


def instructions_of(blocks: Sequence[Block], path: Path) -> list[str]:
    """Returns the instructions of the path's blocks."""
    return [instruction for i in path for instruction in blocks[i].instructions]


def count_mufu(instructions: Sequence[str]) -> int:
    """Returns how many run on the special-function unit (exponentials, logarithms, reciprocals)."""
    return sum(" MUFU" in f" {_opcode(instruction)}" for instruction in instructions)


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def is_wide(instruction: str) -> bool:
    """Returns whether this is a global load or store of 16 bytes."""
    return re.search(r"\b(LDG|STG)\b.*\.128\b", instruction) is not None


def widest(instructions: Sequence[str], kind: str) -> int:
    """Returns the bits of the widest global access of a kind, "LDG" or "STG"; 0 if there is none."""
    opcodes = [_opcode(i) for i in instructions if re.search(rf"\b{kind}\b", i)]
    return max(
        (int(found[1]) if (found := re.search(r"\.[US]?(8|16|64|128)\b", o)) else 32 for o in opcodes), default=0
    )
