"""Loads, stores and atomics of the running threads, each checked: bounds, alignment, initialisation, races."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.memory import POISON, Buffer
from tests.ptx.races import Clashes, Shadow
from tests.ptx.traffic import Traffic
from tests.ptx.warps import REDUCTIONS
from tests.ptx.writer import LOCAL_BASE, SHARED_BASE

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Array = Any


def _nearly_equal(a: Array, b: Array) -> Array:
    """Equal as float32 but for rounding, also that of a sum which is small beside the others."""
    if a.dtype.itemsize != 4:
        return a == b
    x, y = a.view(np.float32), b.view(np.float32)
    largest = np.abs(y).max(where=np.isfinite(y), initial=0)
    return (a == b) | (np.abs(x - y) <= 1e-5 * np.abs(y) + 1e-7 * largest) & (np.abs(y) > 1e-30)


class _Target:
    """The part of an access that goes to one buffer: the lanes, and the offsets of their bytes in its data."""

    def __init__(self, name: str, data: np.ndarray, granule: int, lanes: Array, offsets: Array,
                 buffer: Buffer | None = None) -> None:  # fmt: skip
        self.name, self.data, self.granule, self.lanes, self.offsets = name, data, granule, lanes, offsets
        self.buffer = buffer

    def view(self, dtype: Any) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        return self.data[: len(self.data) // size * size].view(dtype)

    def granules(self, width: int) -> Array:
        return (self.offsets // self.granule)[:, None] + np.arange(max(1, width // self.granule))


class Access:
    """What global and shared memory have in common. An access is of ``n`` values of ``width`` bytes a lane."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine

    def targets(self, addresses: Array, lanes: Array, width: int, site: int) -> Iterator[_Target]:
        """Finds the bytes of each lane's access, which must lie in bounds and be aligned."""
        raise NotImplementedError

    def shadow(self, target: _Target) -> Shadow | None:
        """Where accesses are noted; for a write it must exist."""
        raise NotImplementedError

    def count(self, traffic: Traffic, addresses: Array, lanes: Array, width: int) -> None:
        """Adds what the access costs."""
        raise NotImplementedError

    def check_written(self, target: _Target, width: int, site: int) -> None:
        """Faults where nobody wrote the bytes. Shared memory is not asked: a reduction reads there, beyond its data,
        what it then drops."""

    def _active(self, mask: Array | None) -> Array:
        return np.arange(self.machine.count) if mask is None else np.nonzero(mask)[0]

    def _counted(self, addresses: Array, lanes: Array, width: int, site: int) -> None:
        if self.machine.options.count:
            self.count(self.machine.traffic_of(site), addresses, lanes, width)

    def load(
        self, addresses: Array, mask: Array | None, site: int, width: int, n: int, strong: bool = False,
        order: str = "relaxed",
    ) -> list[Array]:  # fmt: skip
        """A strong load races with no atomic, as an atomic that changes nothing."""
        lanes = self._active(mask)
        out = [np.zeros(self.machine.count, f"u{width}") for _ in range(n)]
        if len(lanes):
            addresses = addresses[lanes]
            for target in self.targets(addresses, lanes, width * n, site):
                self.check_written(target, width * n, site)
                view, index = target.view(f"u{width}"), target.offsets // width
                for k in range(n):
                    out[k][target.lanes] = view[index + k]
                if strong:
                    self._note_write(target, width * n, site, atomic=True)
                else:
                    self.check_read(target, width * n, site)
            if strong:
                self.machine.scalars.check(site, lanes, addresses, out[0][lanes])
                self._order(lanes, addresses, order)
            self._counted(addresses, lanes, width * n, site)
        return out

    def store(self, addresses: Array, values: list[Array], mask: Array | None, site: int, width: int) -> None:
        lanes = self._active(mask)
        if not len(lanes):
            return
        addresses, total = addresses[lanes], width * len(values)
        for target in self.targets(addresses, lanes, total, site):
            view, index = target.view(f"u{width}"), target.offsets // width
            order = self.machine.any_order(len(target.lanes))
            before = [view[index + k] for k in range(len(values))]
            new = [value[target.lanes].astype(f"u{width}") for value in values]
            for k, value in enumerate(new):
                view[index[order] + k] = value[order]
            after = [view[index + k] for k in range(len(values))]
            self.check_write(target, total, site, before, new, after)
        self._counted(addresses, lanes, total, site)

    def atomic(self, addresses: Array, values: list[Array], mask: Array | None, site: int, width: int, name: str,
               order: str, wanted: bool) -> Array:  # fmt: skip
        """The lanes take their turns in an order that the seed chooses; gives the old values if they are wanted.
        ``order`` is "relaxed", "acquire", "release" or "acq_rel"."""
        lanes = self._active(mask)
        old = np.zeros(self.machine.count, values[0].dtype)
        if not len(lanes):
            return old
        lanes = lanes[self.machine.any_order(len(lanes))]
        for target in self.targets(addresses[lanes], lanes, width, site):
            self.check_written(target, width, site)
            view, index = target.view(values[0].dtype), target.offsets // width
            if not wanted and name in REDUCTIONS:
                REDUCTIONS[name].at(view, index, values[0][target.lanes])
            else:
                for lane, i in zip(target.lanes, index, strict=True):
                    was, x = view[i], values[0][lane]
                    old[lane] = was
                    if name == "cas":
                        view[i] = values[1][lane] if was == x else was
                    else:
                        view[i] = x if name == "exch" else REDUCTIONS[name](was, x)
            self._note_write(target, width, site, atomic=True)
        self._order(lanes, addresses[lanes], order)
        lanes = np.sort(lanes)
        self._counted(addresses[lanes], lanes, width, site)
        return old

    def _order(self, lanes: Array, addresses: Array, order: str) -> None:
        """Notes what lanes pass on and see by accesses of this order."""
        for lane, address in zip(lanes.tolist(), addresses.tolist(), strict=True) if order != "relaxed" else ():
            warp = int(self.machine.warp[lane])
            if order != "release":
                self.machine.clocks.acquire(warp, address)
            if order != "acquire":
                self.machine.clocks.release(warp, int(self.machine.epoch[lane]), address)

    def _warps_and_epochs(self, target: _Target, granules: Array) -> tuple[Array, Array, Array]:
        def spread(x: Array) -> Array:
            return np.broadcast_to(x[target.lanes][:, None], granules.shape).ravel()

        return granules.ravel(), spread(self.machine.warp), spread(self.machine.epoch)

    def check_read(self, target: _Target, width: int, site: int) -> None:
        granules = target.granules(width)
        accesses = self._warps_and_epochs(target, granules)
        shadow = self.shadow(target)
        if shadow is not None:
            clash = shadow.read(*accesses).reshape(granules.shape)
            self._race(target, clash.any(1), site, "read after another's write")
        elif target.buffer is not None:
            target.buffer.reads.append(accesses)

    def _note_write(self, target: _Target, width: int, site: int, atomic: bool) -> Clashes:
        if target.buffer is not None:
            target.buffer.shadow_of_writes(self.machine.warps_per_cta, self.machine.clocks)
        granules = target.granules(width)
        shadow = self.shadow(target)
        assert shadow is not None
        found = shadow.write(*self._warps_and_epochs(target, granules), site, atomic)
        clashes = Clashes(*(clash.reshape(granules.shape).any(1) for clash in found))
        if atomic:
            self._race(target, clashes.prior | clashes.copies, site, "atomic after another's access")
        return clashes

    def check_write(self, target: _Target, width: int, site: int, before: list[Array], own: list[Array],
                    after: list[Array]) -> None:  # fmt: skip
        """Threads that hold copies of one element write it several times. That is no race as long as the bytes agree.

        As float32 they may differ in the last bits: a product contracted into the sum of a reduction rounds differently
        in the two threads of a shuffle. That is noted.
        """
        prior, copies, now = self._note_write(target, width, site, atomic=False)
        source = self.machine.code.sites[site].source
        overwritten = ~np.all([t == o for t, o in zip(after, own, strict=True)], axis=0) & ~now
        for theirs, rows, who in ((before, copies, "several warps"), (after, now | overwritten, "several threads")):
            if not rows.any():
                continue
            same = np.all([t == o for t, o in zip(theirs, own, strict=True)], axis=0)
            near = same | np.all([_nearly_equal(t, o) for t, o in zip(theirs, own, strict=True)], axis=0)
            if (rows & same).any():
                self.machine.result.notes[f"equal values written by {who}: {source}"] += 1
            if (rows & near & ~same).any():
                self.machine.result.notes[f"ALMOST equal values written by {who}: {source}"] += 1
            rows &= ~near
            self._race(target, rows, site, "different values written at one place")
        self._race(target, prior, site, "write after another's access")

    def _race(self, target: _Target, rows: Array, site: int, kind: str) -> None:
        if rows.any():
            self.machine.fault(f"race on {target.name} ({kind})", site, int(target.lanes[rows][0]))

    def check_bounds(self, name: str, offsets: Array, size: int, lanes: Array, width: int, site: int) -> None:
        for bad, what in (
            ((offsets < 0) | (offsets + width > size), "out of bounds"),
            ((offsets & (width - 1)) != 0, "misaligned"),
        ):
            if bad.any():
                where = f"{width} bytes at offset {offsets[bad][0]} of {name}, which has {size}"
                self.machine.fault(f"{what}: {where}", site, int(lanes[bad][0]))


