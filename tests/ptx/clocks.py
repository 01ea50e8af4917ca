"""Who has learnt of what other programs wrote: releases and acquires (Lamport 1978; vector clocks, Mattern 1989).

A program releases what it has written by an atomic with that semantics, and whoever acquires by an atomic at the same
address afterwards sees it. What a program wrote is counted by the barriers it had passed: by one thread's release the
writes before the last barrier are passed on, of all threads, and by one thread's acquire they are seen by its own warp
at once and by the others behind their next barrier. That lanes of one warp must meet to see what another of them has
acquired is left out.
"""

from typing import Any

import numpy as np

Array = Any


class Clocks:
    """Of each warp, up to which barrier of every program it sees what that wrote.

    Warps are counted from 1 over all CTAs, and CTAs from 1, as in :class:`tests.ptx.races.Shadow`.
    """

    def __init__(self, ctas: int, warps_per_cta: int) -> None:
        self._ctas, self._warps_per_cta = ctas, warps_per_cta
        self._seen: dict[int, Array] = {}  # of a warp: of each CTA, the barriers before which its writes are seen
        self._passed_on: dict[int, Array] = {}  # the same by address, of whoever acquires there

    def _of(self, warp: int) -> Array:
        return self._seen.setdefault(warp, np.zeros(self._ctas + 1, np.int32))

    def release(self, warp: int, epoch: int, address: int) -> None:
        own = self._of(warp).copy()
        own[(warp - 1) // self._warps_per_cta + 1] = epoch
        self._passed_on[address] = np.maximum(own, self._passed_on.get(address, own))

    def acquire(self, warp: int, address: int) -> None:
        if address in self._passed_on:
            self._seen[warp] = np.maximum(self._of(warp), self._passed_on[address])

    def meet(self, cta: int) -> None:
        """The warps of a program have met at a barrier."""
        if not self._seen:
            return
        warps = range((cta - 1) * self._warps_per_cta + 1, cta * self._warps_per_cta + 1)
        if known := [self._seen[warp] for warp in warps if warp in self._seen]:
            self._seen |= dict.fromkeys(warps, np.max(known, axis=0))

    def ordered(self, warps: Array, ctas: Array, epochs: Array) -> Array:
        """Whether the accesses of CTAs at these epochs come before those of the warps now, pair by pair."""
        out = np.zeros(len(warps), bool)
        for warp in np.unique(warps) if self._passed_on else ():
            if warp in self._seen:
                here = warps == warp
                out[here] = self._seen[warp][np.maximum(ctas[here], 0)] > epochs[here]
        return out
