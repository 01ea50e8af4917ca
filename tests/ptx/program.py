"""Parses the text of a PTX kernel into basic blocks of instructions."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

TYPES = {
    "s8": "i1", "u8": "u1", "b8": "u1", "s16": "i2", "u16": "u2", "b16": "u2", "s32": "i4", "u32": "u4", "b32": "u4",
    "s64": "i8", "u64": "u8", "b64": "u8", "f16": "h2", "bf16": "bf", "f32": "f4", "f64": "f8", "pred": "b1",
    "f16x2": "u4", "bf16x2": "u4", "s16x2": "u4", "u16x2": "u4",
}  # fmt: skip
"""PTX's types by the emulator's names: numpy's, and h2 for float16, bf for bfloat16, b1 for a predicate."""

WIDTH = {"i1": 1, "u1": 1, "i2": 2, "u2": 2, "h2": 2, "bf": 2, "i4": 4, "u4": 4, "f4": 4, "i8": 8, "u8": 8, "f8": 8}
"""Bytes of a type."""

_WARP_INSTRUCTIONS = ("shfl", "redux", "vote", "match", "ldmatrix", "stmatrix", "mma", "wgmma")
STRONG = ("volatile", "relaxed", "acquire")
"""Marks of loads that race with no atomic."""

_ENDS = ("bra", "brx", "ret", "exit")


class Unsupported(Exception):
    """The program holds something that the emulator does not know."""


@dataclass(eq=False)
class Instruction:
    opcode: str
    operands: list[str]
    guard: str | None
    """The predicate under which it runs: ``%p1`` or ``!%p1``."""
    source: str
    """file:line of the Python that it was compiled from."""
    text: str

    def __post_init__(self) -> None:
        self.parts = self.opcode.replace("::", "_").split(".")

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def is_barrier(self) -> bool:
        """Whether it waits for all threads of the program, and not only for the warp."""
        return self.name in ("bar", "barrier") and "warp" not in self.parts

    @property
    def communicates(self) -> bool:
        """Whether its order among the accesses of other programs shows: a strong load or an atomic in global memory."""
        strong = self.name == "ld" and any(part in self.parts for part in STRONG)
        return "global" in self.parts and (strong or self.name in ("atom", "red"))

    @property
    def is_warp_wide(self) -> bool:
        """Whether the threads of a warp exchange something, so that all must have come."""
        return self.name in _WARP_INSTRUCTIONS or "warp" in self.parts


@dataclass
class Block:
    """Instructions without a jump in or out, but at the ends. A barrier is a block of its own, and an access by which
    programs communicate begins one."""

    number: int
    instructions: list[Instruction] = field(default_factory=list)
    warp_wide: bool = False
    barrier: bool = False
    communicates: bool = False

    @property
    def barrier_name(self) -> str:
        return self.instructions[0].operands[0]

    @property
    def barrier_threads(self) -> int:
        """How many threads the barrier waits for; 0 if it names no number, which are all of the program."""
        (barrier,) = self.instructions
        return int(barrier.operands[1]) if len(barrier.operands) > 1 else 0


