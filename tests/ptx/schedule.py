"""Which threads run next, and when a barrier lets them pass.

In the usual order it is the first block of the program where any wait; but every so often it is the one where some have
waited longest, since a program may wait for another in a loop. With ``shuffle`` it is a random block and a random part
of its warps. Also, at a few accesses by which programs communicate (volatile loads, atomics), or at the beginning, half
of the warps are held until nobody else can go on, or for long. So whole programs run between the same access of two
warps of one program, which turns taken at random would hardly ever give (Burckhardt et al., A Randomized Scheduler with
Probabilistic Guarantees of Finding Bugs, 2010: few changes of priority, at random places, find most faults).

A barrier opens when all threads of its program wait at it, at the same instruction: a program whose warps wait at
different ones is refused, as is one of which some have ended, although a GPU would let them pass or not as it happens.
A barrier with a number of threads opens when so many wait, wherever that is.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.ptx.memory import Fault
from tests.ptx.program import Block, Program

Array = Any

_PATIENCE, _LONG = 64, 4096  # steps until who has waited longest goes on, and until held warps do


class Schedule:
    """The places of the threads of some programs that run at once.

    Args:
        ctas: so many programs.
        random: the source of random choices.
        shuffle: whether warps run in random order.
    """

    def __init__(self, program: Program, ctas: int, random: np.random.Generator, shuffle: bool) -> None:
        self._program, self._random, self._shuffle = program, random, shuffle
        count = ctas * program.threads
        self._waiting: dict[int, Array] = {}  # of each block, the threads that are to run it next
        self._since: dict[int, int] = {}  # of each such block, the step since when some wait there
        self._steps = 0
        self._held = np.zeros(count, bool)
        self._held_at = self._some_accesses() if shuffle else set()
        self.arrive(0, np.ones(count, bool))

    def _some_accesses(self) -> set[int]:
        """The blocks of no line of the kernel, of one or of two; a vector of atomics is many blocks of one line."""
        lines: dict[str, set[int]] = {"": {0}}
        for block in self._program.blocks:
            if block.communicates:
                lines.setdefault(block.instructions[0].source, set()).add(block.number)
        drawn = self._random.permutation([*lines])[: self._random.choice([0, 1, 1, 2])]
        return set().union(*(lines[str(line)] for line in drawn))

    @property
    def ended(self) -> bool:
        return not self._waiting

    def arrive(self, number: int, mask: Array) -> None:
        """These threads are to run a block next; -1 is the end."""
        if number == -1 or not mask.any():
            return
        if number not in self._waiting:
            self._since[number] = self._steps
        self._waiting[number] = self._waiting[number] | mask if number in self._waiting else mask
        if number in self._held_at:
            self._held |= mask & np.repeat(self._random.random(len(mask) // 32) < 0.5, 32)

    def leave(self, number: int, mask: Array) -> None:
        rest = self._waiting.pop(number) & ~mask
        if rest.any():
            self._waiting[number] = rest

    def choose(self) -> tuple[Block, Array] | None:
        """The block to run next and for which threads; None where no thread can go on but behind a barrier."""
        numbers = sorted(self._waiting)
        self._steps += 1
        if self._steps % _LONG == 0 and self._held.any():
            self._release()
        if self._steps % _PATIENCE == 0:
            numbers.sort(key=self._since.__getitem__)
        elif self._shuffle:
            numbers = [numbers[n] for n in self._random.permutation(len(numbers))]
        for number in numbers:
            block, mask = self._program.blocks[number], self._waiting[number]
            if block.barrier:
                continue
            if self._shuffle:
                mask = mask & ~self._held
            if block.warp_wide and not mask.all():
                mask = mask & np.repeat(mask.reshape(-1, 32).all(1), 32)
            if mask.any():
                return block, self._some_warps(mask) if self._shuffle else mask
        return None

    def _some_warps(self, mask: Array) -> Array:
        present = mask.reshape(-1, 32).any(axis=1)
        some = present & (self._random.random(present.size) < self._random.choice([0.2, 0.5, 1.0]))
        return mask & np.repeat(some, 32) if some.any() else mask

    def open_barriers(self) -> Iterator[tuple[int, Array]]:
        """Where no thread can go on: the barriers that open, each with the threads that pass it, which then arrive
        behind it. Where none opens, held warps go on.

        Raises:
            Fault: if a program can go on neither way.
        """
        moved: Array = self._held.reshape(-1, self._program.threads).any(1)
        release = bool(moved.any())
        for blocks, threads in self._barriers().items():
            waiting = np.any([self._waiting[number] for number in blocks], axis=0).reshape(len(moved), -1)
            complete = waiting.sum(1) == threads
            moved |= complete
            release &= not complete.any()
            for number in blocks if complete.any() else ():
                mask = self._waiting[number] & np.repeat(complete, self._program.threads)
                if mask.any():
                    yield number, mask
                    self.leave(number, mask)
                    self.arrive(number + 1, mask)
        here = np.any([*self._waiting.values()], axis=0).reshape(len(moved), -1).any(1)
        if (here & ~moved).any():
            self._refuse(int(np.argmax(here & ~moved)))
        if release:
            self._release()

    def _release(self) -> None:
        """One of the held warps goes on, or all."""
        warps = self._random.permutation(np.unique(np.nonzero(self._held)[0] // 32))
        self._held.reshape(-1, 32)[warps[: self._random.choice([1, len(warps)])]] = False

    def _barriers(self) -> dict[tuple[int, ...], int]:
        """The barriers at which any threads wait, each by its blocks, and the number of threads that open it: without
        a number of its own each instruction is a barrier by itself."""
        found: dict[tuple[int, ...], int] = {}
        counted: dict[tuple[str, int], list[int]] = {}
        for number in sorted(self._waiting):
            block = self._program.blocks[number]
            if block.barrier and block.barrier_threads:
                counted.setdefault((block.barrier_name, block.barrier_threads), []).append(number)
            elif block.barrier:
                found[number,] = self._program.threads
        return found | {tuple(blocks): threads for (_, threads), blocks in counted.items()}

    def _refuse(self, cta: int) -> None:
        places: Counter[str] = Counter()
        blocks = []
        for number, mask in self._waiting.items():
            if here := int(mask.reshape(-1, self._program.threads)[cta].sum()):
                blocks.append(self._program.blocks[number])
                places[blocks[-1].instructions[0].source] += here
        name = self._program.name
        if not any(block.barrier for block in blocks):
            raise Fault(f"{name}: a warp-wide instruction that part of a warp never reaches, at {[*places]}")
        ended = self._program.threads - sum(places.values())
        others = f", and {ended} have ended" if ended else ""
        raise Fault(f"{name}: threads wait for each other at different places: {dict(places)}{others}")
