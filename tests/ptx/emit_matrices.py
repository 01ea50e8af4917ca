"""How products of matrices and asynchronous copies are written as Python; see writer.Writer."""

import re

from tests.ptx.emit_arithmetic import emits
from tests.ptx.emit_memory import address_of, listed
from tests.ptx.program import Instruction, Unsupported
from tests.ptx.writer import Writer

_BRAIN = {"bf16": True, "f16": False}


@emits("cp")
def _copy(w: Writer, i: Instruction) -> None:
    if i.opcode == "cp.async.commit_group":
        w.lines.append(f"X.async_copies.commit({w.mask})")
    elif i.opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        groups = int(i.operands[0]) if i.operands else 0
        w.lines.append(f"X.async_copies.wait({groups}, {w.mask})")
    elif re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", i.opcode):
        to, source = address_of(w, i.operands[0], "shared"), address_of(w, i.operands[1], "global")
        width = int(i.operands[2], 0)
        size = w.value(i.operands[3], "u4") if len(i.operands) > 3 else str(width)
        w.lines.append(f"X.async_copies.copy({to}, {source}, {size}, {w.mask}, {w.site(i)}, {width})")
    else:
        raise Unsupported(i.text)


@emits("mma")
def _mma(w: Writer, i: Instruction) -> None:
    if not re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32", i.opcode):
        raise Unsupported(i.text)
    to, a, b, c = map(listed, i.operands)
    a_words, b_words, before = (
        f"[{', '.join(w.array(name, kind) for name in names)}]" for names, kind in ((a, "u4"), (b, "u4"), (c, "f4"))
    )
    result = w.temporary(f"mma(X, {a_words}, {b_words}, {before}, {_BRAIN[i.parts[7]]}, {w.mask})")
    for n, name in enumerate(to):
        w.put(name, f"{result}[{n}]", "f4")


@emits("wgmma")
def _wgmma(w: Writer, i: Instruction) -> None:
    """A product is computed where it is asked for; fences, groups and waits do nothing."""
    if i.parts[1] in ("fence", "commit_group", "wait_group"):
        return
    found = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(b?f16)\.\2", i.opcode)
    *signs, a_transposed, b_transposed = i.operands[4:]
    if not found or i.operands[1][0] == "{" or signs != ["1", "1"] or a_transposed != "0":
        raise Unsupported(i.text)
    to = listed(i.operands[0])
    a, b = (w.array(operand, "u8") for operand in i.operands[1:3])
    before = ", ".join(w.array(name, "f4") for name in to)
    more = f"{w.array(i.operands[3], 'b1')}, {_BRAIN[found[2]]}, {b_transposed == '1'}, {w.mask}, {w.site(i)}"
    result = w.temporary(f"wgmma(X, {a}, {b}, [{before}], {int(found[1])}, {more})")
    for n, name in enumerate(to):
        w.put(name, f"{result}[{n}]", "f4")
