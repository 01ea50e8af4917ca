"""How each instruction of arithmetic, logic, comparison and conversion is written as Python; see writer.Writer."""

from collections.abc import Callable

from tests.ptx.program import TYPES, WIDTH, Instruction, Unsupported, split_operands
from tests.ptx.writer import Writer

Emitter = Callable[[Writer, Instruction], None]

EMITTERS: dict[str, Emitter] = {}
"""By the instruction's name."""

_FLOATS = ("f4", "f8", "bf", "h2")
_OTHER_ROUNDINGS = {"rz", "rm", "rp"}  # than to nearest, which these instructions are modelled with
_TO_INTEGER = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}
_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    def register(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(names, emitter))
        return emitter

    return register


def last_type(i: Instruction) -> str:
    """The type of the operation, which its name ends with."""
    return TYPES[i.parts[-1]]


@emits("add", "sub")
def _add(w: Writer, i: Instruction) -> None:
    _binary(w, i, {"add": "+", "sub": "-"}[i.name])


def _binary(w: Writer, i: Instruction, symbol: str) -> None:
    kind = last_type(i)
    if kind not in _FLOATS:
        if i.parts[-1] in ("s16x2", "u16x2") and symbol != "*":
            w.simple(i, "u4", f"{i.name}_halves({{}}, {{}})")
            return
        if i.parts[-1].endswith("x2"):
            _binary_in_half(w, i, symbol)
            return
        if kind == "b1" or "sat" in i.parts:
            raise Unsupported(i.text)
        w.simple(i, f"u{WIDTH[kind]}", f"({{}} {symbol} {{}})")
        return
    if _OTHER_ROUNDINGS & {*i.parts}:
        raise Unsupported(i.text)
    if kind in ("bf", "h2"):
        _binary_in_half(w, i, symbol)
        return
    template = f"flush(flush({{}}) {symbol} flush({{}}))" if "ftz" in i.parts else f"({{}} {symbol} {{}})"
    w.simple(i, kind, f"saturate({template})" if "sat" in i.parts else template)


def _binary_in_half(w: Writer, i: Instruction, symbol: str) -> None:
    """float32 has more than twice the digits of a 16-bit float, so its own rounding does not show, but for the smallest
    products of bfloat16."""
    if (symbol, i.parts[-1].removesuffix("x2")) == ("*", "bf16"):
        raise Unsupported(i.text)
    _in_half(w, i, f"({{}} {symbol} {{}})")


def _in_half(w: Writer, i: Instruction, template: str) -> None:
    """The template of both sources as float32, which are 16-bit floats, or pairs of them."""
    (to, *sources), name = i.operands, i.parts[-1].removesuffix("x2")
    if {"sat", "ftz", "xorsign"} & {*i.parts} or name not in ("f16", "bf16"):
        raise Unsupported(i.text)
    if name == i.parts[-1]:
        w.put(to, f"f32_to_{name}({template.format(*(w.value(source, last_type(i)) for source in sources))})", "u2")
        return
    low, high = (
        template.format(*(f"half({w.value(source, 'u4')}, {shift}, {name == 'bf16'})" for source in sources))
        for shift in (0, 16)
    )
    upper = f"(f32_to_{name}({high}).astype(U4) << {w.constant(16, 'u4')})"
    w.put(to, f"{upper} | f32_to_{name}({low}).astype(U4)", "u4")


def _widened(w: Writer, operand: str, kind: str) -> str:
    return f"{w.value(operand, kind)}.astype({kind[0].upper()}{2 * WIDTH[kind]})"


@emits("mul")
def _mul(w: Writer, i: Instruction) -> None:
    kind, (to, *sources) = last_type(i), i.operands
    if "wide" in i.parts:
        product = " * ".join(_widened(w, source, kind) for source in sources)
        w.put(to, f"({product})", f"{kind[0]}{2 * WIDTH[kind]}")
    elif "hi" in i.parts:
        a, b = (w.value(source, kind) for source in sources)
        w.put(to, f"mul_hi({a}, {b}, {kind.upper()})", kind)
    else:
        _binary(w, i, "*")


@emits("mad", "fma")
def _fma(w: Writer, i: Instruction) -> None:
    kind, (to, a, b, c) = last_type(i), i.operands
    if i.parts[-1] == "f32" and "rn" in i.parts and "sat" not in i.parts:
        ftz = "ftz" in i.parts
        w.simple(i, "f4", "flush(fma32(flush({}), flush({}), flush({})))" if ftz else "fma32({}, {}, {})")
    elif kind in _FLOATS or i.parts[-1].endswith("x2"):
        raise Unsupported(i.text)
    elif "wide" in i.parts:
        wide = f"{kind[0]}{2 * WIDTH[kind]}"
        w.put(to, f"({_widened(w, a, kind)} * {_widened(w, b, kind)} + {w.value(c, wide)})", wide)
    elif "lo" in i.parts:
        w.simple(i, f"u{WIDTH[kind]}", "({} * {} + {})")
    else:
        raise Unsupported(i.text)


