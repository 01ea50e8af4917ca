"""What PTX's integer and bit instructions compute, on numpy arrays with one entry a thread."""

from typing import Any

import numpy as np

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I1, I2, I4, I8 = np.int8, np.int16, np.int32, np.int64

Array = Any  # a numpy array of one entry a thread, or a numpy scalar where all threads hold the same

_LOW, _HIGH = np.uint32(0xFFFF), np.uint32(0xFFFF0000)


def _bits(x: Array) -> int:
    return 8 * x.dtype.itemsize


def int_div(a: Array, b: Array) -> Array:
    """div: rounded towards zero; all bits set where b is 0."""
    safe = np.where(b == 0, np.ones_like(b), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(quotient), quotient)


def int_rem(a: Array, b: Array) -> Array:
    """rem: the remainder, of the sign of a."""
    return a - int_div(a, b) * b


def mul_hi(a: Array, b: Array, kind: type) -> Array:
    """mul.hi: the upper half of the product."""
    bits = 8 * np.dtype(kind).itemsize
    if bits < 64:
        wide = I8 if np.dtype(kind).kind == "i" else U8
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(kind)
    a, b = np.broadcast_arrays(a, b)
    return np.array([(int(x) * int(y)) >> 64 & (2**64 - 1) for x, y in zip(a, b, strict=True)], U8).view(kind)


def shl(a: Array, n: Array) -> Array:
    """shl: a shift by the width or more gives 0."""
    bits = _bits(a)
    shifted = a << np.minimum(n, U4(bits - 1)).astype(a.dtype)
    return shifted if np.ndim(n) == 0 and n < bits else np.where(n >= bits, np.zeros_like(a), shifted)


def shr(a: Array, n: Array) -> Array:
    """shr: a shift by the width or more gives 0, or for signed integers the sign."""
    bits = _bits(a)
    shifted = a >> np.minimum(n, U4(bits - 1)).astype(a.dtype)
    if a.dtype.kind == "i" or (np.ndim(n) == 0 and n < bits):
        return shifted
    return np.where(n >= bits, np.zeros_like(a), shifted)


def funnel(low: Array, high: Array, n: Array, left: bool, wrap: bool) -> Array:
    """shf: 32 bits of the 64 of high and low, shifted."""
    n = (n & U4(31)) if wrap else np.minimum(n, U4(32))
    both = (np.asarray(high, U8) << U8(32)) | np.asarray(low, U8)
    return ((both << n.astype(U8)) >> U8(32) if left else both >> n.astype(U8)).astype(U4)


def bfe(a: Array, start: Array, length: Array) -> Array:
    """bfe: the bits from start on, extended by the sign for signed integers."""
    bits = _bits(a)
    start, length = (start & U4(255)).astype(I8), (length & U4(255)).astype(I8)
    wide = a.astype(f"u{a.dtype.itemsize}").astype(U8)
    moved = np.where(start < 64, wide >> np.minimum(start, 63).astype(U8), U8(0))
    mask = np.where(length >= 64, U8(2**64 - 1), (U8(1) << np.minimum(length, 63).astype(U8)) - U8(1))
    field = moved & mask
    if a.dtype.kind == "i":
        top = np.minimum(start + length - 1, bits - 1)
        sign = (wide >> np.maximum(top, 0).astype(U8)) & U8(1)
        field = np.where((sign != 0) & (length > 0), field | ~mask, field)
    return field.astype(f"u{a.dtype.itemsize}").view(a.dtype)


def bfi(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: b with the lowest bits of a from start on."""
    bits = _bits(b)
    start, length = (start & U4(255)).astype(U8), (length & U4(255)).astype(U8)
    mask = np.where(length >= bits, U8(2**bits - 1), (U8(1) << np.minimum(length, U8(63))) - U8(1))
    mask = np.where(start >= bits, U8(0), (mask << np.minimum(start, U8(63))) & U8(2**bits - 1))
    inserted = a.astype(U8) << np.minimum(start, U8(63))
    return ((b.astype(U8) & ~mask) | (inserted & mask)).astype(b.dtype)


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four of the eight bytes of a and b, each perhaps replaced by its sign."""
    both = np.asarray(a, U8) | (np.asarray(b, U8) << U8(32))
    result: Array = U4(0)
    for n in range(4):
        nibble = (np.asarray(selector, U4) >> U4(4 * n)) & U4(15)
        byte = ((both >> ((nibble & U4(7)).astype(U8) * U8(8))) & U8(255)).astype(U4)
        byte = np.where((nibble & U4(8)) != 0, np.where((byte & U4(128)) != 0, U4(255), U4(0)), byte)
        result = result | (byte << U4(8 * n))
    return result


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits, by its table of eight."""
    result = np.zeros_like(np.broadcast_arrays(a, b, c)[0])
    for n in range(8):
        if table >> n & 1:
            result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return result


def clz(x: Array) -> Array:
    """clz: zeros above the highest bit that is set."""
    count, rest = np.full(np.shape(x), _bits(x), U4), np.array(x)
    while (rest != 0).any():
        count = count - (rest != 0).astype(U4)
        rest = rest >> rest.dtype.type(1)
    return count


def bfind(x: Array, shift_amount: bool) -> Array:
    """bfind: the place of the highest bit that differs from the sign, or how far it is from the top."""
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x)
    x = x.view(f"u{x.dtype.itemsize}")
    place = U4(_bits(x) - 1) - clz(x)
    return np.where(x == 0, U4(0xFFFFFFFF), U4(_bits(x) - 1) - place if shift_amount else place)


def brev(x: Array) -> Array:
    """brev: the bits in reverse."""
    bits, one = _bits(x), x.dtype.type(1)
    result = np.zeros_like(x)
    for n in range(bits):
        result = result | (((x >> x.dtype.type(n)) & one) << x.dtype.type(bits - 1 - n))
    return result


def add_halves(a: Array, b: Array) -> Array:
    """Two sums of 16 bits."""
    return ((a + b) & _LOW) | ((a & _HIGH) + (b & _HIGH))


def sub_halves(a: Array, b: Array) -> Array:
    """Two differences of 16 bits."""
    return ((a - b) & _LOW) | ((a & _HIGH) - (b & _HIGH))
