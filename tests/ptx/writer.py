"""Writes one basic block of PTX as a Python function over numpy arrays.

The function is ``block(X, R, M)``: X is the running group of threads (machine.Machine), R the registers, M the mask of
the threads that run it. A register is an array with one entry a thread, of an unsigned type of its width (predicates:
bool), and never changed in place. Where all threads run, a register is bound anew; else old and new are merged by M.
The function returns the number of the next block, or (condition, block, block), or (index, blocks); -1 is the end.
"""

import re
from collections.abc import Callable

from tests.ptx.program import WIDTH, Block, Instruction, Program, Unsupported

SHARED_BASE = 1024
"""Where shared memory begins in its own address space."""

PARAM_BASE = 0x10000
"""Where the parameters begin in their own address space, whose addresses have 32 or 64 bits; each takes 8 bytes."""

LOCAL_BASE = 0x40000000
"""Where a thread's own memory begins in its own address space."""

NUMPY = {"h2": "f2", "bf": "u2", "b1": "?"}
"""numpy's types, where the emulator's have other names."""

_SPECIAL = {
    "%tid.x": "X.tid", "%tid.y": "X.zero", "%tid.z": "X.zero", "%ntid.x": "X.ntid", "%laneid": "X.laneid",
    "%warpid": "X.warpid", "%ctaid.x": "X.ctaid[0]", "%ctaid.y": "X.ctaid[1]", "%ctaid.z": "X.ctaid[2]",
    "%nctaid.x": "X.nctaid[0]", "%nctaid.y": "X.nctaid[1]", "%nctaid.z": "X.nctaid[2]",
}  # fmt: skip


class Writer:
    """The lines of one block.

    Args:
        masked: whether to write the function for some of the threads.
        constants: collects the constants that the lines name, with their types.
        sites: collects the instructions that access memory; an access is named by its place in this list.
        read: the registers that any instruction reads.
    """

    def __init__(
        self, program: Program, block: Block, masked: bool, constants: dict, sites: list[Instruction], read: set[str]
    ) -> None:
        self.program, self.block, self.masked = program, block, masked
        self.constants, self.sites, self.read = constants, sites, read
        self.lines: list[str] = []
        self.mask = "M" if masked else None
        self.symbols = {"global_smem": SHARED_BASE, program.local_name: LOCAL_BASE}
        self._loaded: list[str] = []
        self._written: list[str] = []
        self._temporaries = 0

    def variable(self, register: str) -> str:
        """The name of a register, which is fetched before the block if the block did not write it."""
        if register not in self._loaded and register not in self._written:
            self._loaded.append(register)
        return f"v{self.program.registers[register][0]}"

    def constant(self, value: int, kind: str) -> str:
        for name, known in self.constants.items():
            if known == (value, kind):
                return name
        name = f"k{len(self.constants)}"
        self.constants[name] = value, kind
        return name

    def is_constant(self, operand: str) -> bool:
        return operand not in self.program.registers and not operand.startswith("%")

    def value(self, operand: str, kind: str) -> str:
        """An expression of the operand as the type ``kind``; 16-bit floats come as float32."""
        if operand in self.program.registers:
            return self._register_as(operand, kind)
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand in self.symbols:
            return self.constant(self.symbols[operand], kind)
        names = [name for name, _ in self.program.params]
        if operand in names:
            return self.constant(PARAM_BASE + 8 * names.index(operand), kind)
        if found := re.fullmatch(r"0f([0-9A-Fa-f]{8})", operand):
            return self.constant(int(found[1], 16), "bits4" if kind == "f4" else kind)
        if found := re.fullmatch(r"0d([0-9A-Fa-f]{16})", operand):
            return self.constant(int(found[1], 16), "bits8")
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
            number = int(operand.rstrip("U"), 0)
            if kind == "bf":
                return f"bf16_to_f32({self.constant(number, 'u2')})"
            if kind == "h2":
                return f"{self.constant(number, 'u2')}.view(F2).astype(F4)"
            return self.constant(bool(number) if kind == "b1" else number, kind)
        raise Unsupported(f"operand {operand!r}")

    def _register_as(self, register: str, kind: str) -> str:
        name, own = self.variable(register), self.program.registers[register][1]
        if kind == own:
            return name
        if "b1" in (kind, own):
            raise Unsupported(f"{register} as {kind}")
        unsigned = f"u{WIDTH[kind]}"
        inner = f"{name}.astype({unsigned.upper()})" if WIDTH[own] != WIDTH[kind] else name
        if kind == "bf":
            return f"bf16_to_f32({inner})"
        if kind == "h2":
            return f"{inner}.view(F2).astype(F4)"
        return inner if kind == unsigned else f"{inner}.view({kind.upper()})"

    def array(self, operand: str, kind: str) -> str:
        """The same, with one entry a thread even where it is a constant."""
        value = self.value(operand, kind)
        return f"X.full({value})" if self.is_constant(operand) else value

    def put(self, register: str, expression: str, kind: str) -> None:
        """Writes ``expression``, which has the type ``kind``, into a register, for the threads of the mask."""
        if register == "_":
            return
        own = self.program.registers[register][1]
        if own != kind and WIDTH[own] == WIDTH[kind]:
            expression = f"({expression}).view({own.upper()})"
        elif own != kind:
            letter = "i" if kind[0] == "i" else "u"  # extended by the sign, or by zeros
            expression = f"({expression}).astype({letter.upper()}{WIDTH[own]})"
            expression += f".view({own.upper()})" if letter == "i" else ""
        if self.mask is not None:
            expression = f"where({self.mask}, {expression}, {self.variable(register)})"
        self.lines.append(f"v{self.program.registers[register][0]} = {expression}")
        if register not in self._written:
            self._written.append(register)

    def simple(self, i: Instruction, kind: str, template: str) -> None:
        """Destination = ``template`` of all other operands, all of one type."""
        self.put(i.operands[0], template.format(*(self.value(operand, kind) for operand in i.operands[1:])), kind)

    def temporary(self, expression: str) -> str:
        self._temporaries += 1
        self.lines.append(f"t{self._temporaries} = {expression}")
        return f"t{self._temporaries}"

    def site(self, i: Instruction) -> int:
        if i not in self.sites:
            self.sites.append(i)
        return self.sites.index(i)

    def function(self, emitters: dict[str, Callable[["Writer", Instruction], None]]) -> str:
        """The text of the function."""
        returned = str(self.block.number + 1)
        for i in self.block.instructions:
            guard = None
            if i.guard:
                guard = ("~" if i.guard[0] == "!" else "") + self.variable(i.guard.lstrip("!"))
            if i.name in ("bra", "ret", "exit"):
                target = i.operands[-1] if i.name == "bra" else "-1"
                returned = f"{guard}, {target}, {self.block.number + 1}" if guard else target
            elif i.name == "brx":
                returned = f"{self.value(i.operands[0], 'u4')}, {self.program.tables[i.operands[1]]}"
            elif i.name not in emitters:
                raise Unsupported(i.text)
            else:
                self.mask = "M" if self.masked else None
                if guard:
                    self.mask = self.temporary(f"{guard} & M" if self.masked else guard)
                emitters[i.name](self, i)
        number = self.program.registers
        fetched = [f"v{number[name][0]} = R[{number[name][0]}]" for name in self._loaded]
        kept = [f"R[{number[name][0]}] = v{number[name][0]}" for name in self._written]
        return "\n    ".join(["def block(X, R, M):", *fetched, *self.lines, *kept, f"return {returned}"])