@emits("div")
def _div(w: Writer, i: Instruction) -> None:
    kind = last_type(i)
    if kind in _FLOATS:
        if kind != "f4" or _OTHER_ROUNDINGS & {*i.parts}:
            raise Unsupported(i.text)
        exact = "rn" in i.parts
        template = "({} / {})" if exact else "div_full({}, {}, X.perturb)"
        if "ftz" in i.parts:
            template = "flush(" + template.replace("{}", "flush({})") + ")"
        w.simple(i, kind, template)
    else:
        w.simple(i, kind, "int_div({}, {})")


@emits("rem")
def _rem(w: Writer, i: Instruction) -> None:
    w.simple(i, last_type(i), "int_rem({}, {})")


@emits("ex2", "lg2", "rsqrt", "rcp", "sqrt")
def _special_function(w: Writer, i: Instruction) -> None:
    if i.parts[-1] != "f32" or _OTHER_ROUNDINGS & {*i.parts}:
        raise Unsupported(i.text)
    if "rn" in i.parts:
        template = {"rcp": "(ONE / {})", "sqrt": "sqrt({})"}[i.name]
    else:
        template = f"{'sqrt_approx' if i.name == 'sqrt' else i.name}({{}}, X.perturb)"
    w.simple(i, "f4", "flush(" + template.replace("{}", "flush({})") + ")" if "ftz" in i.parts else template)


@emits("min", "max")
def _extreme(w: Writer, i: Instruction) -> None:
    kind, of_floats = last_type(i), f"f{i.name}({{}}, {{}}, {'NaN' in i.parts})"
    if len(i.operands) != 3:
        raise Unsupported(i.text)
    if kind == "f4" and not {"xorsign", "ftz"} & {*i.parts}:
        w.simple(i, kind, of_floats)
    elif i.parts[-1].removesuffix("x2") in ("f16", "bf16"):
        _in_half(w, i, of_floats)
    elif kind not in _FLOATS and not i.parts[-1].endswith("x2"):
        w.simple(i, kind, f"{i.name}imum({{}}, {{}})")
    else:
        raise Unsupported(i.text)


@emits("neg")
def _neg(w: Writer, i: Instruction) -> None:
    kind = last_type(i)
    if kind in ("bf", "h2"):
        w.put(i.operands[0], f"({w.value(i.operands[1], 'u2')} ^ {w.constant(0x8000, 'u2')})", "u2")
    elif i.parts[-1].endswith("x2"):
        raise Unsupported(i.text)
    else:
        w.simple(i, kind, "(-{})")


@emits("abs")
def _abs(w: Writer, i: Instruction) -> None:
    if last_type(i) in ("bf", "h2") or i.parts[-1].endswith("x2"):
        raise Unsupported(i.text)
    w.simple(i, last_type(i), "abs({})")


@emits("and", "or", "xor", "not")
def _logic(w: Writer, i: Instruction) -> None:
    template = {"and": "({} & {})", "or": "({} | {})", "xor": "({} ^ {})", "not": "(~{})"}[i.name]
    w.simple(i, last_type(i), template)


@emits("shl", "shr")
def _shift(w: Writer, i: Instruction) -> None:
    kind, (to, a, n) = last_type(i), i.operands
    w.put(to, f"{i.name}({w.value(a, kind)}, {w.value(n, 'u4')})", kind)


@emits("shf")
def _funnel(w: Writer, i: Instruction) -> None:
    w.simple(i, "u4", f"funnel({{}}, {{}}, {{}}, {'l' in i.parts}, {'wrap' in i.parts})")


@emits("bfe", "bfi")
def _bit_field(w: Writer, i: Instruction) -> None:
    kind, (to, *sources) = last_type(i), i.operands
    values = [w.value(source, kind) for source in sources[:-2]] + [w.value(source, "u4") for source in sources[-2:]]
    w.put(to, f"{i.name}({', '.join(values)})", kind)


@emits("prmt")
def _permute(w: Writer, i: Instruction) -> None:
    if i.parts != ["prmt", "b32"]:
        raise Unsupported(i.text)
    w.simple(i, "u4", "prmt({}, {}, {})")


@emits("lop3")
def _lop3(w: Writer, i: Instruction) -> None:
    to, *sources, table = i.operands
    w.put(to, f"lop3({', '.join(w.value(source, 'u4') for source in sources)}, {int(table, 0)})", "u4")


@emits("popc", "clz", "bfind", "brev")
def _count_bits(w: Writer, i: Instruction) -> None:
    kind, (to, source) = last_type(i), i.operands
    template = {
        "popc": "bitwise_count({}).astype(U4)",
        "clz": "clz({})",
        "bfind": f"bfind({{}}, {'shiftamt' in i.parts})",
        "brev": "brev({})",
    }[i.name]
    w.put(to, template.format(w.value(source, kind)), kind if i.name == "brev" else "u4")


@emits("selp")
def _select(w: Writer, i: Instruction) -> None:
    kind, (to, a, b, predicate) = last_type(i), i.operands
    kind = "u2" if kind in ("bf", "h2") else kind
    w.put(to, f"where({w.value(predicate, 'b1')}, {w.value(a, kind)}, {w.value(b, kind)})", kind)


