"""What PTX's floating-point instructions compute, on numpy arrays with one entry a thread.

Instructions that PTX rounds correctly are exact here. Approximations (``.approx``, ``.full``) are rounded from float64;
with ``perturb`` they are moved by up to that many times their documented error, by a hash of the operand, as another
function within the same bound would be. The bounds are those of the PTX ISA, section "Floating-Point Instructions".
"""

from typing import Any

import numpy as np

F2, F4, F8 = np.float16, np.float32, np.float64
U2, U4, I8 = np.uint16, np.uint32, np.int64
ONE = F4(1)
NAN = U4(0x7FFFFFFF).view(F4)  # the one NaN that float32 instructions give
_SMALLEST_NORMAL = F4(2.0**-126)

Array = Any  # a numpy array of one entry a thread, or a numpy scalar where all threads hold the same


def bf16_to_f32(x: Array) -> Array:
    return (x.astype(U4) << U4(16)).view(F4)


def _relu(bits: Array) -> Array:
    return np.where((bits & U2(0x8000)) != 0, U2(0), bits)


def f32_to_bf16(x: Array, relu: bool = False, to_zero: bool = False) -> Array:
    """cvt.rn.bf16.f32, to nearest and of two equally near to the even one; or with to_zero cvt.rz."""
    bits = x.view(U4)
    half = ((bits >> U4(16)) & U4(1)) + U4(0x7FFF)
    rounded = ((bits + (U4(0) if to_zero else half)) >> U4(16)).astype(U2)
    rounded = np.where(x == x, rounded, U2(0x7FFF))
    return _relu(rounded) if relu else rounded


def f32_to_f16(x: Array, relu: bool = False, to_zero: bool = False) -> Array:
    """cvt.rn.f16.f32, or with to_zero cvt.rz."""
    near = x.astype(F2)
    if to_zero:
        near = np.where(np.abs(near.astype(F4)) > np.abs(x), np.nextafter(near, F2(0)), near)
        near = np.where(np.isinf(x), x.astype(F2), near)
    half = np.where(x == x, near.view(U2), U2(0x7FFF))
    return _relu(half) if relu else half


def half(x: Array, shift: int, brain: bool) -> Array:
    """One half of a pair of 16-bit numbers, as float32."""
    bits = (x >> U4(shift)).astype(U2)
    return bf16_to_f32(bits) if brain else bits.view(F2).astype(F4)


def flush(x: Array) -> Array:
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(F4(0), x), x)


def saturate(x: Array) -> Array:
    """.sat: into [0, 1], NaN becomes 0."""
    return np.where(x == x, np.clip(x, F4(0), ONE), F4(0))


def fma32(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32, rounded once.

    The product is exact in float64. Where rounding the sum to float64 and then to float32 could differ from rounding
    once, the sum is rounded to odd (Boldo and Melquiond 2008), after which the second rounding is right.
    """
    product = np.asarray(a, F8) * b
    total = product + c
    near = (total.view(I8) & I8(0x1FFFFFFF)) == I8(0x10000000)
    near |= np.abs(total) < F8(2.0**-125)
    if near.any():
        back = total - product
        error = (product - (total - back)) + (c - back)
        bits = total.view(I8)
        even = (bits & I8(1)) == 0
        up = (error > 0) == (total > 0)
        moved = np.where(up, bits + I8(1), bits - I8(1))
        total = np.where(near & even & (error != 0) & np.isfinite(error) & (total != 0), moved, bits).view(F8)
    return total.astype(F4)


def _extreme(a: Array, b: Array, keep_nan: bool, result: Array, zeros: Any) -> Array:
    a, b = np.broadcast_arrays(a, b)
    result = np.where((a == 0) & (b == 0), zeros(a.view(U4), b.view(U4)).view(F4), result)
    if keep_nan:
        return np.where((a == a) & (b == b), result, NAN)
    return np.where(a != a, np.where(b != b, NAN, b), np.where(b != b, a, result))


def fmin(a: Array, b: Array, keep_nan: bool) -> Array:
    """min.f32: the other operand of a NaN, or with keep_nan (min.NaN.f32) NaN; -0 is below +0."""
    return _extreme(a, b, keep_nan, np.minimum(a, b), np.bitwise_or)


def fmax(a: Array, b: Array, keep_nan: bool) -> Array:
    """max.f32: the other operand of a NaN, or with keep_nan (max.NaN.f32) NaN; -0 is below +0."""
    return _extreme(a, b, keep_nan, np.maximum(a, b), np.bitwise_and)


def _noise(operand: Array) -> Array:
    """A number in [-1, 1) that looks random and that the operand's bits decide."""
    return ((operand.view(U4) * U4(2654435761)) >> U4(8)).astype(F8) / 2.0**23 - 1


def _moved(exact: Array, operand: Array, perturb: float, relative: float) -> Array:
    """The float64 result as float32, moved within the instruction's error bound where that is asked for."""
    return (exact * (1 + perturb * relative * _noise(operand)) if perturb else exact).astype(F4)


def ex2(x: Array, perturb: float) -> Array:
    return _moved(np.exp2(x.astype(F8)), x, perturb, 2.0**-22)


def lg2(x: Array, perturb: float) -> Array:
    """The bound is absolute where the result is near 0."""
    exact = np.log2(x.astype(F8))
    if not perturb:
        return exact.astype(F4)
    error = perturb * 2.0**-22 * _noise(x)
    return np.where((x > 0.5) & (x < 2), exact + error, exact * (1 + error)).astype(F4)


def rcp(x: Array, perturb: float) -> Array:
    return _moved(1 / x.astype(F8), x, perturb, 2.0**-23)


def rsqrt(x: Array, perturb: float) -> Array:
    return _moved(1 / np.sqrt(x.astype(F8)), x, perturb, 2.0**-22.9)


def sqrt_approx(x: Array, perturb: float) -> Array:
    return _moved(np.sqrt(x.astype(F8)), x, perturb, 2.0**-23)


def div_full(a: Array, b: Array, perturb: float) -> Array:
    a, b = (np.array(x, F4) for x in np.broadcast_arrays(a, b))
    return _moved(a.astype(F8) / b, b, perturb, 2.0**-22)


def to_int(x: Array, mode: str, kind: type) -> Array:
    """cvt from a float to an integer, into the integer's range; NaN becomes 0."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(F8))
    info = np.iinfo(kind)
    above, below = rounded >= float(info.max) + 1, rounded < info.min
    inside: Array = np.where(above | below | (rounded != rounded), 0, rounded).astype(kind)
    return np.where(above, kind(info.max), np.where(below, kind(info.min), inside))