class GlobalMemory(Access):
    def targets(self, addresses: Array, lanes: Array, width: int, site: int) -> Iterator[_Target]:
        for buffer, which, offsets in self.machine.memory.split(addresses):
            here = lanes[which]
            if buffer is None:
                self.machine.fault(f"address {addresses[which][0]:#x} belongs to no tensor", site, int(here[0]))
            self.check_bounds(buffer.name, offsets, len(buffer.data), here, width, site)
            yield _Target(buffer.name, buffer.data, buffer.granule, here, offsets, buffer)

    def shadow(self, target: _Target) -> Shadow | None:
        return target.buffer.shadow if target.buffer else None

    def count(self, traffic: Traffic, addresses: Array, lanes: Array, width: int) -> None:
        traffic.add_global(addresses, lanes, width)

    def check_written(self, target: _Target, width: int, site: int) -> None:
        buffer = target.buffer
        if buffer is None or not buffer.poisoned or buffer.granule == 1:
            return
        pieces = target.data[target.offsets[:, None] + np.arange(width)].reshape(len(target.lanes), -1, buffer.granule)
        bad = (pieces == POISON).all(2).any(1)
        if bad.any():
            where = f"offset {target.offsets[bad][0]} of {target.name}"
            self.machine.fault(f"{where} is read, but never written", site, int(target.lanes[bad][0]))


