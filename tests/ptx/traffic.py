"""Counts what memory accesses cost: sectors of global memory, wavefronts of shared memory."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = Any

_SECTOR = 32  # bytes that one access to the L2 cache moves
_BANKS = 32  # of shared memory, each 4 bytes wide


@dataclass
class Traffic:
    """Of one instruction, or of several.

    Args:
        requests: how often a warp ran it with a thread active.
        lanes: how many threads did.
        moved: sectors of 32 bytes in global memory, wavefronts in shared memory.
        ideal: the same if the bytes lay next to each other.
    """

    requests: int = 0
    lanes: int = 0
    moved: int = 0
    ideal: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def add_global(self, addresses: Array, lanes: Array, width: int) -> None:
        """One access of ``width`` bytes for each of the lanes."""
        warps = (lanes >> 5).astype(np.uint64)
        of_warp = np.unique(np.stack([warps, addresses]), axis=1)
        self.requests += len(np.unique(warps))
        self.lanes += len(lanes)
        self.moved += np.unique(np.stack([warps, addresses // np.uint64(_SECTOR)]), axis=1).shape[1]
        distinct = np.bincount(of_warp[0].astype(np.int64))
        self.ideal += int((-(-distinct * width // _SECTOR)).sum())

    def add_shared(self, offsets: Array, lanes: Array, width: int) -> None:
        """Lanes that access one word share it; two words of one bank take a wavefront each. Accesses of 8 bytes are
        served half a warp at a time, and those of 16 a quarter."""
        warps = lanes >> 5
        self.requests += len(np.unique(warps))
        self.lanes += len(lanes)
        words = max(1, width // 4)
        part = warps * words + (lanes & 31) // (32 // words)
        word = (offsets // 4)[:, None] + np.arange(words)
        distinct = np.unique(np.stack([np.broadcast_to(part[:, None], word.shape).ravel(), word.ravel()]), axis=1)
        bank, count = np.unique(distinct[0] * _BANKS + distinct[1] % _BANKS, return_counts=True)
        wavefronts = np.zeros(int(bank[-1]) // _BANKS + 1, np.int64)
        np.maximum.at(wavefronts, bank // _BANKS, count)
        self.moved += int(wavefronts.sum())
        self.ideal += int((-(-np.bincount(distinct[0] // words) // _BANKS)).sum())


@dataclass
class Result:
    """What one launch did.

    Args:
        name: of the kernel.
        ctas: programs that were launched, of ``threads`` threads each.
        warp_instructions: instructions that the warps ran.
        thread_instructions: instructions that the threads ran; fewer than 32 a warp where threads diverge.
        barriers: how often a program passed one.
        passed: which of the kernel's barriers were passed, counted from 0 as they stand in the text.
        opcodes: how often the warps ran each opcode.
        traffic: by instruction, named "global ld file:line text".
        notes: what is no fault and yet worth knowing, with its number.
    """

    name: str
    ctas: int
    threads: int
    warp_instructions: int = 0
    thread_instructions: int = 0
    barriers: int = 0
    passed: set[int] = field(default_factory=set)
    opcodes: Counter[str] = field(default_factory=Counter)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    def total(self, kind: str) -> Traffic:
        """The traffic of all instructions of a kind: "global ld", "global st", "global atom", "shared"."""
        return sum((traffic for name, traffic in self.traffic.items() if name.startswith(kind)), Traffic())