@dataclass
class Program:
    """A kernel.

    Args:
        params: name and bytes of each parameter.
        threads: of one CTA, the group of threads that is one program of Triton.
        registers: the number of each register, and the unsigned type of its width (b1 for a predicate): a register is
            bits, which each instruction reads as its own type.
        shared_granule: bytes of the smallest access to shared memory, at most 4.
        tables: the targets of each indexed jump.
        local_name, local_bytes: of a thread's own memory, where the compiler has put arrays or spilled registers.
    """

    name: str
    params: list[tuple[str, int]]
    threads: int
    blocks: list[Block]
    registers: dict[str, tuple[int, str]]
    shared_granule: int
    tables: dict[str, list[int]]
    local_name: str = ""
    local_bytes: int = 0

    @property
    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in the program."""
        return Counter(i.opcode for block in self.blocks for i in block.instructions)


def split_operands(text: str) -> list[str]:
    """The operands, which commas separate, but for commas within braces or brackets."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """Text and source of each statement; a label is a statement that ends with a colon."""
    source, pending = "", ""
    for line in body.splitlines():
        code, _, comment = line.partition("//")
        code = code.strip()
        if re.match(r"\.loc\s", code):
            found = re.findall(r"([\w./]+\.py:\d+)", comment)
            source = found[-1] if found else source
            continue
        if code.startswith((".pragma", ".file", ".section")):
            continue
        pending += " " + code
        while True:
            pending = pending.lstrip()
            if pending[:1] in ("{", "}"):
                pending = pending[1:]
            elif label := re.match(r"([\w$]+):(?!:)", pending):
                yield label[1] + ":", source
                pending = pending[label.end() :]
            elif ";" in pending:
                text, _, pending = pending.partition(";")
                yield text.strip(), source
            else:
                break


def _instruction(statement: str, source: str) -> Instruction:
    found = re.match(r"(?:@(!?%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.S)
    if not found:
        raise Unsupported(statement)
    return Instruction(found[2], split_operands(found[3]), found[1], source, statement)


def _blocks(items: list[Instruction | str], targets: set[str]) -> tuple[list[Block], dict[str, int]]:
    """The blocks, and of each label that is jumped to the number of its block."""
    blocks, labels = [Block(0)], {}
    for item in items:
        if isinstance(item, str):
            if item in targets:
                if blocks[-1].instructions:
                    blocks.append(Block(len(blocks)))
                labels[item] = len(blocks) - 1
            continue
        if item.is_barrier and ("sync" not in item.parts or "cluster" in item.parts or item.guard):
            raise Unsupported(item.text)
        if (item.is_barrier or item.communicates) and blocks[-1].instructions:
            blocks.append(Block(len(blocks)))
        blocks[-1].instructions.append(item)
        blocks[-1].barrier |= item.is_barrier
        blocks[-1].communicates |= item.communicates
        blocks[-1].warp_wide |= item.is_warp_wide
        if item.is_barrier or item.name in _ENDS:
            blocks.append(Block(len(blocks)))
    return blocks, labels


def names_in(text: str) -> list[str]:
    """What may be names of registers; inline PTX declares some without a percent sign."""
    return re.findall(r"%[A-Za-z]+\d*|(?<![\w%.$])[a-z]\w*(?![\w.])", text)


def _registers(instructions: list[Instruction], declared: dict[str, str]) -> dict[str, tuple[int, str]]:
    numbers: dict[str, tuple[int, str]] = {}
    for i in instructions:
        for register in names_in(" ".join([i.guard or "", *i.operands])):
            kind = declared.get(re.sub(r"\d+$", "", register)) or declared.get(register)
            if kind and register not in numbers:
                numbers[register] = (len(numbers), kind if kind == "b1" else f"u{WIDTH[kind]}")
    return numbers


def parse(text: str) -> Program:
    """Parses a module of one kernel, as Triton writes it.

    Raises:
        Unsupported: if there is no kernel, or a statement that is none of PTX's.
    """
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{", text, re.S)
    threads = entry and re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    if not entry or not threads:
        raise Unsupported("a module without a kernel of a known number of threads")
    found = re.findall(r"\.param\s+\.[a-z](\d+)[^,\n]*?(\w+)\s*(?:,|$)", entry[2], re.M)
    body = text[entry.end() :]
    items: list[Instruction | str] = []
    declared: dict[str, str] = {}
    named_targets: dict[str, list[str]] = {}
    local = "", 0
    for statement, source in _statements(body[: body.index("\n}")]):
        if statement.endswith(":"):
            items.append(statement[:-1])
        elif statement.startswith(".reg"):
            _, kind, names = re.split(r"\s+\.?", statement, maxsplit=2)
            declared |= {name.strip().split("<")[0]: TYPES[kind] for name in names.split(",")}
        elif depot := re.match(r"\.local\s.*\.b8\s+(\w+)\[(\d+)\]", statement):
            local = depot[1], int(depot[2])
        elif statement.startswith(".branchtargets"):
            named_targets[str(items.pop())] = [name.strip() for name in statement.split(None, 1)[1].split(",")]
        elif statement and not statement.startswith("."):
            items.append(_instruction(statement, source))

    instructions = [item for item in items if isinstance(item, Instruction)]
    jumps = [i for i in instructions if i.name == "bra"]
    targets = {i.operands[-1] for i in jumps} | {name for names in named_targets.values() for name in names}
    blocks, labels = _blocks(items, targets)
    for i in jumps:
        i.operands[-1] = str(labels[i.operands[-1]])
    shared = [i for i in instructions if "shared" in i.opcode and i.name in ("ld", "st", "atom", "red")]
    return Program(
        name=entry[1],
        params=[(name, int(bits) // 8) for bits, name in found],
        threads=int(threads[1]),
        blocks=blocks,
        registers=_registers(instructions, declared),
        shared_granule=min([4, *(WIDTH[TYPES[i.parts[-1]]] for i in shared)]),
        tables={key: [labels[name] for name in names] for key, names in named_targets.items()},
        local_name=local[0],
        local_bytes=local[1],
    )