class SharedMemory(Access):
    """The shared memories of the running CTAs, one after the other; a lane's offsets are within its own CTA's."""

    def __init__(self, machine: "Machine", ctas: int, size: int) -> None:
        super().__init__(machine)
        self.size, self.span = size, -(-size // 16) * 16
        self.data = machine.random.integers(0, 256, ctas * self.span, np.uint8)
        self.granule = machine.program.shared_granule
        self._shadow = Shadow(ctas * self.span // self.granule + 1, machine.warps_per_cta)

    def targets(self, addresses: Array, lanes: Array, width: int, site: int) -> Iterator[_Target]:
        offsets = addresses.astype(np.int64) - SHARED_BASE
        self.check_bounds("shared memory", offsets, self.size, lanes, width, site)
        offsets = self.machine.local_cta[lanes] * self.span + offsets
        yield _Target("shared memory", self.data, self.granule, lanes, offsets)

    def shadow(self, target: _Target) -> Shadow | None:
        return self._shadow

    def count(self, traffic: Traffic, addresses: Array, lanes: Array, width: int) -> None:
        traffic.add_shared(addresses.astype(np.int64) - SHARED_BASE, lanes, width)

    def _rows(self, addresses: Array, lanes: Array, n: int, site: int) -> _Target:
        """The rows of n matrices of 8x8 16-bit numbers, 16 bytes each, whose addresses the first 8 n lanes give."""
        givers = lanes[(lanes & 31) < 8 * n]
        (target,) = self.targets(addresses[givers], givers, 16, site)
        return target

    def load_matrix(
        self, addresses: Array, mask: Array | None, site: int, n: int, transposed: bool = False
    ) -> list[Array]:
        """ldmatrix: lane l gets numbers 2 (l mod 4) and the next of row l / 4 of each matrix, or of its transpose."""
        lanes = self._active(mask)
        target = self._rows(addresses, lanes, n, site)
        self.check_read(target, 16, site)
        row_of = np.zeros(self.machine.count, np.int64)
        row_of[target.lanes] = target.offsets
        halves, pair, row = target.view(np.uint16), 2 * (lanes & 3), (lanes & 31) // 4
        out = []
        for matrix in range(n):
            first = (lanes & ~31) + 8 * matrix
            low, high = (
                halves[row_of[first + (pair + k if transposed else row)] // 2 + (row if transposed else pair + k)]
                for k in (0, 1)
            )
            values = np.zeros(self.machine.count, np.uint32)
            values[lanes] = low | (high.astype(np.uint32) << np.uint32(16))
            out.append(values)
        self._counted(addresses[target.lanes], target.lanes, 16, site)
        return out

    def read_pieces(self, addresses: Array, lanes: Array, site: int) -> Array:
        """Pieces of 16 bytes at addresses (lanes, rows, pieces), which a lane of each warp stands for: (lanes, rows,
        4 pieces) words of 32 bits."""
        flat, each = addresses.reshape(-1), addresses[0].size
        (target,) = self.targets(flat, np.repeat(lanes, each), 16, site)
        self.check_read(target, 16, site)
        words = target.view(np.uint32)[(target.offsets // 4)[:, None] + np.arange(4)]
        return words.reshape(*addresses.shape[:2], -1)

    def store_matrix(
        self, addresses: Array, values: list[Array], mask: Array | None, site: int, transposed: bool = False
    ) -> None:
        """stmatrix: the reverse of :meth:`load_matrix`."""
        target = self._rows(addresses, self._active(mask), len(values), site)
        view, row = target.view(np.uint32), target.offsets // 4
        matrix, first = (target.lanes & 31) // 8, (target.lanes & ~31) + 4 * (target.lanes & 7)
        stacked = np.stack(values)
        if transposed:  # number c of row r is half r mod 2 of lane 4 c + r / 2
            halves, r = np.ascontiguousarray(stacked).view(np.uint16).reshape(*stacked.shape, 2), target.lanes & 7
            numbers = [halves[matrix, (target.lanes & ~31) + 4 * c + r // 2, r % 2].astype(np.uint32) for c in range(8)]
            own = [numbers[2 * q] | (numbers[2 * q + 1] << np.uint32(16)) for q in range(4)]
        else:
            own = [stacked[matrix, first + q] for q in range(4)]
        before = [view[row + q] for q in range(4)]
        for q in range(4):
            view[row + q] = own[q]
        after = [view[row + q] for q in range(4)]
        self.check_write(target, 16, site, before, own, after)
        self._counted(addresses[target.lanes], target.lanes, 16, site)


class LocalMemory(Access):
    """A thread's own memory, which no other thread sees. The threads' memories lie one after the other."""

    def __init__(self, machine: "Machine") -> None:
        super().__init__(machine)
        self.size = machine.program.local_bytes
        self.span = -(-self.size // 16) * 16
        self.data = machine.random.integers(0, 256, machine.count * self.span, np.uint8)

    def targets(self, addresses: Array, lanes: Array, width: int, site: int) -> Iterator[_Target]:
        offsets = addresses.astype(np.int64) - LOCAL_BASE
        self.check_bounds("local memory", offsets, self.size, lanes, width, site)
        yield _Target("local memory", self.data, 1, lanes, lanes * self.span + offsets)

    def shadow(self, target: _Target) -> Shadow | None:
        return None

    def check_write(self, target: _Target, width: int, site: int, before: list[Array], own: list[Array],
                    after: list[Array]) -> None:  # fmt: skip
        """Nobody else accesses it."""

    def count(self, traffic: Traffic, addresses: Array, lanes: Array, width: int) -> None:
        """The same place of the 32 threads of a warp lies next to each other."""
        places = (addresses.astype(np.uint64) - np.uint64(LOCAL_BASE)) * np.uint64(32)
        traffic.add_global(places + (lanes & 31).astype(np.uint64) * np.uint64(width), lanes, width)
