"""A program's basic blocks as Python functions, written when they are first run."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import emit_matrices, emit_memory, floats, integers
from tests.ptx.emit_arithmetic import EMITTERS
from tests.ptx.matrices import mma, wgmma
from tests.ptx.program import WIDTH, Block, Instruction, Program, names_in, parse
from tests.ptx.writer import NUMPY, Writer

_READ_ALL = ("st", "red", "stmatrix", "bra", "brx", "cp", "wgmma")  # which read their first operand
_NUMPY_FUNCTIONS = ["where", "sqrt", "minimum", "maximum", "abs", "trunc", "rint", "floor", "ceil", "bitwise_count"]
_NAMES: dict[str, Any] = {
    **{name: value for module in (integers, floats) for name, value in vars(module).items() if name[0] != "_"},
    **{name: getattr(np, name) for name in _NUMPY_FUNCTIONS},
    "mma": mma,
    "wgmma": wgmma,
}
"""What the functions may call."""

assert emit_memory  # whose import fills EMITTERS, as that of the next does
assert emit_matrices


class Code:
    """A compiled kernel that runs.

    ``code.function(block, masked)`` gives the function of a block, for all threads or for those of a mask.
    ``code.sites`` lists the instructions that access memory; a fault or a count names one by its place in it.
    """

    def __init__(self, text: str) -> None:
        self.program: Program = parse(text)
        self.sites: list[Instruction] = []
        self._functions: dict[tuple[int, bool], Callable[..., Any]] = {}
        self._read: set[str] = set()
        for i in (i for block in self.program.blocks for i in block.instructions):
            operands = i.operands if i.name in _READ_ALL else i.operands[1:]
            self._read |= {*names_in(" ".join([i.guard or "", *operands]))}

    def function(self, block: Block, masked: bool) -> Callable[..., Any]:
        key = block.number, masked
        if key not in self._functions:
            constants: dict[str, tuple[int, str]] = {}
            writer = Writer(self.program, block, masked, constants, self.sites, self._read)
            text = writer.function(EMITTERS)
            names = _NAMES | {name: _constant(value, kind) for name, (value, kind) in constants.items()}
            exec(compile(text, f"<{self.program.name} block {block.number}>", "exec"), names)
            self._functions[key] = names["block"]
        return self._functions[key]


def _constant(value: int, kind: str) -> Any:
    """A numpy scalar; ``bits4`` and ``bits8`` are floats that are given by their bits."""
    if kind == "bits4":
        return np.uint32(value).view(np.float32)
    if kind == "bits8":
        return np.uint64(value).view(np.float64)
    if kind == "b1":
        return np.bool_(value)
    if kind in ("f4", "f8"):
        return np.dtype(kind).type(value)
    bits = 8 * WIDTH[kind]
    return np.dtype(f"u{WIDTH[kind]}").type(value & ((1 << bits) - 1)).view(NUMPY.get(kind, kind))