def _predicate(w: Writer, operand: str) -> str:
    return f"~{w.value(operand[1:], 'b1')}" if operand[0] == "!" else w.value(operand, "b1")


def _comparison(compare: str, a: str, b: str, kind: str) -> str:
    """PTX's: with NaN an ordered comparison is false, also ``ne``; an unordered one (``neu``) is true."""
    if kind in _FLOATS:
        if compare in ("num", "nan"):
            return f"(({a} == {a}) & ({b} == {b}))" if compare == "num" else f"(({a} != {a}) | ({b} != {b}))"
        if compare == "ne":
            return f"(({a} < {b}) | ({a} > {b}))"
        if len(compare) == 3:
            opposite = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}[compare]
            return f"~({_comparison(opposite, a, b, kind)})"
    return f"({a} {_COMPARISONS[compare]} {b})"


@emits("setp")
def _compare(w: Writer, i: Instruction) -> None:
    if "ftz" in i.parts:
        raise Unsupported(i.text)
    compare, kind = i.parts[1], last_type(i)
    to = [name.strip() for name in i.operands[0].split("|")]
    if i.parts[-1] in ("bf16x2", "f16x2"):
        brain = i.parts[-1] == "bf16x2"
        for name, shift in zip(to, (0, 16), strict=True):
            a, b = (f"half({w.value(operand, 'u4')}, {shift}, {brain})" for operand in i.operands[1:3])
            w.put(name, _comparison(compare, a, b, "f4"), "b1")
        return
    result = _comparison(compare, w.value(i.operands[1], kind), w.value(i.operands[2], kind), kind)
    results = [result, f"~({result})"][: len(to)]
    for combine, symbol in (("and", "&"), ("or", "|"), ("xor", "^")):
        if combine in i.parts:
            results = [f"(({result}) {symbol} {_predicate(w, i.operands[3])})" for result in results]
    if len(to) > 1:
        results = [w.temporary(result) for result in results]
    for name, result in zip(to, results, strict=True):
        w.put(name, result, "b1")


@emits("mov")
def _move(w: Writer, i: Instruction) -> None:
    kind, (to, source) = last_type(i), i.operands
    if to[0] == "{":  # unpacks
        names = split_operands(to[1:-1])
        piece = WIDTH[kind] // len(names)
        whole = w.temporary(w.value(source, kind))
        for n, name in enumerate(names):
            w.put(name, f"({whole} >> {w.constant(8 * piece * n, kind)}).astype(U{piece})", f"u{piece}")
    elif source[0] == "{":  # packs
        names = split_operands(source[1:-1])
        piece = WIDTH[kind] // len(names)
        terms = [
            f"({w.value(name, f'u{piece}')}.astype({kind.upper()}) << {w.constant(8 * piece * n, kind)})"
            for n, name in enumerate(names)
        ]
        w.put(to, " | ".join(terms), kind)
    else:
        w.put(to, w.array(source, kind), kind)


@emits("cvt")
def _convert(w: Writer, i: Instruction) -> None:
    to_name, a, b = i.parts[-2], TYPES[i.parts[-2]], TYPES[i.parts[-1]]
    to, relu, to_zero = i.operands[0], "relu" in i.parts, "rz" in i.parts
    if {"rm", "rp", "rna", "sat", "satfinite"} & {*i.parts}:
        raise Unsupported(i.text)
    if to_name in ("bf16x2", "f16x2"):
        function = f"f32_to_{to_name.removesuffix('x2')}"
        high, low = (f"{function}({w.value(x, 'f4')}, {relu}, {to_zero}).astype(U4)" for x in i.operands[1:3])
        w.put(to, f"({high} << {w.constant(16, 'u4')}) | {low}", "u4")
        return
    x = w.value(i.operands[1], b)
    mode = next((part for part in i.parts if part in _TO_INTEGER), None)
    if a not in _FLOATS:
        if b in _FLOATS:
            x = f"flush({x})" if "ftz" in i.parts else x
            w.put(to, f"to_int({x}, '{mode}', {a.upper()})", a)
        else:
            w.put(to, f"{x}.astype({a.upper()})", a)
    elif to_zero and (a, b) not in (("bf", "f4"), ("h2", "f4")):
        raise Unsupported(i.text)
    elif b not in _FLOATS and a in ("f4", "f8"):
        w.put(to, f"{x}.astype({a.upper()})", a)
    elif a == "f4" and b in ("bf", "h2"):
        w.put(to, x, "f4")
    elif b == "f4" and a in ("bf", "h2"):
        w.put(to, f"f32_to_{to_name}({x}, {relu}, {to_zero})", "u2")
    elif a == b == "f4" and mode and "ftz" not in i.parts:
        w.put(to, f"{_TO_INTEGER[mode]}({x})", "f4")
    elif {a, b} == {"f4", "f8"}:
        w.put(to, f"{x}.astype({a.upper()})", a)
    else:
        raise Unsupported(i.text)
