"""Loads of one number for a whole program, which all of its threads make, must give all of them the same number.

A scalar of Triton is one value, by which the warps of a program branch alike and meet at barriers. Where it is loaded
from an address that other programs change meanwhile, each warp may see another value. An atomic is safe: one thread
makes it and tells the others.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Array = Any


class Scalars:
    """The loads of such addresses by the programs that run at once."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._times: dict[int, Array] = {}  # of each instruction, how often each thread has run it
        self._found: dict[tuple[int, int, int], tuple[int, set[tuple[int, int]]]] = {}

    def check(self, site: int, lanes: Array, addresses: Array, values: Array) -> None:
        """Notes what some lanes loaded; once all threads of a program have run the instruction for the same time, it
        faults if all loaded from one address, and not all the same."""
        times = self._times.setdefault(site, np.zeros(self._machine.count, np.int64))
        ctas, turns = self._machine.local_cta[lanes], times[lanes]
        for cta, turn in {*zip(ctas.tolist(), turns.tolist(), strict=True)}:
            here = (ctas == cta) & (turns == turn)
            threads, found = self._found.pop((site, cta, turn), (0, set()))
            threads += int(here.sum())
            found |= {*zip(addresses[here].tolist(), values[here].tolist(), strict=True)}
            if threads < self._machine.program.threads:
                self._found[site, cta, turn] = threads, found
            elif len(found) > len({address for address, _ in found}) == 1:
                seen = sorted(value for _, value in found)
                self._machine.fault(f"warps of one program load one number as {seen}", site, int(lanes[here][0]))
        times[lanes] += 1
