"""What the 32 threads of a warp do together: shuffles, votes, reductions."""

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.memory import Fault

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Array = Any

REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


class Warps:
    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._sources: dict[tuple[str, int, int, int], tuple[Array, Array]] = {}

    def check_members(self, members: Array, active: Array | None, site: int) -> None:
        """Only the whole warp is modelled."""
        partial = np.asarray(members) != np.uint32(0xFFFFFFFF)
        if (partial if active is None else partial & active).any():
            raise Fault(f"{self._machine.code.sites[site].text}: a mask of members that is not the whole warp")

    def shuffle(self, mode: str, a: Array, b: Array, c: Array) -> tuple[Array, Array]:
        """shfl: the value of another lane, and whether that lane is within the segment."""
        machine = self._machine
        if np.ndim(b) or np.ndim(c):
            source, valid = self._source(mode, b, c)
        else:
            key = mode, int(b), int(c), machine.count
            if key not in self._sources:
                self._sources[key] = self._source(mode, b, c)
            source, valid = self._sources[key]
        return machine.full(a)[source], valid

    def _source(self, mode: str, b: Array, c: Array) -> tuple[Array, Array]:
        lane = self._machine.laneid.astype(np.int64)
        b, c = np.asarray(b).astype(np.int64), np.asarray(c).astype(np.int64)
        value, clamp, segment = b & 31, c & 31, (c >> 8) & 31
        last = (lane & segment) | (clamp & ~segment & 31)
        source = {
            "up": lane - value,
            "down": lane + value,
            "bfly": lane ^ value,
            "idx": (lane & segment) | (value & ~segment & 31),
        }[mode]
        valid = source >= last if mode == "up" else source <= last
        return np.arange(len(lane)) - lane + np.where(valid, source, lane), valid

    def reduce(self, a: Array, name: str) -> Array:
        """redux: one value of the whole warp, for each of its lanes."""
        rows = self._machine.full(a).reshape(-1, 32)
        return np.repeat(REDUCTIONS[name].reduce(rows, axis=1, dtype=rows.dtype), 32)

    def vote(self, predicate: Array, mode: str) -> Array:
        """vote: whether the predicate holds in any or all lanes, or one bit of each lane."""
        rows = self._machine.full(predicate).reshape(-1, 32)
        if mode == "ballot":
            bits = (rows.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
            return np.repeat(bits.astype(np.uint32), 32)
        result = {"any": rows.any(1), "all": rows.all(1), "uni": rows.all(1) | ~rows.any(1)}[mode]
        return np.repeat(result, 32)
