"""Runs a single instruction of PTX on given operands, through parser, code generation and memory."""

import numpy as np

from tests.ptx.code import Code
from tests.ptx.machine import Machine, Options
from tests.ptx.memory import Memory
from tests.ptx.program import TYPES, WIDTH
from tests.ptx.writer import NUMPY

_LANES = 128


def _module(opcode: str, kinds: list[str], immediates: tuple[str, ...]) -> str:
    """A kernel that loads each operand of a thread, runs the instruction, and stores the result, which is named first
    among ``kinds``. A predicate is stored as 0 or 1."""
    registers = [f".reg .{kind} %x{letter}<2>;" for letter, kind in zip("abcdefgh", kinds, strict=False)]
    body = ["mov.u32 %i0, %ctaid.x;", "mov.u32 %i1, %tid.x;", f"mad.lo.u32 %i2, %i0, {_LANES}, %i1;"]
    for n, (letter, kind) in enumerate(zip("abcdefgh", kinds, strict=False)):
        stored = "b32" if kind == "pred" else kind
        body += [f"ld.param.u64 %p{n}, [p{n}];", f"mul.wide.u32 %q{n}, %i2, {WIDTH[TYPES[stored]]};"]
        body += [f"add.s64 %a{n}, %p{n}, %q{n};"]
        bits = f"b{8 * WIDTH[TYPES[stored]]}"
        if n and kind == "pred":
            body += [f"ld.global.b32 %t0, [%a{n}];", f"setp.ne.u32 %x{letter}1, %t0, 0;"]
        elif n:
            body += [f"ld.global.{bits} %x{letter}1, [%a{n}];"]
    operands = ", ".join([*(f"%x{letter}1" for letter in "abcdefgh"[: len(kinds)]), *immediates])
    body += [f"{opcode} {operands};"]
    if kinds[0] == "pred":
        body += ["selp.b32 %t0, 1, 0, %xa1;", "st.global.b32 [%a0], %t0;"]
    else:
        body += [f"st.global.b{8 * WIDTH[TYPES[kinds[0]]]} [%a0], %xa1;"]
    declarations = ".reg .b32 %i<3>; .reg .b32 %t<1>; .reg .b64 %p<9>; .reg .b64 %q<9>; .reg .b64 %a<9>;"
    params = ",\n".join(f".param .u64 p{n}" for n in range(len(kinds)))
    lines = "\n".join([declarations, *registers, *body, "ret;"])
    return f".visible .entry one(\n{params}\n)\n.reqntid {_LANES}\n{{\n{lines}\n}}\n"


def execute(opcode: str, kinds: str, *operands: np.ndarray, immediates: tuple[str, ...] = ()) -> np.ndarray:
    """The results of an instruction, one for each entry of the operands.

    Args:
        opcode: as ``fma.rn.f32``.
        kinds: PTX's types of the result and of each operand, as ``f32 f32 f32 f32``; 16-bit floats are numpy's uint16
            or float16, a predicate is an uint32.
        immediates: operands that are written into the instruction, after the others.

    Example::

        >>> execute("add.s32", "s32 s32 s32", np.int32([1, 2]), np.int32([3, 4]))
        array([4, 6], dtype=int32)
    """
    names = kinds.split()
    count = len(operands[0])
    padded = -(-count // _LANES) * _LANES
    memory = Memory()
    first = TYPES[names[0]]
    dtype = np.dtype("u4") if first == "b1" else np.dtype(NUMPY.get(first, first))
    arrays = [np.zeros(padded, dtype), *(np.resize(operand, padded) for operand in operands)]
    buffers = [memory.add(f"p{n}", array.view(np.uint8), array.itemsize) for n, array in enumerate(arrays)]
    code = Code(_module(opcode, names, immediates))
    params = [np.uint64(buffer.base) for buffer in buffers]
    Machine(code, memory, params, (padded // _LANES, 1, 1), 0, Options()).run()
    return arrays[0][:count]
