"""The emulator's instructions on integers and bits, each against Python's integers."""

import numpy as np
import pytest

from tests.ptx.instruction import execute

U4, I4 = np.uint32, np.int32
RANDOM = np.random.default_rng(0)


def u32(values: list[int]) -> np.ndarray:
    return np.array(values, U4)


def integers(kind: str, count: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    info = np.iinfo(kind)
    corners = np.array([0, 1, 2, 7, info.min, info.max, info.max - 1], kind)
    a, b = (x.ravel() for x in np.meshgrid(corners, corners))
    random = [
        RANDOM.integers(info.min, info.max, count, dtype=kind) >> RANDOM.integers(0, 30, count).astype(kind)
        for _ in range(2)
    ]
    return np.concatenate((a, random[0])), np.concatenate((b, random[1]))


def wrapped(x: int, kind: str) -> int:
    size = 8 * np.dtype(kind).itemsize
    x &= (1 << size) - 1
    return x - (1 << size) if kind[0] == "i" and x >> (size - 1) else x


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", ["i4", "u4", "i8", "u8"])
@pytest.mark.parametrize(
    ("opcode", "exact"),
    [
        ("add", lambda a, b, bits: a + b),
        ("sub", lambda a, b, bits: a - b),
        ("mul.lo", lambda a, b, bits: a * b),
        ("mul.hi", lambda a, b, bits: (a * b) >> bits),
        ("div", lambda a, b, bits: towards_zero(a, b) if b else None),
        ("rem", lambda a, b, bits: a - towards_zero(a, b) * b if b else None),
        ("min", lambda a, b, bits: min(a, b)),
        ("max", lambda a, b, bits: max(a, b)),
    ],
)
def test_integer_arithmetic(opcode, exact, kind):
    width = 8 * int(kind[1])
    name = f"{'s' if kind[0] == 'i' else 'u'}{width}"
    a, b = integers(kind)
    ours = execute(f"{opcode}.{name}", f"{name} {name} {name}", a, b)
    for x, y, got in zip(a.tolist(), b.tolist(), ours.tolist(), strict=True):
        expected = exact(x, y, width)
        assert expected is None or got == wrapped(expected, kind), (x, y)


def test_wide_products():
    a, b = integers("i4")
    assert execute("mul.wide.s32", "s64 s32 s32", a, b).tolist() == [
        x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    c = np.arange(len(a), dtype=np.int64)
    ours = execute("mad.wide.s32", "s64 s32 s32 s64", a, b, c).tolist()
    assert ours == [x * y + z for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]


def test_pairs_of_integers():
    a, b = integers("u4")
    for name, operation in (("add.s16x2", int.__add__), ("sub.u16x2", int.__sub__)):
        halves = [
            [operation(x >> s, y >> s) & 0xFFFF for s in (0, 16)] for x, y in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert execute(name, "b32 b32 b32", a, b).tolist() == [low | high << 16 for low, high in halves]


@pytest.mark.parametrize("kind", ["i4", "u4", "u8"])
def test_shifts_by_more_than_the_width(kind):
    width = 8 * int(kind[1])
    a, _ = integers(kind)
    n = RANDOM.integers(0, 2 * width, len(a)).astype(U4)
    name = f"{'s' if kind[0] == 'i' else 'u'}{width}"
    left = execute(f"shl.b{width}", f"b{width} b{width} u32", a.view(f"u{kind[1]}"), n)
    assert left.tolist() == [wrapped(x << s, f"u{kind[1]}") for x, s in zip(a.tolist(), n.tolist(), strict=True)]
    right = execute(f"shr.{name}", f"{name} {name} u32", a, n)
    assert right.tolist() == [x >> s for x, s in zip(a.tolist(), n.tolist(), strict=True)]


def test_bits():
    a, b = (x.view(U4) for x in integers("u4"))
    c = RANDOM.integers(0, 2**32 - 1, len(a), dtype=U4)
    rows = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    assert execute("popc.b32", "b32 b32", a).tolist() == [x.bit_count() for x, _, _ in rows]
    assert execute("clz.b32", "b32 b32", a).tolist() == [32 - x.bit_length() for x, _, _ in rows]
    assert execute("bfind.u32", "u32 u32", a).tolist() == [(x.bit_length() - 1) % 2**32 for x, _, _ in rows]
    assert execute("brev.b32", "b32 b32", a).tolist() == [int(f"{x:032b}"[::-1], 2) for x, _, _ in rows]
    majority = [(x & y) | (x & z) | (y & z) for x, y, z in rows]
    assert execute("lop3.b32", "b32 b32 b32 b32", a, b, c, immediates=("0xe8",)).tolist() == majority
    funnel = [((x | y << 32) >> (z & 31)) & 0xFFFFFFFF for x, y, z in rows]
    assert execute("shf.r.wrap.b32", "b32 b32 b32 b32", a, b, c).tolist() == funnel
    picked = [int.from_bytes(((x | y << 32) >> 8 * n & 255 for n in (3, 4, 0, 7)), "little") for x, y, _ in rows]
    assert execute("prmt.b32", "b32 b32 b32", a, b, immediates=("0x7043",)).tolist() == picked
    start, length = c & U4(31), (c >> U4(8)) & U4(31)
    field = [x >> s & ((1 << n) - 1) for x, s, n in zip(a.tolist(), start.tolist(), length.tolist(), strict=True)]
    assert execute("bfe.u32", "u32 u32 u32 u32", a, start, length).tolist() == field


def test_signed_bit_fields():
    x = np.array([0b1011_0110] * 3, I4)
    assert execute("bfe.s32", "s32 s32 u32 u32", x, u32([1, 4, 0]), u32([3, 4, 0])).tolist() == [3, -5, 0]
