"""How each instruction that accesses memory, or that a warp runs together, is written as Python; see writer.Writer."""

import re

from tests.ptx.emit_arithmetic import emits, last_type
from tests.ptx.program import STRONG, WIDTH, Instruction, Unsupported, split_operands
from tests.ptx.writer import NUMPY, Writer

_ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas")


def space_of(i: Instruction) -> str:
    """The memory that an instruction accesses."""
    for part in i.parts:
        if part.startswith("shared"):
            return "shared"
        if part in ("global", "param", "local"):
            return part
    if i.name in ("ld", "st"):  # by a generic address, which the compiler takes for a thread's own memory alone
        return "local"
    raise Unsupported(i.text)


def _base_and_offset(operand: str) -> tuple[str, int]:
    found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
    if not found:
        raise Unsupported(f"address {operand!r}")
    return found[1], int(found[2] or "0", 0)


def address_of(w: Writer, operand: str, space: str) -> str:
    """An array of addresses, of 64 bits in global memory, of 32 in shared, and of either in local memory."""
    base, offset = _base_and_offset(operand)
    unknown = base not in w.program.registers and base not in w.symbols
    if unknown or (space == "local" and not w.program.local_bytes):
        raise Unsupported(f"address {operand!r}")
    if base in w.symbols:
        return f"X.full({w.constant(w.symbols[base] + offset, 'u8' if space == 'global' else 'u4')})"
    kind = {"global": "u8", "shared": "u4", "local": w.program.registers[base][1]}[space]
    if kind == "u8" and w.program.registers[base][1] == "u4":
        raise Unsupported(f"32-bit global address {operand}")
    expression = w.value(base, kind)
    return f"({expression} + {w.constant(offset, kind)})" if offset else expression


def listed(operand: str) -> list[str]:
    return split_operands(operand[1:-1]) if operand[0] == "{" else [operand]


@emits("ld")
def _load(w: Writer, i: Instruction) -> None:
    space, kind = space_of(i), last_type(i)
    width, names = WIDTH[kind], listed(i.operands[0])
    if space == "param":
        base, offset = _base_and_offset(i.operands[1])
        if base in w.program.registers:
            result = f"X.param_at({w.value(base, 'u8')}, {offset}, {width}, {w.mask})"
        else:
            number = [name for name, _ in w.program.params].index(base)
            result = f"X.param({number}, {offset}, {width})"
        w.put(names[0], result if kind[0] == "u" else f"{result}.view({kind.upper()})", kind)
        return
    address = address_of(w, i.operands[1], space)
    strong = any(part in STRONG for part in i.parts)
    where = f"{address}, {w.mask}, {w.site(i)}, {width}, {len(names)}, {strong}, '{_order_of(i)}'"
    loaded = w.temporary(f"X.{space}_memory.load({where})")
    for n, name in enumerate(names):
        if kind[0] in "ub":
            w.put(name, f"{loaded}[{n}]", f"u{width}")
        else:
            w.put(name, f"{loaded}[{n}].view({NUMPY.get(kind, kind).upper()})", kind)


def _order_of(i: Instruction) -> str:
    if "cta" in i.parts:  # it orders nothing for other programs
        return "relaxed"
    return next((part for part in i.parts if part in ("acquire", "release", "acq_rel")), "relaxed")


@emits("st")
def _store(w: Writer, i: Instruction) -> None:
    space, width = space_of(i), WIDTH[last_type(i)]
    values = ", ".join(w.array(name, f"u{width}") for name in listed(i.operands[1]))
    address = address_of(w, i.operands[0], space)
    w.lines.append(f"X.{space}_memory.store({address}, [{values}], {w.mask}, {w.site(i)}, {width})")


def _atomic(w: Writer, i: Instruction, to: str, operand: str, sources: list[str]) -> None:
    space, kind = space_of(i), last_type(i)
    name = next((part for part in i.parts[1:] if part in _ATOMICS), None)
    if name is None or kind in ("bf", "h2") or i.parts[-1].endswith("x2"):
        raise Unsupported(i.text)
    values = ", ".join(w.array(source, kind) for source in sources)
    wanted = to in w.read
    old = w.temporary(
        f"X.{space}_memory.atomic({address_of(w, operand, space)}, [{values}], {w.mask}, {w.site(i)}, {WIDTH[kind]}, "
        f"'{name}', '{_order_of(i)}', {wanted})"
    )
    if wanted:
        w.put(to, old, kind)


@emits("atom")
def _atom(w: Writer, i: Instruction) -> None:
    _atomic(w, i, i.operands[0].strip("{} "), i.operands[1], i.operands[2:])


@emits("red")
def _red(w: Writer, i: Instruction) -> None:
    _atomic(w, i, "_", i.operands[0], i.operands[1:])


@emits("ldmatrix")
def _load_matrix(w: Writer, i: Instruction) -> None:
    names, transposed = listed(i.operands[0]), "trans" in i.parts
    if i.parts[-1] != "b16":
        raise Unsupported(i.text)
    address = address_of(w, i.operands[1], "shared")
    loaded = w.temporary(f"X.shared_memory.load_matrix({address}, {w.mask}, {w.site(i)}, {len(names)}, {transposed})")
    for n, name in enumerate(names):
        w.put(name, f"{loaded}[{n}]", "u4")


@emits("stmatrix")
def _store_matrix(w: Writer, i: Instruction) -> None:
    if i.parts[-1] != "b16":
        raise Unsupported(i.text)
    values = ", ".join(w.value(name, "u4") for name in listed(i.operands[1]))
    address, transposed = address_of(w, i.operands[0], "shared"), "trans" in i.parts
    w.lines.append(f"X.shared_memory.store_matrix({address}, [{values}], {w.mask}, {w.site(i)}, {transposed})")


def _check_members(w: Writer, i: Instruction, operand: str) -> None:
    w.lines.append(f"X.warps.check_members({w.value(operand, 'u4')}, {w.mask}, {w.site(i)})")


@emits("shfl")
def _shuffle(w: Writer, i: Instruction) -> None:
    names = [name.strip() for name in i.operands[0].split("|")]
    a, b, c = (w.value(operand, "u4") for operand in i.operands[1:4])
    _check_members(w, i, i.operands[4])
    both = w.temporary(f"X.warps.shuffle('{i.parts[2]}', {a}, {b}, {c})")
    w.put(names[0], f"{both}[0]", "u4")
    if len(names) > 1:
        w.put(names[1], f"{both}[1]", "b1")


@emits("redux")
def _reduce(w: Writer, i: Instruction) -> None:
    kind = last_type(i)
    if kind == "f4":
        raise Unsupported(i.text)
    _check_members(w, i, i.operands[2])
    w.put(i.operands[0], f"X.warps.reduce({w.value(i.operands[1], kind)}, '{i.parts[2]}')", kind)


@emits("vote")
def _vote(w: Writer, i: Instruction) -> None:
    to, source, members = i.operands
    _check_members(w, i, members)
    value = f"~{w.value(source[1:], 'b1')}" if source[0] == "!" else w.value(source, "b1")
    w.put(to, f"X.warps.vote({value}, '{i.parts[2]}')", "u4" if i.parts[2] == "ballot" else "b1")


@emits("cvta")
def _generic_address(w: Writer, i: Instruction) -> None:
    """Memories do not share addresses here, so that an address is its own generic one."""
    kind = last_type(i)
    w.put(i.operands[0], w.array(i.operands[1], kind), kind)


@emits("bar", "barrier", "fence", "membar")
def _nothing(w: Writer, i: Instruction) -> None:
    """A barrier is the scheduler's to handle, and memory is the same for all threads without a fence."""
