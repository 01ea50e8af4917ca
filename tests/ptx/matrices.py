"""Products of matrices by the warps of a CTA: mma of one warp, and wgmma of four, whose matrices lie in shared memory.

A product is exact in float64 and rounded to float32. The hardware adds in an order that is not documented.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.floats import bf16_to_f32
from tests.ptx.memory import Fault

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Array = Any

_WIDTHS = {1: 128, 2: 64, 3: 32}  # bytes from row to row, by the two upper bits of a descriptor


def _values(words: Array, brain: bool) -> Array:
    """The two numbers of each word, the lower half first: (..., n) words as (..., 2 n) float64."""
    halves = np.ascontiguousarray(words).view(np.uint16)
    return (bf16_to_f32(halves) if brain else halves.view(np.float16)).astype(np.float64)


def _per_warp(machine: "Machine", registers: list[Array], warps: Array) -> Array:
    """Registers of the lanes of some warps: (warps, lanes, registers)."""
    return np.stack([machine.full(x).reshape(-1, 32)[warps] for x in registers], axis=-1)


def _whole_warps(machine: "Machine", mask: Array | None) -> Array:
    return np.arange(machine.count // 32) if mask is None else np.nonzero(mask.reshape(-1, 32).all(1))[0]


def _to_registers(machine: "Machine", values: Array, warps: Array) -> list[Array]:
    """float32 (warps, lanes, n) as n registers; other warps' lanes hold zeros, which nobody takes."""
    out = np.zeros((values.shape[2], machine.count // 32, 32), np.float32)
    out[:, warps] = np.moveaxis(values, 2, 0)
    return [*out.reshape(values.shape[2], -1)]


def mma(machine: "Machine", a: list[Array], b: list[Array], c: list[Array], brain: bool, mask: Array | None) -> Any:
    """mma.m16n8k16: lane l holds, of a 16x16 and b 16x8, pairs along k that begin at 2 (l mod 4), in row or column
    l / 4, and eight further on; of c and the result 16x8, pairs along n in row l / 4."""
    warps = _whole_warps(machine, mask)
    pairs = _values(_per_warp(machine, a, warps), brain).reshape(-1, 8, 4, 2, 2, 2)  # row, pair, k high, row high, half
    rows = pairs.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
    columns = _values(_per_warp(machine, b, warps), brain).reshape(-1, 8, 4, 2, 2).transpose(0, 1, 3, 2, 4)
    product = rows @ columns.reshape(-1, 8, 16).transpose(0, 2, 1)  # (warps, 16, 8)
    parts = product.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(-1, 32, 4)
    total = (parts + _per_warp(machine, c, warps)).astype(np.float32)
    return _to_registers(machine, total, warps)


def _rows_in_shared(
    machine: "Machine", descriptor: Array, m: Array, pieces: int, site: int, lanes: Array, across: bool = False
) -> Array:
    """Rows m (warps, rows) of so many pieces of 16 bytes, of the matrix that a descriptor of each warp describes.

    Row m begins at start + (m / 8) stride + (m mod 8) width. With ``across``, pieces beyond the width lie further on,
    by the leading offset. Then bits 4 and up of an address are changed by bits 7 and up, two of them at a width of 64.
    """
    mode = int(descriptor[0] >> np.uint64(62))
    if mode not in _WIDTHS:
        raise Fault(f"{machine.code.sites[site].text}: a matrix in shared memory that is not swizzled")
    width, piece = _WIDTHS[mode], 16 * np.arange(pieces)
    start, leading, stride = (
        ((descriptor >> np.uint64(bit)) & np.uint64(0x3FFF)).astype(np.int64)[:, None] << 4 for bit in (0, 16, 32)
    )
    along = piece % width + piece // width * leading if across else np.broadcast_to(piece, (len(lanes), pieces))
    address = (start + (m // 8) * stride + (m % 8) * width)[:, :, None] + along[:, None]
    address ^= ((address >> 7) & (width // 16 - 1)) << 4
    return machine.shared_memory.read_pieces(address, lanes, site)


def wgmma(
    machine: "Machine", a: Array, b: Array, c: list[Array], n: int, accumulate: Array, brain: bool, b_across: bool,
    mask: Array | None, site: int,
) -> list[Array]:  # fmt: skip
    """wgmma.m64nNk16: warp w of four computes rows 16 w to 16 w + 15; a lane holds pairs along n in rows l / 4 and
    eight further on, for each eight columns. In the memory of b k runs fastest, or n with ``b_across``."""
    warps = _whole_warps(machine, mask)
    lanes = 32 * warps
    a, b, accumulate = (machine.full(x)[lanes] for x in (a, b, accumulate))
    own = 16 * (warps % machine.warps_per_cta % 4)[:, None] + np.arange(16)
    rows = _values(_rows_in_shared(machine, a, own, 2, site, lanes), brain)
    numbers, pieces = (16, n // 8) if b_across else (n, 2)
    every = np.tile(np.arange(numbers), (len(warps), 1))
    columns = _values(_rows_in_shared(machine, b, every, pieces, site, lanes, b_across), brain)
    product = rows @ (columns if b_across else columns.transpose(0, 2, 1))  # (warps, 16, n)
    parts = product.reshape(-1, 2, 8, n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(-1, 32, n // 2)
    before = np.where(accumulate[:, None, None], _per_warp(machine, c, warps), np.float32(0))
    return _to_registers(machine, (parts + before).astype(np.float32), warps)


class AsyncCopies:
    """cp.async: copies from global into shared memory, done when a thread waits for their group and not before.

    So a thread that reads without having waited sees what was there before.
    """

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._groups = np.zeros(machine.count, np.int64)  # that a thread has committed
        self._pending: list[tuple[Array, Array, Array, list[Array], int, int]] = []

    def copy(self, to: Array, source: Array, size: Array, mask: Array | None, site: int, width: int) -> None:
        """``size`` bytes are copied, none or all, and zeros make up the rest."""
        machine = self._machine
        active = np.ones(machine.count, bool) if mask is None else mask
        size = machine.full(size)
        if (active & (size != 0) & (size != width)).any():
            raise Fault(f"{machine.code.sites[site].text}: part of a copy")
        each = min(width, 4)
        words = machine.global_memory.load(source, active & (size == width), site, each, width // each)
        self._pending.append((active, self._groups.copy(), to, words, site, each))

    def commit(self, mask: Array | None) -> None:
        self._groups = self._groups + (1 if mask is None else mask)

    def wait(self, groups: int, mask: Array | None) -> None:
        """Do the copies of all groups but the latest ``groups``."""
        pending, self._pending = self._pending, []
        for active, group, to, words, site, each in pending:
            done = active & (group < self._groups - groups)
            if mask is not None:
                done &= mask
            if done.any():
                self._machine.shared_memory.store(to, words, done, site, each)
            left = active & ~done
            if left.any():
                self._pending.append((left, group, to, words, site, each))
