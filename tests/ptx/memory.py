"""The GPU's global memory: each buffer is the bytes of one tensor's storage, at an address of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.clocks import Clocks
from tests.ptx.races import Shadow

Array = Any

_SLOT_BITS = 32  # a buffer has 2^32 addresses of its own
_FIRST = 512  # a buffer's first address within them, aligned as CUDA's allocator aligns


POISON = 0xCB
"""What every byte of a new tensor holds; an element of several such bytes was never written."""


class Fault(Exception):
    """The program did what would be undefined, or would crash or hang, on a GPU."""


@dataclass(eq=False)
class Buffer:
    """The bytes of one storage.

    Args:
        data: the bytes, which are the tensor's own.
        granule: bytes of the smallest piece in which races are looked for: the tensor's elements.
        poisoned: whether it began with :data:`POISON` in every byte, so that a read of what nobody wrote is seen.
        shadow: the accesses of the running launch, once there was a write.
        reads: the accesses before, as arguments of :meth:`Shadow.read`.
    """

    name: str
    data: np.ndarray
    base: int
    granule: int = 1
    poisoned: bool = False
    shadow: Shadow | None = None
    reads: list[tuple[Array, Array, Array]] = field(default_factory=list)

    def shadow_of_writes(self, warps_per_cta: int, clocks: Clocks) -> Shadow:
        """The shadow, made at the first write: most buffers are only read."""
        if self.shadow is None:
            self.shadow = Shadow(len(self.data) // self.granule + 1, warps_per_cta, clocks)
            for read in self.reads:
                self.shadow.read(*read)
            self.reads = []
        return self.shadow


class Memory:
    """All buffers. An address tells its buffer by the upper bits, so no access reaches another's by accident."""

    def __init__(self) -> None:
        self._buffers: dict[int, Buffer] = {}
        self._next_slot = 0x7F00

    def add(self, name: str, data: np.ndarray, granule: int = 1) -> Buffer:
        slot = self._next_slot
        self._next_slot += ((_FIRST + len(data)) >> _SLOT_BITS) + 2
        buffer = Buffer(name, data, (slot << _SLOT_BITS) + _FIRST, granule)
        self._buffers |= dict.fromkeys(range(slot, self._next_slot - 1), buffer)
        return buffer

    def drop(self, buffer: Buffer) -> None:
        self._buffers = {slot: other for slot, other in self._buffers.items() if other is not buffer}

    def contents(self) -> dict[Buffer, np.ndarray]:
        """A copy of all bytes."""
        return {buffer: buffer.data.copy() for buffer in {*self._buffers.values()}}

    def begin_launch(self) -> None:
        """Forgets the accesses of the launch before, with which those of the next do not race."""
        for buffer in self._buffers.values():
            buffer.shadow, buffer.reads = None, []

    def split(self, addresses: np.ndarray) -> Iterator[tuple[Buffer | None, Any, np.ndarray]]:
        """Of each buffer that is accessed: the buffer, which of the addresses lie in it, and their offsets."""
        slots = addresses >> np.uint64(_SLOT_BITS)
        for slot in slots[:1] if (slots == slots[0]).all() else np.unique(slots):
            which = slice(None) if (slots == slot).all() else np.nonzero(slots == slot)[0]
            buffer = self._buffers.get(int(slot))
            base = buffer.base if buffer else int(slot) << _SLOT_BITS
            yield buffer, which, (addresses[which] - np.uint64(base)).astype(np.int64)
