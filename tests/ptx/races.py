"""Who last wrote and who read each piece of a memory, so that unordered accesses are seen.

Two accesses of one byte race if at least one is a plain write and they come from different programs (CTAs), or from
different warps of a program without a barrier between them. Atomics do not race with each other, and what one program
released and another acquired afterwards is in order (``clocks.py``). Of several atomics at one place the last is
remembered, and a barrier of part of a program's threads is taken for one of all.
"""

import mmap
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.clocks import Clocks

Array = Any

_SEVERAL_WARPS, _SEVERAL_CTAS = -2, -3


def _zeros(size: int, kind: str) -> np.ndarray:
    """Zeros whose memory is taken only where it is touched, however many there are."""
    if size < 1 << 24:
        return np.zeros(size, kind)
    map_noreserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve
    return np.frombuffer(mmap.mmap(-1, size * np.dtype(kind).itemsize, flags), kind)


class Clashes(NamedTuple):
    """Of each granule of a write, whether it races."""

    prior: Array
    """With an access before, other than a write of the same instruction."""
    copies: Array
    """With an earlier write of the same instruction, which is harmless if it wrote the same bytes."""
    now: Array
    """With another write of this very step."""


class Shadow:
    """The last accesses to each granule of a memory.

    Warps are counted from 1 over all CTAs, and CTAs from 1; 0 is nobody. The epoch of an access is the number of
    barriers that its CTA had passed. Without clocks no two programs are in order.
    """

    def __init__(self, size: int, warps_per_cta: int, clocks: Clocks | None = None) -> None:
        self.warps_per_cta, self.clocks = warps_per_cta, clocks
        self.writer, self.write_epoch, self.atomic = _zeros(size, "i4"), _zeros(size, "i4"), _zeros(size, "?")
        self.site = _zeros(size, "i4")  # which instruction wrote last
        self.reader, self.reader_cta, self.read_epoch = _zeros(size, "i4"), _zeros(size, "i4"), _zeros(size, "i4")

    def _cta(self, warp: Array) -> Array:
        return (warp - 1) // self.warps_per_cta + 1

    def _other_writer(self, index: Array, warp: Array, epoch: Array, atomic: bool) -> Array:
        writer = self.writer[index]
        unordered = (self._cta(writer) != self._cta(warp)) | (self.write_epoch[index] == epoch)
        clash = (writer > 0) & (writer != warp) & unordered
        if self.clocks and clash.any():
            clash[clash] = ~self.clocks.ordered(warp[clash], self._cta(writer[clash]), self.write_epoch[index[clash]])
        return clash & ~self.atomic[index] if atomic else clash

    def _other_reader(self, index: Array, warp: Array, epoch: Array) -> Array:
        reader, cta = self.reader[index], self.reader_cta[index]
        same_cta = cta == self._cta(warp)
        elsewhere = (reader == _SEVERAL_CTAS) | ((cta > 0) & ~same_cta)
        if self.clocks and elsewhere.any():
            ordered = self.clocks.ordered(warp[elsewhere], cta[elsewhere], self.read_epoch[index[elsewhere]])
            elsewhere[elsewhere] = ~ordered | (reader[elsewhere] == _SEVERAL_CTAS)
        return elsewhere | (same_cta & (self.read_epoch[index] == epoch) & (reader != warp) & (reader != 0))

    def read(self, index: Array, warp: Array, epoch: Array) -> Array:
        """Notes reads, and gives which of them race with a write."""
        clash = self._other_writer(index, warp, epoch, False)
        cta = self._cta(warp)
        reader, old_cta = self.reader[index], self.reader_cta[index]
        several = (reader != 0) & (old_cta == cta) & (self.read_epoch[index] == epoch) & (reader != warp)
        value = np.where(several, _SEVERAL_WARPS, warp)
        value = np.where((reader == _SEVERAL_CTAS) | ((old_cta > 0) & (old_cta != cta)), _SEVERAL_CTAS, value)
        self.reader[index], self.reader_cta[index], self.read_epoch[index] = value, cta, epoch
        lost = self.reader_cta[index] != cta  # another CTA read the same in this very step
        if lost.any():
            self.reader[index[lost]] = _SEVERAL_CTAS
        lost = (self.reader[index] != warp) & (value == warp) & ~lost
        if lost.any():
            which = index[lost]
            self.reader[which] = np.where(self.reader[which] == _SEVERAL_CTAS, _SEVERAL_CTAS, _SEVERAL_WARPS)
        return clash

    def write(self, index: Array, warp: Array, epoch: Array, site: int, atomic: bool) -> Clashes:
        """Notes writes of the instruction ``site``, and gives which of them race."""
        writer = self._other_writer(index, warp, epoch, atomic)
        copies = writer & (self.site[index] == site)
        prior = (writer & ~copies) | self._other_reader(index, warp, epoch)
        self.writer[index], self.write_epoch[index], self.atomic[index] = warp, epoch, atomic
        self.site[index] = site
        return Clashes(prior, copies, np.zeros_like(prior) if atomic else self.writer[index] != warp)
