"""The emulator's instructions on floats, each against exact arithmetic; and what it does not model."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx import floats
from tests.ptx.instruction import execute
from tests.ptx.program import Unsupported

F4, U4 = np.float32, np.uint32
RANDOM = np.random.default_rng(0)


def f32(values: list[float]) -> np.ndarray:
    return np.array(values, F4)


SPECIAL = f32([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2**-126, 2**-149, 3.4e38, -3.4e38, 1e-40, 0.1, 3.0])


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """All pairs of special numbers, and random ones of many sizes, some nearly equal."""
    a, b = (x.ravel() for x in np.meshgrid(SPECIAL, SPECIAL))
    random = [any_floats(2000) for _ in range(2)]
    near = any_floats(500)
    a, b = np.concatenate((a, random[0], near)), np.concatenate((b, random[1], np.nextafter(near, F4(0))))
    return a, b


def any_floats(count: int) -> np.ndarray:
    return (RANDOM.standard_normal(count) * 2.0 ** RANDOM.integers(-60, 60, count)).astype(F4)


def rounded(
    exact: Fraction, significant: int = 24, smallest: int = -149, largest: float = 3.4028235677973366e38
) -> float:
    """The nearest float, of two equally near the even one; ``largest`` is the first that overflows."""
    if exact == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(exact))) - significant + 1, smallest)
    while abs(exact) >= Fraction(2) ** (exponent + significant):
        exponent += 1
    while exponent > smallest and abs(exact) < Fraction(2) ** (exponent + significant - 1):
        exponent -= 1
    units = exact / Fraction(2) ** exponent
    result = Fraction(round(units)) * Fraction(2) ** exponent  # Python rounds halves to even
    return math.copysign(math.inf, exact) if abs(result) >= largest else float(result)


def assert_rounded(ours: np.ndarray, exact: list[Fraction | None], **precision) -> None:
    """None stands for a result that is not a number or not finite, which other tests look at."""
    assert sum(value is not None for value in exact) > len(exact) / 2
    for got, value in zip(ours, exact, strict=True):
        if value is not None:
            assert float(got) == rounded(value, **precision), (got, value)


def fraction(x: float) -> Fraction | None:
    return Fraction(float(x)) if math.isfinite(x) else None


def apply(function, *operands) -> Fraction | None:
    values = [fraction(x) for x in operands]
    return None if None in values else function(*values)


@pytest.mark.parametrize(
    ("opcode", "exact"),
    [
        ("add.rn.f32", lambda a, b: a + b),
        ("sub.f32", lambda a, b: a - b),
        ("mul.rn.f32", lambda a, b: a * b),
        ("div.rn.f32", lambda a, b: a / b if b else None),
    ],
)
def test_is_rounded_to_nearest(opcode, exact):
    a, b = pairs()
    ours = execute(opcode, "f32 f32 f32", a, b)
    assert_rounded(ours, [apply(exact, x, y) for x, y in zip(a, b, strict=True)])


def test_fma_is_rounded_once():
    """Also where the product cancels with the sum, is just beside the middle of two floats, or is subnormal."""
    a, b = (RANDOM.integers(2**23, 2**24, 3000).astype(F4) for _ in range(2))
    c = (-F4(a.astype(np.float64) * b) * RANDOM.choice([1, 0.5, 2.0**-24, 2.0**-25], 3000)).astype(F4)
    c[::7] = (RANDOM.integers(0, 2**24, len(c[::7])) * 2.0**-1).astype(F4)
    a[::5] *= F4(2.0**-100)
    b[::5] *= F4(2.0**-70)
    c[::5] = (RANDOM.integers(-(2**10), 2**10, len(c[::5])) * 2.0**-149).astype(F4)
    ours = execute("fma.rn.f32", "f32 f32 f32 f32", a, b, c)
    exact = [apply(lambda x, y, z: x * y + z, *operands) for operands in zip(a, b, c, strict=True)]
    assert_rounded(ours, exact)
    twice = F4(a * b) + c
    assert (twice != ours).any()  # or the test could not tell the two apart


@pytest.mark.parametrize(("opcode", "exact"), [("sqrt.rn.f32", math.sqrt), ("rcp.rn.f32", lambda x: 1 / x)])
def test_roots_and_reciprocals_are_rounded_to_nearest(opcode, exact):
    """Rounding to float64 first is harmless: neither gives a number just beside the middle of two floats."""
    x = np.abs(any_floats(3000))
    assert np.array_equal(execute(opcode, "f32 f32", x), f32([exact(float(value)) for value in x]))


@pytest.mark.parametrize(
    ("opcode", "function", "bound"),
    [
        ("ex2.approx.ftz.f32", lambda x: 2.0**x, 2.0**-22),
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 2.0**-23),
        ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(x), 2.0**-22.9),
        ("lg2.approx.ftz.f32", math.log2, 2.0**-22),
        ("sqrt.approx.f32", math.sqrt, 2.0**-23),
    ],
)
def test_approximations_keep_their_bounds(opcode, function, bound):
    x = (2 + np.abs(RANDOM.standard_normal(2000) * 20 + 30)).astype(F4)
    name = {"sqrt": "sqrt_approx"}.get(opcode.split(".")[0], opcode.split(".")[0])
    exact = np.array([function(float(value)) for value in x])
    unperturbed, perturbed = (getattr(floats, name)(x, perturb) for perturb in (0, 1))
    assert np.array_equal(unperturbed, execute(opcode, "f32 f32", x))
    half_an_ulp = 2.0**-24
    for ours, limit in ((unperturbed, half_an_ulp), (perturbed, bound + half_an_ulp)):
        assert (np.abs(ours - exact) <= 1.001 * limit * np.abs(exact)).all()
    assert (np.abs(perturbed - exact) > bound / 4 * np.abs(exact)).any()


def bits(x: np.ndarray) -> list[int]:
    return x.view(U4).tolist()


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max_drop_nan_or_keep_it(name):
    a, b = f32([math.nan, 1, math.nan, 0.0, -0.0, 2]), f32([1, math.nan, math.nan, -0.0, 0.0, 3])
    zero = 0x80000000 if name == "min" else 0
    smaller = 2.0 if name == "min" else 3.0
    dropped = [*bits(f32([1, 1])), 0x7FFFFFFF, zero, zero, *bits(f32([smaller]))]
    assert bits(execute(f"{name}.f32", "f32 f32 f32", a, b)) == dropped
    kept = [*[0x7FFFFFFF] * 3, zero, zero, *bits(f32([smaller]))]
    assert bits(execute(f"{name}.NaN.f32", "f32 f32 f32", a, b)) == kept


def test_max_of_16_bits():
    a, b = f32([math.nan, 1, 0.0, -2, math.inf, 5]), f32([1, math.nan, -0.0, 3, 2, 6])
    larger, kept = f32([1, 1, 0.0, 3, math.inf, 6]), f32([math.nan, math.nan, 0.0, 3, math.inf, 6])
    for opcode, expected in (("max", larger), ("max.NaN", kept)):
        ours = execute(f"{opcode}.bf16", "bf16 bf16 bf16", floats.f32_to_bf16(a), floats.f32_to_bf16(b))
        assert np.array_equal(floats.bf16_to_f32(ours), expected, equal_nan=True)
        pairs = (x.astype(np.float16).view(U4) for x in (a, b))
        ours = execute(f"{opcode}.f16x2", "b32 b32 b32", *pairs).view(np.float16)
        assert np.array_equal(ours.astype(F4), expected, equal_nan=True)


def test_comparisons_with_nan():
    a, b = f32([1, 1, math.nan, 2, math.nan]), f32([1, 2, 1, 1, math.nan])
    expected = {
        "eq": [1, 0, 0, 0, 0], "ne": [0, 1, 0, 1, 0], "lt": [0, 1, 0, 0, 0], "ge": [1, 0, 0, 1, 0],
        "equ": [1, 0, 1, 0, 1], "neu": [0, 1, 1, 1, 1], "ltu": [0, 1, 1, 0, 1], "geu": [1, 0, 1, 1, 1],
        "num": [1, 1, 0, 1, 0], "nan": [0, 0, 1, 0, 1],
    }  # fmt: skip
    for compare, result in expected.items():
        assert execute(f"setp.{compare}.f32", "pred f32 f32", a, b).tolist() == result, compare


@pytest.mark.parametrize(
    ("to", "precision"),
    [
        ("bf16", {"significant": 8, "smallest": -133, "largest": 3.3961775292304601e38}),
        ("f16", {"significant": 11, "smallest": -24, "largest": 65520.0}),
    ],
)
def test_conversion_to_16_bits(to, precision):
    a, _ = pairs()
    middles = (np.arange(2000, dtype=U4) << (16 if to == "bf16" else 13)).view(F4) + F4(0)
    a = np.concatenate((a, any_floats(2000), middles, np.nextafter(middles, F4(1))))
    result = execute(f"cvt.rn.{to}.f32", f"{to} f32", a)
    as_float = floats.bf16_to_f32(result) if to == "bf16" else result.view(np.float16).astype(F4)
    with np.errstate(over="ignore"):
        assert_rounded(as_float, [fraction(x) for x in a], **precision)
    assert np.isnan(as_float[np.isnan(a)]).all()
    towards_zero = execute(f"cvt.rz.{to}.f32", f"{to} f32", a)
    truncated = floats.bf16_to_f32(towards_zero) if to == "bf16" else towards_zero.view(np.float16).astype(F4)
    finite = np.isfinite(a)
    assert (np.abs(truncated[finite]) <= np.abs(a[finite])).all()
    assert (truncated[finite] != as_float[finite]).any()


@pytest.mark.parametrize("opcode", ["add.bf16", "sub.f16", "mul.f16"])
def test_sums_and_products_of_16_bits_are_rounded_once(opcode):
    name, to = opcode.split(".")
    words = [RANDOM.integers(0, 1 << 16, 3000).astype(np.uint16) for _ in range(2)]
    a, b = (floats.bf16_to_f32(x) if to == "bf16" else x.view(np.float16).astype(F4) for x in words)
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    with np.errstate(all="ignore"):
        exact = operation(a.astype(np.float64), b.astype(np.float64))  # which 53 digits hold, or nearly
        expected = execute(f"cvt.rn.{to}.f32", f"{to} f32", exact.astype(F4))
    ours = execute(opcode, f"{to} {to} {to}", *words).view(np.uint16)
    numbers = ~np.isnan(exact)
    assert np.array_equal(ours[numbers], expected.view(np.uint16)[numbers])
    pairs = [x.astype(U4) << U4(16) | x[::-1].astype(U4) for x in words]
    assert np.array_equal(
        execute(f"{opcode}x2", "b32 b32 b32", *pairs), ours.astype(U4) << U4(16) | ours[::-1].astype(U4)
    )


def test_a_pair_of_16_bits_has_its_first_operand_above():
    a, b = f32([1.5, -2.0]), f32([3.0, math.nan])
    pair = execute("cvt.rn.bf16x2.f32", "b32 f32 f32", a, b)
    assert [hex(x) for x in pair] == ["0x3fc04040", "0xc0007fff"]
    assert [hex(x) for x in execute("cvt.rn.relu.bf16x2.f32", "b32 f32 f32", a, b)] == ["0x3fc04040", "0x7fff"]


def test_conversion_to_integers_saturates():
    x = f32([2.5, -2.5, 3.5, 3e9, -3e9, math.nan, math.inf])
    top, bottom = 2**31 - 1, -(2**31)
    assert execute("cvt.rzi.s32.f32", "s32 f32", x).tolist() == [2, -2, 3, top, bottom, 0, top]
    assert execute("cvt.rni.s32.f32", "s32 f32", x).tolist() == [2, -2, 4, top, bottom, 0, top]
    assert execute("cvt.rmi.s32.f32", "s32 f32", x[:3]).tolist() == [2, -3, 3]
    assert execute("cvt.rpi.s32.f32", "s32 f32", x[:3]).tolist() == [3, -2, 4]
    assert execute("cvt.rzi.u32.f32", "u32 f32", x[:4]).tolist() == [2, 0, 3, 3000000000]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_integers_become_the_nearest_float(kind):
    width, signed = int(kind[1:]), kind[0] == "s"
    x = RANDOM.integers(
        -(2 ** (width - 1)) if signed else 0,
        2 ** (width - signed) - 1,
        2000,
        dtype=f"{kind[0].replace('s', 'i')}{width // 8}",
    )
    ours = execute(f"cvt.rn.f32.{kind}", f"f32 {kind}", x)
    assert_rounded(ours, [Fraction(int(value)) for value in x])


@pytest.mark.parametrize(
    ("opcode", "kinds"),
    [
        ("add.rz.f32", "f32 f32 f32"), ("fma.rz.f32", "f32 f32 f32 f32"), ("div.rp.f32", "f32 f32 f32"),
        ("mul.bf16x2", "b32 b32 b32"), ("tanh.approx.f32", "f32 f32"), ("cvt.rm.f32.f64", "f32 f64"),
    ],
)  # fmt: skip
def test_what_is_not_modelled_raises(opcode, kinds):
    operands = [np.ones(4, {"f32": "f4", "f64": "f8", "b32": "u4"}[kind]) for kind in kinds.split()[1:]]
    with pytest.raises(Unsupported):
        execute(opcode, kinds, *operands)
